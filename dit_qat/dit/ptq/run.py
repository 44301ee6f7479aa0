"""Post-training quantization of a diffusion transformer: its target, its path, and the engine."""

from pathlib import Path

from torch import nn

from dit_qat.calibration import CallStore
from dit_qat.calibration.engine import RunResult, run_method
from dit_qat.calibration.target import Target
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.dit.ptq.target import target_of
from dit_qat.dit.ptq.trajectory import Trajectory

__all__ = ["quantize_post_training"]


def quantize_post_training(
    model: nn.Module,
    method: PTQMethod,
    store: CallStore,
    *,
    target: Target | None = None,
    trajectory: Trajectory | None = None,
    seed: int = 0,
    state_folder: Path | None = None,
    limit_bytes: int | None = None,
    moment_tokens: int | None = None,
    progress: bool = False,
) -> RunResult:
    """Quantize a float model in place, block by block.

    Args:
        model: Float; a DiT of ours or a transformer of diffusers.
        method: How.
        store: Its recorded calls.
        target: Which layers; None: the default of its class.
        trajectory: Steps of a sampler, for methods that look at whole images.
        seed: Of everything that the method draws.
        state_folder: As :func:`~dit_qat.calibration.engine.run_method`.
        limit_bytes: As there.
        moment_tokens: As there.
        progress: Whether to show bars.

    Raises:
        ValueError: as there.
    """
    run = PTQRun(
        model,
        target_of(model) if target is None else target,
        store,
        seed=seed,
        progress=progress,
        trajectory=trajectory,
    )
    return run_method(
        method,
        run,
        state_folder=state_folder,
        limit_bytes=limit_bytes,
        moment_tokens=moment_tokens,
    )
