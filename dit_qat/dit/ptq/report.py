"""The page of a post-training quantization: what it cost, what is left of the float model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from dit_qat.calibration.table import LayerRow
from dit_qat.export.files import written_whole
from dit_qat.report.layers import layer_table
from dit_qat.report.page import bullets, duration, page, paragraph, picture, section, table

__all__ = ["PTQReport", "Score", "write_ptq_report"]


@dataclass(frozen=True)
class Score:
    """One line of the table of scores.

    Attributes:
        label: In words, with what is better.
        before: Of the float model; None where it has none.
        after: Of the quantized model.
        form: How both are written.
    """

    label: str
    before: float | None
    after: float
    form: str = ".3g"


@dataclass(frozen=True)
class PTQReport:
    """What the page shows; pictures are PNG bytes.

    Attributes:
        title: Heading.
        model: What was quantized.
        method: Its name and settings.
        calibration: What it was calibrated on, in words.
        sampling: How images were drawn, in words.
        seed: Of the run.
        seconds: By stage, in order.
        hardware: What it ran on, in words.
        versions: Version by package.
        averages: Of :func:`~dit_qat.calibration.table.average_bits`.
        output_error: On recorded calls.
        trajectory_error: Along the sampler's path, where it could be followed.
        scores: Further lines of the table.
        layers: One row per quantized layer.
        by_timestep: Errors over timesteps.
        by_layer: Errors over layers.
        samples: Images of both models, side by side.
        policy: Bits by timestep and layer, where they differ by timestep.
        notes: Further sentences for the end of the page.
    """

    title: str
    model: str
    method: str
    calibration: str
    sampling: str
    seed: int
    seconds: Mapping[str, float]
    hardware: str
    versions: Mapping[str, str]
    averages: Mapping[str, float]
    output_error: float
    trajectory_error: float | None
    scores: Sequence[Score]
    layers: Sequence[LayerRow]
    by_timestep: bytes = field(repr=False)
    by_layer: bytes = field(repr=False)
    samples: bytes | None = field(default=None, repr=False)
    policy: bytes | None = field(default=None, repr=False)
    notes: Sequence[str] = ()


def write_ptq_report(path: Path, report: PTQReport) -> None:
    """Write the page under its final name only, replacing an earlier one."""
    text = page(report.title, _body(report))
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _body(report: PTQReport) -> list[str]:
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        _summary(report),
        section("Scores", _scores(report)),
    ]
    if report.samples is not None:
        parts.append(section("Samples", picture(report.samples, "Samples", _SAMPLES_NOTE)))
    steps = picture(report.by_timestep, "Error by timestep", _STEPS_NOTE)
    layers = picture(report.by_layer, "Error of layers", _LAYERS_NOTE)
    parts += [section("Error by timestep", steps), section("Error by layer", layers)]
    if report.policy is not None:
        drawing = picture(report.policy, "Activation bits by layer and timestep", _POLICY_NOTE)
        average = report.averages["activation_bits"]
        parts.append(section(f"Policy, {average:.3f} activation bits on average", drawing))
    parts.append(section("Layers", layer_table(report.layers)))
    parts.append(section("How to read this", bullets((*_READING, *report.notes))))
    return parts


def _summary(report: PTQReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    times = ", ".join(f"{name} {duration(value)}" for name, value in report.seconds.items())
    text = (
        f"{report.model} quantized after training by {report.method}. Calibrated on "
        f"{report.calibration}; images drawn by {report.sampling}; seed {report.seed}. {times}, on "
        f"{report.hardware} with {versions}."
    )
    return paragraph(text, "summary")


def _scores(report: PTQReport) -> str:
    averages, rows = report.averages, []
    if report.trajectory_error is not None:
        rows.append(Score("Trajectory error, lower is better", None, report.trajectory_error))
    rows.append(Score("Output error on recorded calls", None, report.output_error))
    rows += report.scores
    for label, name in _BITS:
        rows.append(Score(label, None, averages[name], ".3f"))
    header = ("", "Float", "Quantized", "Quantized / float")
    return table(header, map(_score_row, rows))


def _score_row(score: Score) -> tuple[str, ...]:
    after = format(score.after, score.form)
    if score.before is None:
        return score.label, "–", after, "–"
    ratio = f"{score.after / score.before:.3g}" if score.before else "–"
    return score.label, format(score.before, score.form), after, ratio


_BITS = (
    ("Weight bits, mean over layers", "weight_bits"),
    ("Effective weight bits, scales and branches included", "effective_weight_bits"),
    ("Activation bits, mean over layers and timesteps", "activation_bits"),
    ("Activation bits, weighted by operations", "activation_bits_by_macs"),
)
_SAMPLES_NOTE = "The same noise and the same labels or prompts on both sides, image by image."
_STEPS_NOTE = (
    "Squared norm of the difference over the squared norm of the float model's: of single calls of "
    "the model and, where the sampler's path was followed, of the images so far."
)
_LAYERS_NOTE = (
    "Each layer's own output error in the quantized model: a float layer is given the same input. "
    "What earlier layers did wrong does not count here."
)
_POLICY_NOTE = (
    "Activation bits of every layer at every timestep of the search. Weights are the same at all "
    "timesteps. Between two timesteps, and for another number of steps, the nearest one counts."
)
_READING = (
    "Trajectory error: both models start from the same noise and each follows its own images; the "
    "mean over steps of the squared distance between them over the squared norm of the float "
    "model's. It sees small changes of an image long before a score of quality does.",
    "Arithmetic is simulated: weights are stored in integer codes, but they and the activations "
    "are turned into floats on their grids and multiplied in floating point. Bits and bytes are "
    "those of what is stored; nothing here says how fast an integer kernel would be.",
    "Simulated too: scales are rounded to 16 bits as they are stored, activations are rounded "
    "token by token as they come. Layers that are not in the table, softmax, norms and the sums "
    "between blocks stay in floating point.",
    "Errors in the last column of the table were measured in calibration, with float inputs from "
    "quantized blocks before; those in the picture by layer in the finished model.",
)
