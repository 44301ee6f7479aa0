"""The part of ``dit-qat evaluate`` that is about FID and its relatives."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dit_qat.cli.output import GRID_IMAGES, check_claim, claim, save_grid
from dit_qat.dit.evaluation.dinov2 import load_dinov2
from dit_qat.dit.evaluation.extraction import Networks
from dit_qat.dit.evaluation.inception import find_inception, load_inception
from dit_qat.dit.evaluation.protocol import find_record
from dit_qat.dit.evaluation.references import Reference, open_reference, save_reference
from dit_qat.dit.evaluation.report import CompareTo, Report, make_report
from dit_qat.dit.evaluation.scoring import Comparison, Metric, Scores, choose_metrics
from dit_qat.dit.evaluation.scratch import scratch_folder
from dit_qat.dit.evaluation.sources import ImageSource
from dit_qat.dit.processes import Processes, launch
from dit_qat.export.files import locked, write_json

__all__ = ["RESULTS", "ScoringOptions", "score_images"]

RESULTS = ("metrics.json", "grid.png")
"""What the command leaves in its folder."""


@dataclass(frozen=True)
class ScoringOptions:
    """Options of the command, as it documents them."""

    metrics: list[Metric] | None
    inception: str
    dino: Path | None
    batch_size: int
    seed: int
    device: str
    devices: int
    num_nodes: int
    cache_reference: Path | None
    compare_to: CompareTo
    allow_few_samples: bool


def score_images(
    samples: ImageSource,
    reference: Path | None,
    options: ScoringOptions,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Score samples, print the report and write it if a folder is named.

    Raises:
        ValueError: for images, statistics or options that do not fit.
        OSError: for files that are not there, or folders that cannot be written.
    """
    opened = None if reference is None else open_reference(reference)
    metrics, notes = choose_metrics(options.metrics, opened, options.dino is not None)
    _check_options(options, opened, out, overwrite)
    record = find_record(samples)
    processes = launch(options.device, options.devices, options.num_nodes)
    networks = _load(metrics, options, processes)
    keep = frozenset[str]()
    if options.cache_reference is not None:
        keep = frozenset({"pool", "spatial"} | ({"dinov2"} if networks.dinov2 else set()))
    comparison = Comparison(
        samples, metrics, networks, opened, options.batch_size, options.seed, keep
    )
    cautions = _check_numbers(comparison, options.allow_few_samples)
    with _held(out, overwrite, processes):
        with scratch_folder(out, processes) as scratch:
            scores = comparison.run(processes, scratch, progress=True)
        if scores is None:
            return
        report = make_report(comparison, scores, record, options.compare_to, cautions, notes)
        _print(report)
        if out is not None:
            _write(out, report, samples, overwrite)
        if options.cache_reference is not None:
            _cache(options.cache_reference, scores, comparison)


def _check_options(
    options: ScoringOptions, reference: Reference | None, out: Path | None, overwrite: bool
) -> None:
    if options.batch_size < 1:
        raise ValueError(f"--batch_size {options.batch_size}: must be at least 1")
    if options.num_nodes > 1 and out is None:
        raise ValueError(
            f"--num_nodes {options.num_nodes}: name a folder that all machines see, --out"
        )
    cache = options.cache_reference
    if cache is None:
        return
    if reference is None or reference.images is None or reference.moments:
        raise ValueError("--cache_reference needs images, and no statistics, as --reference")
    if cache.suffix != ".npz":
        raise ValueError(f"--cache_reference {cache}: must end in .npz")
    if cache.exists() and not overwrite:
        raise FileExistsError(
            f"--cache_reference {cache} exists; use it as --reference, or pass --overwrite true"
        )


def _check_numbers(comparison: Comparison, allowed: bool) -> list[str]:
    """What is too few to be trusted, if it is allowed."""
    few = comparison.check()
    if few and not allowed:
        raise ValueError(
            f"{'; '.join(few)}; add images, leave the metric out of --metrics, or pass "
            "--allow_few_samples true for a strongly biased number"
        )
    return few


def _load(metrics: list[Metric], options: ScoringOptions, processes: Processes) -> Networks:
    """The networks that the metrics need; process zero downloads weights before the others look."""
    inception = None
    if set(metrics) - {"fd_dinov2"} or options.cache_reference is not None:
        processes.together(lambda: find_inception(options.inception) if processes.is_zero else None)
        inception = load_inception(find_inception(options.inception), processes.device)
    wanted = options.dino is not None and "fd_dinov2" in metrics
    dinov2 = load_dinov2(options.dino, processes.device) if options.dino and wanted else None
    return Networks(inception, dinov2)


@contextmanager
def _held(out: Path | None, overwrite: bool, processes: Processes) -> Iterator[None]:
    """Hold the folder of the results, by process zero; fail in all if another run has or had it."""
    with ExitStack() as stack:

        def hold() -> None:
            if processes.is_zero and out is not None:
                stack.enter_context(locked(out))
                check_claim(out, RESULTS, overwrite)  # again: a run may just have ended

        processes.together(hold)
        yield


def _print(report: Report) -> None:
    print(report.table(), flush=True)
    block = report.warning_block()
    if block:
        print(block, file=sys.stderr)


def _cache(path: Path, scores: Scores, comparison: Comparison) -> None:
    images = comparison.reference.images if comparison.reference is not None else None
    assert images is not None
    moments = {name: scores.reference[name] for name in comparison.keep}
    extractors = {name: comparison.networks.sha256(name) for name in comparison.keep}
    save_reference(path, moments, extractors, images.sha256())
    print(f"the statistics of {images.path} are in {path}")


def _write(out: Path, report: Report, samples: ImageSource, overwrite: bool) -> None:
    claim(out, RESULTS, overwrite)
    shown = min(GRID_IMAGES, len(samples))
    save_grid(out / "grid.png", list(samples.batches(0, shown, shown)))
    write_json(out / "metrics.json", {**report.content(), "samples": str(samples.path)})
