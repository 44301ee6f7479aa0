"""Train and score every method on digits, over bits and seeds: the table of docs/robuq.md.

Each run is kept as one JSON file and is not repeated, so the tool can be stopped, continued, and
shared by processes with disjoint ``--seeds`` or ``--bits``; ``--report`` writes table and pictures.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dit_qat.dit.evaluation.images import image_grid, save_png
from dit_qat.dit.experiment import Recipe, digits_sampler, score, train_quantized
from dit_qat.dit.methods import BitNetV2, Method, MinMax, RobuQ
from dit_qat.dit.models import load_dit
from dit_qat.dit.report import Comparison, ComparisonRow, comparison_plot
from dit_qat.export.inspect import describe

RANK = 4
METHODS: dict[str, Callable[[int], Method]] = {
    "robuq": lambda bits: RobuQ(preset="exact", activation_bits=bits, rank=RANK),
    "robuq-paper": lambda bits: RobuQ(preset="paper", activation_bits=bits, rank=RANK),
    "minmax": lambda bits: MinMax(activation_bits=bits, rank=RANK),
    "minmax-signs": lambda bits: MinMax(activation_bits=bits, rank=RANK, signs=True),
    "bitnet_v2": lambda bits: BitNetV2(activation_bits=bits),
    # What is the grid's share, and what the teacher's?
    "robuq-no-teacher": lambda bits: RobuQ(activation_bits=bits, rank=RANK, distillation=0.0),
    "minmax-signs-teacher": lambda bits: MinMax(
        activation_bits=bits, rank=RANK, signs=True, distillation=5.0
    ),
}


def run_float(seed: int, samples: int, out: Path) -> dict[str, Any]:
    scored = score(load_dit("digits").eval(), digits_sampler(seed), samples)
    save_png(out / f"float_s{seed}.png", image_grid(scored.images[:100], columns=10, scale=4))
    return {"method": "float", "bits": 32, "seed": seed, **scored.scores}


def run_method(
    name: str, bits: int, seed: int, steps: int, samples: int, out: Path
) -> dict[str, Any]:
    folder = out / "training" / f"{name}_a{bits}_s{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    module, curve = train_quantized(METHODS[name](bits), Recipe(steps=steps), seed, folder)
    scored = score(module.network, digits_sampler(seed), samples)
    picture = image_grid(scored.images[:100], columns=10, scale=4)
    save_png(out / f"{name}_a{bits}_s{seed}.png", picture)
    model = describe(module.network)
    return {
        "method": name,
        "bits": bits,
        "seed": seed,
        "steps": steps,
        "last_losses": statistics.mean(curve[1][-50:]),
        "average_bits": model.average_activation_bits,
        "effective_weight_bits": model.effective_weight_bits,
        **scored.scores,
    }


def collect(out: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted((out / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        cells.setdefault((run["method"], run["bits"]), []).append(run)
    return cells


def table(cells: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    reference = statistics.mean(run["fd_digits"] for run in cells["float", 32])
    lines = [
        "| method | bits | seeds | FD-digits, mean (each) | x float | precision | recall | "
        "class accuracy | effective weight bits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, bits), runs in sorted(cells.items(), key=lambda cell: (-cell[0][1], cell[0][0])):
        each = [run["fd_digits"] for run in runs]
        means = {
            key: statistics.mean(run[key] for run in runs)
            for key in ("fd_digits", "precision", "recall", "class_accuracy")
        }
        weight = runs[0].get("effective_weight_bits")
        lines.append(
            f"| {method} | {'W32A32' if bits == 32 else f'W1.58A{bits}'} | {len(runs)} | "
            f"{means['fd_digits']:.2f} ({', '.join(f'{value:.2f}' for value in each)}) | "
            f"{means['fd_digits'] / reference:.2f} | {means['precision']:.3f} | "
            f"{means['recall']:.3f} | {means['class_accuracy']:.3f} | "
            f"{'32' if weight is None else f'{weight:.2f}'} |"
        )
    return "\n".join(lines) + "\n"


def write_report(out: Path) -> None:
    cells = collect(out)
    (out / "table.md").write_text(table(cells))
    print(table(cells))
    rows = tuple(
        ComparisonRow(method, bits, tuple(run["fd_digits"] for run in runs))
        for (method, bits), runs in cells.items()
        if method != "float"
    )
    reference = statistics.mean(run["fd_digits"] for run in cells["float", 32])
    if rows:
        (out / "comparison.png").write_bytes(comparison_plot(Comparison(rows, reference)))
    runs = [run for cell in cells.values() for run in cell]
    (out / "metrics.json").write_text(json.dumps(runs, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_digits"))
    parser.add_argument(
        "--methods", nargs="+", default=["float", *METHODS], choices=["float", *METHODS]
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write table and pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = arguments.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    wanted = [
        (method, bits, seed)
        for method in arguments.methods
        for bits in ([32] if method == "float" else arguments.bits)
        for seed in arguments.seeds
    ]
    for method, bits, seed in [] if arguments.report else wanted:
        path = runs / f"{method}_a{bits}_s{seed}.json"
        if path.exists():
            continue
        if method == "float":
            result = run_float(seed, arguments.samples, arguments.out)
        else:
            result = run_method(
                method, bits, seed, arguments.steps, arguments.samples, arguments.out
            )
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{path.stem}: FD-digits {result['fd_digits']:.2f}", flush=True)
    if collect(arguments.out).get(("float", 32)):
        write_report(arguments.out)


if __name__ == "__main__":
    main()
