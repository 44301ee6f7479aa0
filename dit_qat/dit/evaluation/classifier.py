"""The small classifier of digits whose features give a Frechet distance without a download."""

from collections.abc import Iterator
from importlib import resources

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.dit.data.digits import digit_images
from dit_qat.dit.data.sampler import StepBatchSampler
from dit_qat.dit.randomness import derive_seed, generator_for

__all__ = ["DigitClassifier", "load_digit_classifier", "train_digit_classifier"]

_ASSET = "digits_classifier.safetensors"
_BATCH = 128
_LEARNING_RATE = 2e-3
_BACKGROUND = -1.0


class DigitClassifier(nn.Module):
    """Classify images (N, 1, 8, 8) in [-1, 1] through two convolutions and 64 features."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, self.num_features)
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the activations (N, 64) before the last layer."""
        x = F.gelu(self.conv1(images))
        x = F.gelu(self.conv2(x))
        return F.gelu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def load_digit_classifier() -> DigitClassifier:
    """Load the classifier that ships with the package, in evaluation mode and without gradients.

    Raises:
        FileNotFoundError: The installation lacks the weights.
        ValueError: The file is damaged, or holds other weights.
    """
    asset = resources.files("dit_qat.dit") / "assets" / _ASSET
    if not asset.is_file():
        raise FileNotFoundError(
            f"{asset} is missing; reinstall dit-qat, or pass a classifier from "
            "train_digit_classifier()"
        )
    # Weights made on the meta device draw no random numbers; the file replaces every one of them.
    with torch.device("meta"):
        classifier = DigitClassifier()
    try:
        classifier.load_state_dict(load(asset.read_bytes()), strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{asset} is damaged or not the classifier of this version ({error}); reinstall dit-qat"
        ) from error
    return classifier.eval().requires_grad_(False)


def train_digit_classifier(
    steps: int = 1500, seed: int = 0, data: tuple[Tensor, Tensor] | None = None
) -> DigitClassifier:
    """Train a classifier, reproducibly and without touching the global random state.

    Adam with a cosine decay on images that are shifted by up to one pixel.

    Args:
        steps: Optimizer steps on batches of 128 images.
        seed: Decides the initial weights, the order of the images and their shifts.
        data: Images (N, 1, 8, 8) in [-1, 1] and labels (N,); all 1,797 digits by default.

    Raises:
        ValueError: Fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    images, labels = digit_images() if data is None else data
    classifier = _initial_classifier(seed)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch, shifted in _shifted_batches(images, steps, seed):
        loss = F.cross_entropy(classifier(shifted), labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def _initial_classifier(seed: int) -> DigitClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classifier", "init"))
        return DigitClassifier()


def _shifted_batches(images: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the indices (128,) of each batch and its randomly shifted images (128, 1, 8, 8)."""
    side = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), value=_BACKGROUND)
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)
    order = StepBatchSampler(len(images), _BATCH, derive_seed(seed, "classifier"), 0, steps)
    for step, draw in enumerate(order):
        generator = generator_for(seed, "classifier", "shift", step)
        down, right = torch.randint(3, (2, len(draw.indices)), generator=generator)
        batch = torch.tensor(draw.indices)
        yield batch, windows[batch, :, down, right]
