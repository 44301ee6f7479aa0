"""Every method of post-training quantization on one model: the table of docs/ptq.md.

Each method at its own published granularity, all on the same recorded calls; effective bits stand
beside the nominal ones, ``seconds`` are the processor's. Each cell is kept as one JSON file and is
not repeated, so the tool can be stopped, continued, and shared by processes with disjoint
``--methods`` or ``--bits``; ``--report`` writes the table only.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit_qat.allocation import allocate_bits
from dit_qat.calibration import CallStore, RunResult
from dit_qat.calibration.table import average_bits, bits_table
from dit_qat.dit.evaluation.images import image_grid, save_png
from dit_qat.dit.experiment import score
from dit_qat.dit.methods import (
    CLQ,
    GPTQ,
    RTN,
    AdaTSQ,
    DuQuant,
    PTQ4DiT,
    QDiT,
    QuaRot,
    SmoothQuant,
    SVDQuant,
    ViDiTQ,
)
from dit_qat.dit.methods.adatsq import Policy, WeightSettings
from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.ptq import (
    PTQMethod,
    Trajectory,
    calibrate_dit,
    float_trajectory,
    quantize_post_training,
    trajectory_error,
)
from dit_qat.dit.ptq.evaluation import output_errors
from dit_qat.dit.randomness import derive_seed
from dit_qat.dit.report.plots_policy import policy_plot
from dit_qat.dit.sampling import SamplerConfig
from dit_qat.layers import IntLinear

BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w3a3": (3, 3)}
CHOICES = (3, 4, 8)
MIXED = 3.1


def _methods() -> dict[str, Callable[[int, int], PTQMethod]]:
    def plain(kind: Callable[..., PTQMethod], **settings: Any) -> Callable[[int, int], PTQMethod]:
        return lambda w, a: kind(weight_bits=w, activation_bits=a, **settings)

    return {
        "rtn": plain(RTN),
        "smoothquant": plain(SmoothQuant),
        "quarot": plain(QuaRot),
        "gptq": plain(GPTQ),
        "q_dit": plain(QDiT),
        "ptq4dit": plain(PTQ4DiT),
        "vidit_q": plain(ViDiTQ),
        "duquant": plain(DuQuant),
        "svdquant": plain(SVDQuant),
        "svdquant-gptq": plain(SVDQuant, rounding="gptq"),
        "clq": plain(CLQ),
        "clq-exact": plain(CLQ, preset="exact"),
        "adatsq": lambda w, a: adatsq(w, a),
        "adatsq-spread": lambda w, a: adatsq(w, a, keep="spread"),
    }


METHODS = _methods()


def adatsq(weight_bits: int, average_bits: float, **settings: Any) -> AdaTSQ:
    weights = WeightSettings(bits=weight_bits)
    return AdaTSQ(average_bits=average_bits, weights=weights, **settings)


@dataclass(frozen=True)
class Bench:
    """What all methods share."""

    model: DiT
    sampler: SamplerConfig
    store: CallStore
    search: Trajectory
    judged: Trajectory
    path: list[torch.Tensor]

    @classmethod
    def of(cls, model: DiT, sampler: SamplerConfig, images: int) -> "Bench":
        store = calibrate_dit(model, sampler, images=images)
        # The search looks at other images than those that a method is judged on.
        elsewhere = replace(sampler, seed=derive_seed(sampler.seed, "search"))
        judged = Trajectory(model, sampler, images=images)
        search = Trajectory(model, elsewhere, images=min(images, 32))
        return cls(model, sampler, store, search, judged, float_trajectory(judged, model))

    def quantized(self, method: PTQMethod) -> RunResult:
        model = copy.deepcopy(self.model)
        return quantize_post_training(
            model, method, self.store, trajectory=self.search, seed=self.sampler.seed
        )

    def error(self, model: DiT) -> float:
        return trajectory_error(self.path, self.judged.run(model))


def run_cell(bench: Bench, name: str, cell: str, samples: int, out: Path) -> dict[str, Any]:
    weight_bits, activation_bits = BITS[cell]
    started = time.process_time()
    result = bench.quantized(METHODS[name](weight_bits, activation_bits))
    seconds = time.process_time() - started
    return measured(
        bench, result.model, result.averages, seconds, samples, out / f"{name}_{cell}.png"
    )


def run_mixed(bench: Bench, name: str, samples: int, out: Path) -> dict[str, Any]:
    """Three-bit weights and 3.1 activation bits on average: by step and layer, or by layer only."""
    started = time.process_time()
    if name == "adatsq":
        result = bench.quantized(adatsq(3, MIXED))
        model, averages = result.model, result.averages
        if "policy" in result.report:
            png = policy_plot(Policy.from_dict(result.report["policy"], "the report"))
            (out / f"adatsq_w3a{MIXED}_policy.png").write_bytes(png)
    else:
        result = bench.quantized(SVDQuant(weight_bits=3, activation_bits=3))
        model = result.model
        best_fixed_mix_(bench, model)
        names = [row.name for row in result.table]
        averages = average_bits(bits_table(model, names, result.layers))
    seconds = time.process_time() - started
    return measured(bench, model, averages, seconds, samples, out / f"{name}_w3a{MIXED}.png")


def best_fixed_mix_(bench: Bench, model: DiT) -> None:
    """Raise layers where that lowers the searched path's error most, exactly within the budget."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, IntLinear)}
    reference = float_trajectory(bench.search, bench.model)
    rows = []
    for name, layer in layers.items():
        row = []
        for bits in CHOICES:
            model.set_submodule(
                name, layer.with_activation(layer.config.activation.with_bits(bits))
            )
            row.append(trajectory_error(reference, bench.search.run(model)))
        model.set_submodule(name, layer)
        rows.append(row)
    found = allocate_bits(rows, [1] * len(rows), CHOICES, MIXED)
    for (name, layer), bits in zip(layers.items(), found, strict=True):
        quantizer = layer.config.activation.with_bits(int(bits))
        model.set_submodule(name, layer.with_activation(quantizer))


def measured(
    bench: Bench,
    model: DiT,
    averages: dict[str, float],
    seconds: float,
    samples: int,
    picture: Path,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "trajectory_error": bench.error(model),
        "output_error": output_errors(model, bench.model, bench.store).output,
        "average_bits": averages["activation_bits"],
        "average_bits_by_operations": averages["activation_bits_by_macs"],
        "weight_bits": averages["weight_bits"],
        "effective_weight_bits": averages["effective_weight_bits"],
        "seconds": seconds,
    }
    if samples:
        scored = score(model, bench.sampler, samples)
        found |= scored.scores
        save_png(picture, image_grid(scored.images[:100], columns=10, scale=4))
    return found


def run_float(bench: Bench, samples: int, out: Path) -> dict[str, Any]:
    scored = score(bench.model, bench.sampler, samples)
    save_png(out / "float.png", image_grid(scored.images[:100], columns=10, scale=4))
    return scored.scores


def keep(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def collect(out: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "cells").glob("*.json")):
        method, _, cell = path.stem.partition("@")
        found.setdefault(method, {})[cell] = json.loads(path.read_text())
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """One row per method, in the order of the error at W4A4: trajectory error, then FD-digits."""
    cells = [*BITS, f"w3a{MIXED}"]
    lines = [
        f"| method | {' | '.join(cell.upper() for cell in cells)} | weight bits at W4, effective | "
        "processor seconds at W4A4 |",
        "|---|" + "---|" * (len(cells) + 2),
    ]
    if "float" in found:
        score = f"{found['float']['float']['fd_digits']:.2f}"
        lines.append(f"| float | {' | '.join([f'0 · {score}'] * len(BITS))} | | 32 | |")
    for name in _by_error(found):
        runs = found[name]
        row = [_errors(runs[cell]) if cell in runs else "" for cell in cells]
        some = runs.get("w4a4")
        row += (
            ["", ""]
            if some is None
            else [f"{some['effective_weight_bits']:.2f}", f"{some['seconds']:.0f}"]
        )
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def seeds_table(seeds: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Trajectory errors of all seeds, of what every seed has."""
    cells = [*BITS, f"w3a{MIXED}"]
    shared = [c for c in cells if all(any(c in runs for runs in s.values()) for s in seeds)]
    lines = [
        f"| method | {' | '.join(c.upper() for c in shared)} |",
        "|---|" + "---|" * len(shared),
    ]
    for name in _by_error(seeds[0]):
        row = [
            ", ".join(f"{seed[name][c]['trajectory_error']:.2g}" for seed in seeds)
            if all(c in seed.get(name, {}) for seed in seeds)
            else ""
            for c in shared
        ]
        if any(row):
            lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _by_error(found: dict[str, dict[str, Any]]) -> list[str]:
    def error(name: str) -> float:
        runs = found[name]
        return float(runs.get("w4a4", next(iter(runs.values())))["trajectory_error"])

    return sorted((name for name in found if name != "float"), key=error)


def _errors(run: dict[str, Any]) -> str:
    score = f" · {run['fd_digits']:.2f}" if "fd_digits" in run else ""
    return f"{run['trajectory_error']:.2g}{score}"


def write_report(out: Path, beside: Sequence[Path]) -> None:
    found = collect(out)
    written = table(found)
    if beside:
        written += "\n" + seeds_table([found, *(collect(other) for other in beside)])
    (out / "table.md").write_text(written)
    (out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    print(written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_ptq"))
    parser.add_argument("--model", default="digits", help="a float DiT, as load_dit takes it")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    cells = [*BITS, f"w3a{MIXED}"]
    parser.add_argument("--bits", nargs="+", default=cells, choices=cells)
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--images", type=int, default=64, help="to calibrate and to judge on")
    parser.add_argument("--samples", type=int, default=1797, help="for FD-digits; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that is sampled from")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument(
        "--beside", type=Path, nargs="*", default=[], help="folders of other seeds, for the table"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (arguments.out / "cells").mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        run_all(arguments)
    write_report(arguments.out, arguments.beside)


def run_all(arguments: argparse.Namespace) -> None:
    model = load_dit(arguments.model).eval().requires_grad_(False)
    seed, steps = arguments.seed, arguments.steps
    sampler = SamplerConfig(kind="ddim", steps=steps, batch_size=300, seed=seed)
    bench = Bench.of(model, sampler, arguments.images)
    out, samples = arguments.out, arguments.samples
    wanted: dict[str, Callable[[], dict[str, Any]]] = {}
    if samples:
        wanted["float@float"] = partial(run_float, bench, samples, out)
    for cell in arguments.bits:
        for name in arguments.methods:
            if cell in BITS:
                wanted[f"{name}@{cell}"] = partial(run_cell, bench, name, cell, samples, out)
            elif name in ("adatsq", "svdquant"):
                wanted[f"{name}@{cell}"] = partial(run_mixed, bench, name, samples, out)
    for stem, act in wanted.items():
        path = out / "cells" / f"{stem}.json"
        if not path.exists():
            found = act()
            keep(path, found)
            print(stem, {k: round(v, 5) for k, v in found.items()}, flush=True)


if __name__ == "__main__":
    main()
