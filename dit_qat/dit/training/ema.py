"""Exponential moving average of the weights, through Lightning's callback."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dit_qat.dit.models import DiT
from dit_qat.dit.training.module import DiTTraining

__all__ = ["EMA", "ema_network", "refuse_sharded"]


class EMA(EMAWeightAveraging):
    """Average parameters only: buffers, integer ones above all, are copied.

    Args:
        decay: Share of the old average kept at each step; 0.9999 for long runs, 0.999 below 20,000
            steps, 0.99 below 1,000.
        enabled: False trains and validates on the raw weights.

    Raises:
        ValueError: for a decay outside [0, 1), or a strategy that shards the weights.
    """

    def __init__(self, decay: float = 0.9999, enabled: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay={decay} is outside [0, 1)")
        super().__init__(use_buffers=False, decay=decay)
        self.decay, self.enabled = decay, enabled

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the model, unless its weights are sharded."""
        refuse_sharded(trainer, "EMA cannot average", "ema.enabled=false")
        # Lightning calls this before the model has moved to its device.
        self._device = trainer.strategy.root_device
        if self._device.type == "cuda":
            self._average_at_once()
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the average, once it has the bits that it was saved with."""
        if self.averaged is not None:
            self.averaged.on_load_checkpoint(checkpoint)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _average_at_once(self) -> None:
        """Update all parameters by one kernel, instead of four for each (thousands in a DiT-XL)."""
        average = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        self._kwargs = {"multi_avg_fn": average}

    @property
    def averaged(self) -> DiTTraining | None:
        """The module that holds the averaged weights, during a fit."""
        if self._average_model is None:
            return None
        module = self._average_model.module
        assert isinstance(module, DiTTraining)
        return module


def refuse_sharded(trainer: pl.Trainer, what: str, cure: str) -> None:
    """Refuse what needs whole weights where every process has a part of them.

    Args:
        trainer: Of the run.
        what: What cannot be done to the weights, for the message.
        cure: What turns that off.

    Raises:
        ValueError: if the strategy shards the weights.
    """
    sharding = FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy
    if isinstance(trainer.strategy, sharding):
        raise ValueError(
            f"{what} weights sharded by {type(trainer.strategy).__name__}; use "
            f"trainer.strategy=ddp, or {cure}"
        )


def ema_network(trainer: pl.Trainer, pl_module: Any) -> DiT:
    """The network with the averaged weights; the one in training where nothing is averaged.

    Not for use inside a validation, during which the callback swaps the two.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA) and callback.averaged is not None:
            return callback.averaged.network
    network: DiT = pl_module.network
    return network
