"""The report of a run: one HTML page with everything inside it, no scripts and no network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import stdev

from dit_qat.dit.report.plots import Comparison, comparison_plot
from dit_qat.export.files import written_whole
from dit_qat.report.page import bullets, duration, page, paragraph, picture, section, table

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """What the page shows; pictures are PNG bytes as the functions of ``plots`` return them.

    Attributes:
        title: Heading of the page.
        method: Name of the quantization method.
        bits: Activation bits that were asked for.
        steps: Optimizer steps of quantization-aware training.
        seed: Seed of the run.
        seconds: How long everything took.
        hardware: What it ran on, in words.
        versions: Version by package.
        sampling: How samples were drawn, in words, such as ``DDIM, 50 steps, guidance 1.5``.
        float_scores: Scores of the float model, as ``evaluate_digits`` returns them.
        quantized_scores: Those of the quantized model.
        average_bits: Mean activation bits of the quantized layers.
        effective_weight_bits: Stored bits per weight, scales and branches included.
        packed: ``bytes`` of the packed model, ``float32_bytes`` of the float one, and the share
            ``pixels_equal`` of pixels that it draws as the trained one does; None if not packed.
        samples: Samples of both models.
        loss: Loss curves.
        sensitivity: Heat map of layer sensitivities, if measured.
        bit_map: Bits allocated by layer, where they were.
        ablation: FD-digits of the baselines, if they were trained.
        fd_floor: FD-digits between which perfect samples would lie nine times out of ten: 5 % and
            95 % quantiles over 200 bootstrap samples of the real images.
    """

    title: str
    method: str
    bits: float
    steps: int
    seed: int
    seconds: float
    hardware: str
    versions: Mapping[str, str]
    sampling: str
    float_scores: Mapping[str, float]
    quantized_scores: Mapping[str, float]
    average_bits: float
    effective_weight_bits: float
    packed: Mapping[str, float] | None
    samples: bytes = field(repr=False)
    loss: bytes = field(repr=False)
    sensitivity: bytes | None = field(default=None, repr=False)
    bit_map: bytes | None = field(default=None, repr=False)
    ablation: Comparison | None = None
    fd_floor: tuple[float, float] = (2.6, 4.9)


def write_report(path: Path, report: Report) -> None:
    """Write the page under its final name only, replacing an earlier one.

    Raises:
        ValueError: Scores without ``fd_digits`` or ``num_samples``, or an ablation without rows.
    """
    text = _page(report)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _page(report: Report) -> str:
    sections = [
        f"<h1>{escape(report.title)}</h1>",
        _summary(report),
        section("Scores", _headline(report)),
        section("Samples", picture(report.samples, "Samples of both models", _SAMPLES_NOTE)),
        section("Training", picture(report.loss, "Loss over training steps", _LOSS_NOTE)),
    ]
    if report.bit_map is not None:
        drawing = picture(report.bit_map, "Activation bits of layers", _BIT_MAP_NOTE)
        sections.append(section(f"Bit map, {report.average_bits:.3f} bits on average", drawing))
    if report.sensitivity is not None:
        drawing = picture(report.sensitivity, "Sensitivity of layers", _SENSITIVITY_NOTE)
        sections.append(section("Sensitivity of layers", drawing))
    if report.ablation is not None:
        sections.append(section("Baselines", _ablation(report.ablation)))
    sections.append(section("How to read this", _reading(report)))
    return page(report.title, sections)


def _summary(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    text = (
        f"{report.method}: ternary weights and {report.bits:g}-bit activations, "
        f"{report.steps:,} steps of quantization-aware training from the float model, seed "
        f"{report.seed}; {_samples(report):,} samples per model ({report.sampling}); "
        f"{duration(report.seconds)} on {report.hardware} with {versions}."
    )
    return paragraph(text, "summary")


def _samples(report: Report) -> int:
    return int(_score(report.quantized_scores, "num_samples"))


def _score(scores: Mapping[str, float], name: str) -> float:
    if name not in scores:
        raise ValueError(
            f"the scores have no {name!r}, only {', '.join(scores) or 'nothing'}; pass what "
            "evaluate_digits returns"
        )
    return scores[name]


def _headline(report: Report) -> str:
    before, after = report.float_scores, report.quantized_scores
    fd = _score(before, "fd_digits"), _score(after, "fd_digits")
    rows = [_headline_row("FD-digits, lower is better", *fd, ".1f")]
    shares = {
        "precision": "Precision",
        "recall": "Recall",
        "class_accuracy": "Class accuracy",
    }
    for name, label in shares.items():
        if name in before and name in after:
            rows.append(_headline_row(label, before[name], after[name], ".3f"))
    rows.append(_headline_row("Average activation bits", 32, report.average_bits, ".3g"))
    rows.append(_headline_row("Effective weight bits", 32, report.effective_weight_bits, ".3g"))
    if report.packed is not None:
        sizes = [report.packed[key] / 1e6 for key in ("float32_bytes", "bytes")]
        rows.append(_headline_row("Size of the file, MB", sizes[0], sizes[1], ".2f"))
    scores = table(("", "Float", "Quantized", "Quantized / float"), rows)
    return scores if report.packed is None else scores + _pixels(report.packed)


def _pixels(packed: Mapping[str, float]) -> str:
    text = (
        "The packed model, which multiplies integers, was run as well: "
        f"{packed['pixels_equal']:.4%} of the pixels it draws are those of the trained network."
    )
    return paragraph(text, "note")


def _headline_row(label: str, before: float, after: float, form: str) -> tuple[str, ...]:
    ratio = f"{after / before:.2f}" if before else "–"
    return label, format(before, form), format(after, form), ratio


def _ablation(compared: Comparison) -> str:
    rows = []
    for row in compared.rows:
        spread = f"{stdev(row.fd_digits):.1f}" if len(row.fd_digits) > 1 else "–"
        seeds = f"{len(row.fd_digits)}"
        rows.append((row.method, f"{row.bits:g}", f"{row.mean:.1f}", spread, seeds))
    header = ("Method", "Bits", "FD-digits", "Standard deviation", "Seeds")
    drawing = picture(comparison_plot(compared), "FD-digits by method and bits", _ABLATION_NOTE)
    return drawing + table(header, rows)


def _reading(report: Report) -> str:
    low, high = report.fd_floor
    points = (
        "FD-digits is no FID: it is a squared Fréchet distance between features of a small digit "
        "classifier, and compares with nothing but other FD-digits of as many samples.",
        f"It does not reach zero: perfect samples, 1,797 drawn anew from the real images, score "
        f"{low:.1f} to {high:.1f} nine times out of ten. Differences of 1 to 2 are noise; trust "
        "larger ones, or the mean of several seeds.",
        "Precision is the share of samples among the real images in feature space, recall the "
        "share of real images among the samples, class accuracy the share of samples that the "
        "classifier takes for the digit asked for.",
        "Arithmetic is simulated: weights and activations are rounded to their low-bit grids "
        "(fake-quantized) and multiplied in floating point. Training keeps the float latents of "
        "the weights, so times here say nothing about the speed of packed weights.",
        "Effective weight bits count what a packed model would store for the quantized layers, "
        "scales and low-rank branches included.",
    )
    return bullets(points)


_SAMPLES_NOTE = "The same noise and the same labels on both sides, image by image."
_LOSS_NOTE = "Loss on training batches: every step faint, a running mean on top."
_SENSITIVITY_NOTE = (
    "Normalised error of the model's predicted noise when one layer alone gets other activation "
    "bits. Outlined: the bits that the layer has."
)
_BIT_MAP_NOTE = (
    "Measured after the warm-up: how much the error of the predicted noise grows when one layer "
    "alone goes from its best choice to these bits. Framed: what the allocation chose, the least "
    "sum within the budget."
)
_ABLATION_NOTE = "Bars are means over seeds, dots single seeds, the dashed line the float model."
