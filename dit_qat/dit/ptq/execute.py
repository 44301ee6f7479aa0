"""A whole run of post-training quantization, from a source of weights to a folder of results."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dit_qat.calibration import CallStore
from dit_qat.dit.ptq.comparison import Comparison, compare_dit, compare_pipeline
from dit_qat.dit.ptq.evaluation import spread_calls
from dit_qat.dit.ptq.job import Prepared
from dit_qat.dit.ptq.method import float_twin
from dit_qat.dit.ptq.packing import pack_quantized
from dit_qat.dit.ptq.preview import preview
from dit_qat.dit.ptq.recording import claim_state, record, state_folder
from dit_qat.dit.ptq.results import DRAWN, check_results_folder, write_results
from dit_qat.dit.ptq.run import quantize_post_training
from dit_qat.dit.ptq.similarity import PairScorer
from dit_qat.dit.ptq.summary import metrics_of, results_of
from dit_qat.dit.ptq.text_to_image import draw_prompts
from dit_qat.export.files import locked

__all__ = ["run_job"]

_EMBEDDED = "digits"
_COMPARED = 2  # calls, the first and the last step among them


def run_job(
    prepared: Prepared,
    out: Path,
    say: Callable[[str], None],
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Calibrate, quantize, compare, pack and write.

    Args:
        prepared: What to run.
        out: Folder of results, written at the end; finished blocks are kept beside it until then.
        say: Called with a line of text at each stage.
        overwrite: Replace results that are there, and finished blocks of other settings.
        progress: Whether to show bars.

    Returns:
        The content of ``metrics.json``.

    Raises:
        BlockingIOError: if another process is at it.
        FileExistsError: if the folder holds results.
        ValueError: if finished blocks of another run are there, and for what the method refuses.
    """
    state = state_folder(out)
    with locked(state):
        check_results_folder(out, overwrite)
        resumed = claim_state(state, prepared.job, overwrite)
        if resumed:
            say(f"going on with what is in {state}")
        metrics = _run(prepared, out, state, say, progress, resumed)
    shutil.rmtree(state)
    return metrics


def _run(
    prepared: Prepared,
    out: Path,
    state: Path,
    say: Callable[[str], None],
    progress: bool,
    resumed: bool,
) -> dict[str, Any]:
    job, subject = prepared.job, prepared.subject
    clock = _Clock()
    store = record(prepared, state, say, progress)
    clock.lap("calibration")
    say(preview(subject.model, prepared.target, store).text)
    reference = float_twin(subject.model)
    result = quantize_post_training(
        subject.model,
        job.method,
        store,
        target=prepared.target,
        trajectory=prepared.trajectory,
        seed=job.seed,
        state_folder=state / "blocks",
        limit_bytes=job.limit_bytes,
        moment_tokens=job.calibration.tokens,
        progress=progress,
    )
    clock.lap("quantization")
    say("packing the model, and running the packed one against it")
    packed = pack_quantized(
        subject.model,
        state / "packed",
        spread_calls(store, _COMPARED),
        provenance=job.plain(),
        overwrite=True,
    )
    clock.lap("packing")
    say("comparing it with the float model")
    found = _compare(prepared, reference, store, progress)
    drawn = _draw(prepared, reference, state / DRAWN, progress)
    clock.lap("comparison")
    sizes = {"bytes": packed.bytes, "float_bytes": sum(p.nbytes for p in reference.parameters())}
    metrics = metrics_of(prepared, result, found, sizes, drawn, clock.seconds, resumed)
    write_results(out, state / "packed", results_of(prepared, result, found, metrics, drawn, state))
    return metrics


def _compare(
    prepared: Prepared, reference: nn.Module, store: CallStore, progress: bool
) -> Comparison:
    job, subject = prepared.job, prepared.subject
    if prepared.trajectory is None:
        return compare_pipeline(
            subject,
            reference,
            store,
            prepared.prompts,
            prepared.drawing,
            job.evaluation,
            timestep_argument=prepared.target.timestep_argument,
            progress=progress,
        )
    return compare_dit(
        subject,
        reference,
        store,
        prepared.trajectory,
        job.evaluation,
        autoencoder=prepared.autoencoder,
        scored=subject.name == _EMBEDDED,
        progress=progress,
    )


def _draw(prepared: Prepared, reference: nn.Module, folder: Path, progress: bool) -> dict[str, Any]:
    """Draw the evaluation's prompts with both models, if there are any."""
    if not prepared.drawn:
        return {}
    drawing = prepared.drawing
    found = draw_prompts(
        prepared.subject.pipeline,
        {"float": reference, "quantized": prepared.subject.model},
        prepared.drawn,
        drawing,
        folder,
        PairScorer(device=prepared.job.device),
        progress,
    )
    return {**found, "layout": drawing.layout, "prompts": len(prepared.drawn)}


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
