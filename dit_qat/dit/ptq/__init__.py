"""Post-training quantization of diffusion transformers: targets, calibration, the engine."""

from dit_qat.dit.ptq.calibrate import calibrate_dit, calibrate_pipeline, kept_steps
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.dit.ptq.run import quantize_post_training
from dit_qat.dit.ptq.target import PTQTarget, target_of, transformer_of
from dit_qat.dit.ptq.trajectory import (
    Trajectory,
    float_trajectory,
    step_errors,
    trajectory_error,
)

__all__ = [
    "PTQMethod",
    "PTQRun",
    "PTQTarget",
    "Trajectory",
    "calibrate_dit",
    "calibrate_pipeline",
    "float_trajectory",
    "kept_steps",
    "quantize_post_training",
    "step_errors",
    "target_of",
    "trajectory_error",
    "transformer_of",
]
