"""Training: the Lightning module, its optimizer, and the callbacks."""

from dit_qat.dit.training.allocation import BitAllocation
from dit_qat.dit.training.callbacks import QuantStatistics, SampleGrids, Throughput
from dit_qat.dit.training.checkpoints import AtomicCheckpointIO, Checkpoints, last_checkpoint
from dit_qat.dit.training.ema import EMA
from dit_qat.dit.training.module import DiTTraining, NonFiniteLossError
from dit_qat.dit.training.online import OnlineMetrics
from dit_qat.dit.training.optimizer import OptimizerConfig

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "BitAllocation",
    "Checkpoints",
    "DiTTraining",
    "NonFiniteLossError",
    "OnlineMetrics",
    "OptimizerConfig",
    "QuantStatistics",
    "SampleGrids",
    "Throughput",
    "last_checkpoint",
]
