"""AdamW's parameter groups by kind, and the learning-rate schedule."""

from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

from torch import nn

from dit_qat.layers import QuantLinear

__all__ = ["OptimizerConfig", "learning_rate_factor", "parameter_groups"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates and their course.

    Attributes:
        lr_ternary: Of the float latents of ternary weights.
        lr_low_rank: Of the low-rank branches.
        lr_float: Of everything that stays float: embedders, biases, the final layer.
        betas: AdamW's moment decays.
        weight_decay: AdamW's decoupled decay.
        warmup_steps: Optimizer steps of linear warm-up.
        decay: Course after warm-up, down to ``final_factor`` at the last step.
        final_factor: Last learning rate over the peak.

    Raises:
        ValueError: for a negative rate or warm-up.
    """

    lr_ternary: float = 1e-4
    lr_low_rank: float = 1e-4
    lr_float: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 1000
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        # A checkpoint hands the pair back as a list.
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("lr_ternary", "lr_low_rank", "lr_float", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        if self.decay not in ("constant", "cosine", "linear"):
            raise ValueError(f"optimizer.decay={self.decay!r} is not constant, cosine or linear")


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort trainable parameters into the groups ``ternary``, ``low_rank`` and ``float``.

    Groups without parameters are left out, so that a float network has a single one.
    """
    kinds: dict[str, list[nn.Parameter]] = {"ternary": [], "low_rank": [], "float": []}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            kind = "float"
            if isinstance(module, QuantLinear) and name != "bias":
                kind = "ternary" if name == "weight" else "low_rank"
            kinds[kind].append(parameter)
    rates = {
        "ternary": config.lr_ternary,
        "low_rank": config.lr_low_rank,
        "float": config.lr_float,
    }
    return [
        {"params": parameters, "lr": rates[kind], "name": kind}
        for kind, parameters in kinds.items()
        if parameters
    ]


def learning_rate_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """Factor on the peak rate at optimizer step ``step`` (0-based) of ``total``."""
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.decay == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    course = (1 + cos(pi * progress)) / 2 if config.decay == "cosine" else 1 - progress
    return config.final_factor + (1 - config.final_factor) * course
