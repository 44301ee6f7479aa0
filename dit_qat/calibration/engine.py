"""The engine of post-training quantization: a method, a model, recorded calls."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dit_qat.calibration.driver import check_store, drive
from dit_qat.calibration.memory import MemoryPlan
from dit_qat.calibration.method import BlockMethod, Run
from dit_qat.calibration.state import ResumeState, fingerprint, tensors_digest
from dit_qat.calibration.table import LayerRow, average_bits, bits_table
from dit_qat.calibration.view import BlockView
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.step_bits import follow_timesteps_

__all__ = ["RunResult", "run_method"]

RunT = TypeVar("RunT", bound=Run)


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        model: Quantized, the one that was given.
        table: One row per quantized layer.
        averages: As :func:`~dit_qat.calibration.table.average_bits`.
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


def run_method(
    method: BlockMethod[RunT, nn.Module],
    run: RunT,
    *,
    state_folder: Path | None = None,
    limit_bytes: int | None = None,
    moment_tokens: int | None = None,
) -> RunResult:
    """Quantize the float model of a run in place, block by block.

    Args:
        method: How.
        run: The model, which of its layers, and its recorded calls.
        state_folder: Where finished blocks are kept, so that a killed run goes on; None: nowhere.
        limit_bytes: What calibration may take.
        moment_tokens: Tokens of each recorded call that enter second moments, the same for all
            layers of one input; None: what the method asks for.

    Raises:
        ValueError: before the run, for calls of another model, patterns that match nothing, a plan
            above the limit, or blocks kept from another run; within it, for what the method cannot
            quantize or inputs that are not finite, when finished blocks are kept.
    """
    started = time.perf_counter()
    model, target = run.model, run.target
    check_store(model, run.store)
    kept = None
    if state_folder is not None:
        kept = ResumeState(state_folder, _run_fingerprint(method, run, moment_tokens))
    method.start(run)
    needs = method.needs
    if moment_tokens is not None:
        needs = replace(needs, moment_tokens=moment_tokens)
    plan = drive(
        model,
        run.store,
        target.find_blocks(),
        linears=target.linears(),
        needs=needs,
        quantize=_Quantizer(method, run, kept),
        prefix=method.prefix,
        state=kept,
        step_weights=run.step_weights,
        limit_bytes=limit_bytes,
        progress=run.progress,
    )
    if kept is not None:
        run.layers = kept.all_notes() | run.layers
    _finish(method, run)
    table = bits_table(model, run.names, run.layers)
    seconds = time.perf_counter() - started
    return RunResult(model, table, average_bits(table), seconds, plan, run.report, run.layers)


def _finish(method: BlockMethod[RunT, nn.Module], run: RunT) -> None:
    """Let the method see the whole model; a model with timesteps tells them to its layers."""
    model, argument = run.model, run.target.timestep_argument
    following = None if argument is None else follow_timesteps_(model, argument)
    method.finish(run)
    if following is not None and not any(
        isinstance(m, IntLinear) and m.config.step_bits for m in model.modules()
    ):
        following.remove()


class _Quantizer:
    """Asks the method for a block, and measures what it gave."""

    def __init__(
        self, method: BlockMethod[Any, nn.Module], run: Run, kept: ResumeState | None
    ) -> None:
        self.method, self.run, self.kept = method, run, kept

    def __call__(self, view: BlockView) -> Mapping[str, nn.Module]:
        try:
            modules = self.method.quantize_block(view)
        except ValueError as refusal:
            if view.name in str(refusal):
                raise
            raise ValueError(f"block {view.name}: {refusal}") from refusal
        error = view.error(modules)
        linears = {name: modules[name] for name in modules if name in view.linears}
        for name, own in view.linear_errors(linears).items():
            tokens = view.statistics[name].tokens
            self.run.note(name, error=own, block_error=error, tokens=tokens)
        if self.kept is not None:
            self.kept.save_notes(view.index, {n: self.run.layers[n] for n in linears})
        return modules


def _run_fingerprint(
    method: BlockMethod[Any, nn.Module], run: Run, moment_tokens: int | None
) -> str:
    """Of all that decides what a finished block holds."""
    target, store = run.target, run.store
    digest = hashlib.blake2b(fingerprint(run.model).encode(), digest_size=16)
    patterns = [*target.blocks, "|", *target.quantize, "|", *target.skip]
    settings = (run.seed, moment_tokens)
    for part in (method.name, method.config, patterns, settings, store.steps_and_timesteps):
        digest.update(f"{part!r}\n".encode())
    for call in (store[0], store[len(store) - 1]):
        digest.update(tensors_digest([call.args, call.kwargs]).encode())
    return digest.hexdigest()
