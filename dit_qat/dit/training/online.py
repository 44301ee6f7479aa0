"""Scores of fresh samples during validation, on EMA weights, accumulated by torchmetrics."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation.classifier import DigitClassifier, load_digit_classifier
from dit_qat.dit.evaluation.inception import InceptionFeatures, find_inception, load_inception
from dit_qat.dit.evaluation.references import open_reference
from dit_qat.dit.models import DiT
from dit_qat.dit.models.autoencoder import Autoencoder
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8
from dit_qat.dit.training.decoders import load_decoder
from dit_qat.dit.training.ema import EMA, ema_network, refuse_sharded

__all__ = ["OnlineMetrics"]

_SPLIT = 5000  # images per split of the Inception Score, as ADM's evaluator has it


class _Given(nn.Module):
    """Stands where torchmetrics wants a feature network, for features that are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class _Judge:
    """A feature network and the moments of real images.

    Attributes:
        name: Of the Frechet distance in its features.
        network: Gives features and logits of uint8 images.
        mean: (D,), float64, of real images.
        covariance: (D, D), float64.
    """

    name: str
    network: InceptionFeatures | DigitClassifier
    mean: Tensor
    covariance: Tensor

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (N, D) of images (N, C, H, W), uint8, and logits if they score something."""
        if isinstance(self.network, InceptionFeatures):
            activations = self.network.activations(images)
            return activations.pool, activations.logits
        return self.network.features(images.float().div(127.5).sub(1)), None


class OnlineMetrics(pl.Callback):
    """Draw samples at every validation and log their FID and Inception Score.

    The features, the resize and the rounding are those of ``dit-qat evaluate``, so that the numbers
    are the ones it would give for as many images; the names carry how many. Each process draws its
    share of the image grid. Networks of 8x8 digits are scored by the digit classifier instead and
    need neither reference nor Inception.

    Args:
        num: Images per validation; 0 for none. FID from fewer than 50,000 is biased upwards and
            comparable with itself only; below 2,049 its covariance is singular.
        reference: ``.npz`` of statistics (ADM's, or of ``dit-qat evaluate --cache_reference``).
        inception: File of torch-fidelity's weights; "auto" downloads it.
        vae: Autoencoder that turns latents into images (see ``load_autoencoder``).
        sampler: How to sample.

    Raises:
        ValueError: for a number of images that is negative or 1.
    """

    def __init__(
        self,
        num: int = 0,
        reference: Path | None = None,
        inception: str = "auto",
        vae: str | None = None,
        sampler: SamplerConfig | None = None,
    ) -> None:
        if num < 0 or num == 1:
            raise ValueError(f"online.num={num} must be 0 (none) or at least 2")
        self.num = num
        self.reference = reference
        self.inception = inception
        self.vae = vae
        self.sampler = SamplerConfig() if sampler is None else sampler
        self._judge: _Judge | None = None
        self._decoder: Autoencoder | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Load what scoring needs, and refuse, before any work, what could not be scored.

        Raises:
            ValueError: for sharded weights, latents without an autoencoder, no reference,
                statistics of another network, too few images for the processes, or EMA weights
                that come too late; errors of the loaders.
        """
        if not self.num or stage == "test":
            return
        network: DiT = pl_module.network
        refuse_sharded(trainer, "no samples can be drawn from", "online.num=0")
        self._check_shares(trainer.world_size)
        self._check_order(trainer)
        if self.sampler.guidance != 1:
            _ = network.null_class  # guidance needs one
        if self.vae is not None:
            self._decoder = load_decoder(self.vae, network, trainer)
        self._judge = self._make_judge(network)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Refuse a run that never validates, and so would never score.

        Raises:
            ValueError: if there is nothing to validate on.
        """
        if self._judge is not None and not sum(trainer.num_val_batches):
            raise ValueError(
                f"online.num={self.num} scores at every validation, and there is none; validate on "
                "at least one image and batch (data's validation_images, "
                "trainer.limit_val_batches), or set online.num to 0"
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sample, score and log."""
        if self._judge is None or trainer.sanity_checking:
            return
        device = trainer.strategy.root_device
        self._judge.network.to(device)
        distance, score = self._metrics(self._judge, device, trainer.is_global_zero)
        scored = False
        for images in self._draw(ema_network(trainer, pl_module), trainer):
            features, logits = self._judge.outputs(images)
            distance.update(features, real=False)
            if logits is not None:
                score.update(logits)
                scored = True
        pl_module.log(f"val/{self._judge.name}_{self.num}", distance.compute().float())
        if scored:
            pl_module.log(f"val/is_{self.num}", score.compute()[0].float())
        self._judge.network.to("cpu")  # training needs the memory

    @torch.no_grad()
    def _draw(self, network: DiT, trainer: pl.Trainer) -> Iterator[Tensor]:
        """This process's images, uint8, batch by batch of the aligned grid."""
        size, rank, world = self.sampler.batch_size, trainer.global_rank, trainer.world_size
        indices = [i for i in range(self.num) if i // size % world == rank]
        if self._decoder is not None:
            self._decoder.to(trainer.strategy.root_device)
        for _, drawn in sample_images(network, self.sampler, indices):
            yield to_uint8(drawn if self._decoder is None else self._decoder.decode(drawn))
        if self._decoder is not None:
            self._decoder.to("cpu")

    def _metrics(
        self, judge: _Judge, device: torch.device, first: bool
    ) -> tuple[FrechetInceptionDistance, InceptionScore]:
        dimension = len(judge.mean)
        distance = FrechetInceptionDistance(_Given(dimension)).to(device)
        if first:  # the sums of all processes are added up
            # torchmetrics keeps raw sums; their number does not matter to the moments they give.
            count, mean = 2, judge.mean.to(device)
            distance.real_features_num_samples += count
            distance.real_features_sum += count * mean
            products = (count - 1) * judge.covariance.to(device) + count * torch.outer(mean, mean)
            distance.real_features_cov_sum += products
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it keeps the logits
            score = InceptionScore(_Given(0), splits=max(1, self.num // _SPLIT)).to(device)
        return distance, score

    def _make_judge(self, network: DiT) -> _Judge:
        pixels = network.in_channels if self._decoder is None else 3
        if self.reference is None and (pixels, network.input_size) == (1, 8):
            return _digits_judge()
        if pixels not in (1, 3):
            raise ValueError(
                f"online.num={self.num}: this network draws latents of {pixels} channels; name the "
                "autoencoder that decodes them, online.vae, or set online.num to 0"
            )
        if self.reference is None:
            raise ValueError(
                f"online.num={self.num} needs online.reference, an .npz of statistics: ADM's, or "
                "one of dit-qat evaluate --cache_reference"
            )
        reference = open_reference(self.reference)
        if "pool" not in reference.moments:
            raise ValueError(
                f"{self.reference} holds no statistics (mu, sigma); make a file of them once, with "
                "dit-qat evaluate --cache_reference"
            )
        judge = load_inception(find_inception(self.inception))
        reference.check_extractor("pool", judge.num_features, judge.sha256)
        moments = reference.moments["pool"]
        return _Judge("fid", judge, moments.mean, moments.covariance)

    def _check_shares(self, world_size: int) -> None:
        batches = -(-self.num // self.sampler.batch_size)
        if batches < world_size:
            raise ValueError(
                f"online.num={self.num} makes {batches} batches of {self.sampler.batch_size}, "
                f"fewer than {world_size} processes; lower online.sampler.batch_size"
            )

    def _check_order(self, trainer: pl.Trainer) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        late = callbacks[callbacks.index(self) :]
        if any(isinstance(callback, EMA) for callback in late):
            raise ValueError(
                "EMA must stand before OnlineMetrics in the trainer's callbacks: it puts the "
                "averaged weights back when validation ends"
            )


def _digits_judge() -> _Judge:
    classifier = load_digit_classifier()
    features = classifier.features(to_uint8(digit_images()[0]).float().div(127.5).sub(1)).double()
    return _Judge("fd_digits", classifier, features.mean(dim=0), features.T.cov())
