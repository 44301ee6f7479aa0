"""The engine of post-training quantization: a method, a model, recorded calls."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from dit_qat.calibration import BlockView, CallStore, MemoryPlan, ResumeState, drive, fingerprint
from dit_qat.calibration.driver import check_store
from dit_qat.calibration.state import tensors_digest
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.dit.ptq.table import LayerRow, average_bits, bits_table
from dit_qat.dit.ptq.target import PTQTarget, target_of
from dit_qat.dit.ptq.trajectory import Trajectory
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.step_bits import follow_timesteps_

__all__ = ["PTQResult", "quantize_post_training"]


@dataclass(frozen=True)
class PTQResult:
    """What a run made.

    Attributes:
        model: Quantized, the one that was given.
        table: One row per quantized layer.
        averages: As :func:`~dit_qat.dit.ptq.table.average_bits`.
        seconds: Of the whole run.
        plan: Estimated peak of calibration.
        report: What the method told.
        layers: What the method told about single layers, by full name.
    """

    model: nn.Module
    table: list[LayerRow]
    averages: dict[str, float]
    seconds: float
    plan: MemoryPlan
    report: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Plain values, as for ``metrics.json``."""
        return {
            "average_bits": self.averages,
            "seconds": self.seconds,
            "calibration_bytes": {**vars(self.plan), "total": self.plan.total},
            "layers": [row.plain() for row in self.table],
            "report": self.report,
        }


def quantize_post_training(
    model: nn.Module,
    method: PTQMethod,
    store: CallStore,
    *,
    target: PTQTarget | None = None,
    trajectory: Trajectory | None = None,
    seed: int = 0,
    state_folder: Path | None = None,
    limit_bytes: int | None = None,
    moment_tokens: int | None = None,
    progress: bool = False,
) -> PTQResult:
    """Quantize a float model in place, block by block.

    Args:
        model: Float; a DiT of ours or a transformer of diffusers.
        method: How.
        store: Its recorded calls.
        target: Which layers; None: the default of its class.
        trajectory: Steps of a sampler, for methods that look at whole images.
        seed: Of everything that the method draws.
        state_folder: Where finished blocks are kept, so that a killed run goes on; None: nowhere.
        limit_bytes: What calibration may take.
        moment_tokens: Tokens of each recorded call that enter second moments, the same for all
            layers of one input; None: all.
        progress: Whether to show bars.

    Raises:
        ValueError: before the run, for calls of another model, patterns that match nothing, a plan
            above the limit, or blocks kept from another run; within it, for what the method cannot
            quantize or inputs that are not finite, when finished blocks are kept.
    """
    started = time.perf_counter()
    check_store(model, store)
    target = target_of(model) if target is None else target
    kept = None
    if state_folder is not None:
        settings = (seed, moment_tokens)
        kept = ResumeState(state_folder, _run_fingerprint(model, method, store, target, settings))
    run = PTQRun(model, target, store, trajectory, seed, progress)
    method.start(run)
    needs = method.needs
    if moment_tokens is not None:
        needs = replace(needs, moment_tokens=moment_tokens)
    plan = drive(
        model,
        store,
        target.find_blocks(),
        linears=target.linears(),
        needs=needs,
        quantize=_Quantizer(method, run, kept),
        prefix=method.prefix,
        state=kept,
        step_weights=run.step_weights,
        limit_bytes=limit_bytes,
        progress=progress,
    )
    if kept is not None:
        run.layers = kept.all_notes() | run.layers
    following = follow_timesteps_(model, target.timestep_argument)
    method.finish(run)
    if not any(isinstance(m, IntLinear) and m.config.step_bits for m in model.modules()):
        following.remove()
    table = bits_table(model, run.names, run.layers)
    seconds = time.perf_counter() - started
    averages = average_bits(table)
    return PTQResult(model, table, averages, seconds, plan, run.report, run.layers)


class _Quantizer:
    """Asks the method for a block, and measures what it gave."""

    def __init__(self, method: PTQMethod, run: PTQRun, kept: ResumeState | None) -> None:
        self.method, self.run, self.kept = method, run, kept

    def __call__(self, view: BlockView) -> Mapping[str, nn.Module]:
        try:
            modules = self.method.quantize_block(view)
        except ValueError as refusal:
            if view.name in str(refusal):
                raise
            raise ValueError(f"block {view.name}: {refusal}") from refusal
        error = view.error(modules)
        for name, own in view.linear_errors(modules).items():
            tokens = view.statistics[name].tokens
            self.run.note(name, error=own, block_error=error, tokens=tokens)
        if self.kept is not None:
            self.kept.save_notes(view.index, {n: self.run.layers[n] for n in modules})
        return modules


def _run_fingerprint(
    model: nn.Module,
    method: PTQMethod,
    store: CallStore,
    target: PTQTarget,
    settings: tuple[int, int | None],
) -> str:
    """Of all that decides what a finished block holds."""
    digest = hashlib.blake2b(fingerprint(model).encode(), digest_size=16)
    patterns = [*target.blocks, "|", *target.quantize, "|", *target.skip]
    for part in (method.name, method.config, patterns, settings, store.steps_and_timesteps):
        digest.update(f"{part!r}\n".encode())
    for call in (store[0], store[len(store) - 1]):
        digest.update(tensors_digest([call.args, call.kwargs]).encode())
    return digest.hexdigest()
