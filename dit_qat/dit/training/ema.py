"""Exponential moving average of the weights, through Lightning's callback."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy

from dit_qat.dit.models import DiT
from dit_qat.dit.training.module import DiTTraining

__all__ = ["EMA", "ema_network"]


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
        self.enabled = enabled

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the model, unless its weights are sharded."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"EMA cannot average weights sharded by {type(trainer.strategy).__name__}; "
                "use trainer.strategy=ddp, or ema.enabled=false"
            )
        # Lightning calls this before the model has moved to its device.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @property
    def averaged(self) -> DiTTraining | None:
        """The module that holds the averaged weights, during a fit."""
        if self._average_model is None:
            return None
        module = self._average_model.module
        assert isinstance(module, DiTTraining)
        return module


def ema_network(trainer: pl.Trainer, pl_module: Any) -> DiT:
    """The network with the averaged weights; the one in training where nothing is averaged.

    Not for use inside a validation, during which the callback swaps the two.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA) and callback.averaged is not None:
            return callback.averaged.network
    network: DiT = pl_module.network
    return network
