"""The experiment on digits: quantization-aware training from the shipped float model, and scores.

``dit-qat demo`` and ``tools/compare_digits.py`` are made of this.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dit_qat.dit.data import Digits
from dit_qat.dit.evaluation import evaluate_digits
from dit_qat.dit.methods import Method
from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8
from dit_qat.dit.training import EMA, BitAllocation, Checkpoints, DiTTraining, OptimizerConfig

__all__ = ["Curve", "Recipe", "Scored", "digits_sampler", "score", "train_quantized"]

Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Recipe:
    """Quantization-aware fine-tuning on digits; ``configs/digits`` says the same in YAML.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images per step.
        optimizer: Learning rates; higher than for ImageNet, the run being a thousand times shorter.
        ema_decay: Decay of the averaged weights that are sampled from.
    """

    steps: int = 600
    batch_size: int = 64
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr_ternary=1e-3, lr_low_rank=1e-3, lr_float=1e-3, warmup_steps=50
        )
    )
    ema_decay: float = 0.99


@dataclass(frozen=True)
class Scored:
    """Samples of a model, uint8 (N, 1, 8, 8), the labels asked for, and their scores."""

    images: Tensor
    labels: Tensor
    scores: dict[str, float]


class _LossCurve(pl.Callback):
    """Keep DiT's training loss of every step, without the distance to a teacher."""

    def __init__(self) -> None:
        self.curve: Curve = ([], [])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.curve[0].append(trainer.global_step)
        self.curve[1].append(float(trainer.callback_metrics["train/loss"]))


def digits_sampler(seed: int, steps: int = 50) -> SamplerConfig:
    """DDIM without guidance, in batches that leave the last one of 1,797 images nearly full."""
    return SamplerConfig(kind="ddim", steps=steps, batch_size=300, seed=seed)


def train_quantized(
    method: Method, recipe: Recipe, seed: int, root: Path, progress: bool = False
) -> tuple[DiTTraining, Curve]:
    """Fine-tune the shipped float digits model under a quantization method.

    Args:
        method: What to train.
        recipe: How long and how fast.
        seed: Seed of data order, noise, timesteps and label dropout.
        root: Folder of the run; its checkpoint lands in ``root/checkpoints``, the bits that AMPN
            allocates in ``root/bit_map.json``.
        progress: Show a progress bar.

    Returns:
        The module with its averaged weights, and the training loss by step.

    Raises:
        KeyboardInterrupt: if a signal ended the training; its checkpoint is in ``root``.
    """
    network = DiT(**load_dit("digits").config)
    module = DiTTraining(
        network, method, float_weights="digits", optimizer=recipe.optimizer, seed=seed
    )
    curve, checkpoints = _LossCurve(), Checkpoints(recipe.steps)
    with _quiet():
        trainer = pl.Trainer(
            default_root_dir=root,
            max_steps=recipe.steps,
            accelerator="cpu",
            logger=False,
            callbacks=[EMA(recipe.ema_decay), BitAllocation(), checkpoints, curve],
            enable_progress_bar=progress,
            enable_model_summary=False,
            check_val_every_n_epoch=None,
            limit_val_batches=0,
        )
        trainer.fit(module, Digits(recipe.batch_size))
    if checkpoints.stopped_by is not None:
        raise KeyboardInterrupt  # a half-trained model is nothing to score
    return module.eval(), curve.curve


def score(
    network: DiT, sampler: SamplerConfig, count: int = 1797, progress: bool = False
) -> Scored:
    """Sample images of all classes in turn and score them against the real digits."""
    batches = list(sample_images(network, sampler, range(count), progress=progress))
    images = to_uint8(torch.cat([images for _, images in batches]))
    labels = torch.tensor([index % network.num_classes for index in range(count)])
    return Scored(images, labels, evaluate_digits(images, labels))


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's banners and its advice on loaders tell the user of a demo nothing."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            yield
    finally:
        logger.setLevel(level)
