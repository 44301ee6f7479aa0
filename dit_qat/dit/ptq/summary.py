"""A finished run in plain values, in words and in pictures."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dit_qat import __version__
from dit_qat.calibration.engine import RunResult
from dit_qat.dit.ptq.comparison import Comparison, score_lines
from dit_qat.dit.ptq.job import Prepared
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.dit.ptq.report import PTQReport, Score
from dit_qat.dit.ptq.results import DRAWN, Results, as_plain, policy_of
from dit_qat.dit.ptq.text_to_image import video_writer
from dit_qat.dit.report.plots_policy import policy_plot
from dit_qat.dit.report.plots_ptq import pairs_plot, step_error_plot
from dit_qat.report.layers import layer_error_plot

__all__ = ["metrics_of", "results_of"]

_OUTPUT_CURVE = "model output, both on the float model's inputs"
_PATH_CURVE = "images on their way, each model on its own"
_RESUMED = "The run went on after a kill; seconds are those of its last process."


def metrics_of(
    prepared: Prepared,
    result: RunResult,
    found: Comparison,
    sizes: Mapping[str, int],
    drawn: Mapping[str, Any],
    seconds: Mapping[str, float],
    resumed: bool,
) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    plain = result.plain()
    report = dict(plain["report"])
    policy = report.pop("policy", None)  # in a file of its own
    return as_plain(
        {
            **prepared.job.plain(),
            **plain["average_bits"],
            **found.errors.plain(),
            **({} if found.path is None else found.path.plain()),
            **found.plain,
            "packed": dict(sizes),
            "prompts": dict(drawn) or None,
            "policy": None if policy is None else "policy.json",
            "layers": plain["layers"],
            "calibration_bytes": plain["calibration_bytes"],
            "report": report,
            "notes": result.layers,
            "seconds": sum(seconds.values()),
            "seconds_by_stage": dict(seconds),
            "resumed": resumed,
            "hardware": _hardware(prepared.job.device),
            "versions": _versions(),
        }
    )


def results_of(
    prepared: Prepared,
    result: RunResult,
    found: Comparison,
    metrics: Mapping[str, Any],
    drawn: Mapping[str, Any],
    state: Path,
) -> Results:
    """What goes into the folder beside the packed model."""
    policy = policy_of(prepared.subject.model, result.report)
    pictures = _pictures(found) | ({} if policy is None else {"policy.png": policy_plot(policy)})
    size = metrics["packed"]
    lines = [*found.scores, *score_lines(drawn, " (evaluation prompts)")]
    lines.append(Score("Size of the file, MB", size["float_bytes"] / 1e6, size["bytes"] / 1e6))
    report = PTQReport(
        title=_title(prepared, result.averages),
        model=prepared.subject.name,
        method=_method_text(prepared.job.method),
        calibration=prepared.calibration_text,
        sampling=prepared.sampling_text,
        seed=prepared.job.seed,
        seconds=metrics["seconds_by_stage"],
        hardware=metrics["hardware"],
        versions=metrics["versions"],
        averages=result.averages,
        output_error=found.errors.output,
        trajectory_error=None if found.path is None else found.path.trajectory_error,
        scores=lines,
        layers=result.table,
        by_timestep=pictures["timesteps.png"],
        by_layer=pictures["layers.png"],
        samples=pictures.get("samples.png"),
        policy=pictures.get("policy.png"),
        notes=[*found.notes, *_notes(prepared, drawn), *([_RESUMED] if metrics["resumed"] else [])],
    )
    folder = state / DRAWN if drawn else None
    return Results(metrics, report, pictures, None if policy is None else policy.as_dict(), folder)


def _pictures(found: Comparison) -> dict[str, bytes]:
    by_timestep = found.errors.by_timestep
    curves = {_OUTPUT_CURVE: ([*by_timestep], [*by_timestep.values()])}
    if found.path is not None:
        curves[_PATH_CURVE] = ([*found.path.timesteps], [*found.path.by_step])
    pictures = {
        "layers.png": layer_error_plot(found.errors.layers),
        "timesteps.png": step_error_plot(curves),
    }
    if found.pictures is not None:
        pictures["samples.png"] = pairs_plot(*found.pictures)
    return pictures


def _title(prepared: Prepared, averages: Mapping[str, float]) -> str:
    weights, activations = averages["weight_bits"], averages["activation_bits"]
    name = prepared.subject.name.rstrip("/").rpartition("/")[2]
    return f"{prepared.job.method.name} on {name}, W{weights:.3g}A{activations:.3g}"


def _method_text(method: PTQMethod) -> str:
    """Its name, and settings that are numbers or words."""
    plain = {
        k: v for k, v in vars(method.config).items() if isinstance(v, bool | int | float | str)
    }
    settings = ", ".join(f"{name} {value}" for name, value in plain.items())
    return f"{method.name} ({settings})" if settings else method.name


def _notes(prepared: Prepared, drawn: Mapping[str, Any]) -> list[str]:
    """What the page must say about this run."""
    notes = []
    if prepared.subject.pipeline is not None:
        notes.append(
            "Only the transformer is quantized: text encoders and autoencoder compute as before."
        )
    elif prepared.autoencoder is None and prepared.subject.dit.in_channels not in (1, 3):
        notes.append("There are no pictures: no decoder of latents was given (--vae).")
    if drawn:
        notes.append(
            f"{drawn['samples']} samples of {drawn['prompts']} prompts are in images/float and "
            f"images/quantized, in the layout of {drawn['layout']}, whose own scorer is to be run "
            "on both."
        )
        if drawn["layout"] == "vbench" and video_writer() is None:
            notes.append(
                "Videos are folders of PNGs: nothing here writes videos (pip install "
                "imageio[ffmpeg]); VBench reads them once they are .mp4 files."
            )
        notes += drawn["missing"].values()
    return list(dict.fromkeys(notes))


def _hardware(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def _versions() -> dict[str, str]:
    return {
        "dit_qat": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
