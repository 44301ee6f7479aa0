"""The report of a run: one HTML page with everything inside it, no scripts and no network."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import stdev

from dit_qat.dit.report.plots import Comparison, comparison_plot
from dit_qat.export.files import written_whole

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
    page = _page(report)
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _page(report: Report) -> str:
    sections = [
        f"<h1>{escape(report.title)}</h1>",
        _summary(report),
        _section("Scores", _headline(report)),
        _section("Samples", _picture(report.samples, "Samples of both models", _SAMPLES_NOTE)),
        _section("Training", _picture(report.loss, "Loss over training steps", _LOSS_NOTE)),
    ]
    if report.bit_map is not None:
        picture = _picture(report.bit_map, "Activation bits of layers", _BIT_MAP_NOTE)
        sections.append(_section(f"Bit map, {report.average_bits:.3f} bits on average", picture))
    if report.sensitivity is not None:
        picture = _picture(report.sensitivity, "Sensitivity of layers", _SENSITIVITY_NOTE)
        sections.append(_section("Sensitivity of layers", picture))
    if report.ablation is not None:
        sections.append(_section("Baselines", _ablation(report.ablation)))
    sections.append(_section("How to read this", _reading(report)))
    return _FRAME.format(title=escape(report.title), style=_STYLE, body="\n".join(sections))


def _summary(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    text = (
        f"{report.method}: ternary weights and {report.bits:g}-bit activations, "
        f"{report.steps:,} steps of quantization-aware training from the float model, seed "
        f"{report.seed}; {_samples(report):,} samples per model ({report.sampling}); "
        f"{_duration(report.seconds)} on {report.hardware} with {versions}."
    )
    return f'<p class="summary">{escape(text)}</p>'


def _samples(report: Report) -> int:
    return int(_score(report.quantized_scores, "num_samples"))


def _score(scores: Mapping[str, float], name: str) -> float:
    if name not in scores:
        raise ValueError(
            f"the scores have no {name!r}, only {', '.join(scores) or 'nothing'}; pass what "
            "evaluate_digits returns"
        )
    return scores[name]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
        sizes = (report.packed[key] / 1e6 for key in ("float32_bytes", "bytes"))
        rows.append(_headline_row("Size of the file, MB", *sizes, ".2f"))
    table = _table(("", "Float", "Quantized", "Quantized / float"), rows)
    return table if report.packed is None else table + _pixels(report.packed)


def _pixels(packed: Mapping[str, float]) -> str:
    text = (
        "The packed model, which multiplies integers, was run as well: "
        f"{packed['pixels_equal']:.4%} of the pixels it draws are those of the trained network."
    )
    return f'<p class="note">{escape(text)}</p>'


def _headline_row(label: str, before: float, after: float, form: str) -> tuple[str, ...]:
    ratio = f"{after / before:.2f}" if before else "–"
    return label, format(before, form), format(after, form), ratio


def _ablation(table: Comparison) -> str:
    rows = []
    for row in table.rows:
        spread = f"{stdev(row.fd_digits):.1f}" if len(row.fd_digits) > 1 else "–"
        seeds = f"{len(row.fd_digits)}"
        rows.append((row.method, f"{row.bits:g}", f"{row.mean:.1f}", spread, seeds))
    header = ("Method", "Bits", "FD-digits", "Standard deviation", "Seeds")
    picture = _picture(comparison_plot(table), "FD-digits by method and bits", _ABLATION_NOTE)
    return picture + _table(header, rows)


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
    return "<ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"


def _picture(png: bytes, name: str, note: str) -> str:
    source = f"data:image/png;base64,{b64encode(png).decode('ascii')}"
    return (
        f'<figure><img src="{source}" alt="{escape(name)}">'
        f"<figcaption>{escape(note)}</figcaption></figure>"
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(_table_row(row) for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _table_row(row: Iterable[str]) -> str:
    first, *rest = row
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
    return f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'


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

_FRAME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """\
:root { color-scheme: light dark; --page: #fff; --ink: #222; --faint: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e4e4e2; --faint: #a0a4a8; --line: #3a3e43; }
}
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 760px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
.summary { margin: 0; color: var(--faint); overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); font-size: .85rem; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 400; }
figure { margin: 0 0 1rem; }
p.note { margin: .6rem 0 0; }
img { display: block; box-sizing: border-box; width: 100%; height: auto; background: #fff; }
figcaption { margin-top: .4rem; color: var(--faint); font-size: .85rem; }
ul { margin: 0; padding-left: 1.1rem; }
li { margin-bottom: .4rem; }
@media (prefers-color-scheme: dark) { img { padding: .6rem; border-radius: 6px; } }
@media print {
  :root { color-scheme: light; --page: #fff; --ink: #000; --faint: #444; --line: #bbb; }
  main { max-width: none; padding: 0; }
  img { padding: 0; max-height: 22cm; object-fit: contain; object-position: left; }
  figure, table, li { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""
