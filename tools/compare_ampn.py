"""Uniform two bits against AMPN at two bits on average, on digits: the table of docs/ampn.md.

Each run is kept as one JSON file and is not repeated, so the tool can be stopped, continued, and
shared by processes with disjoint ``--seeds`` or ``--methods``; ``--report`` writes the table
only. One draw of 1,797 samples scores about 1 FD more or less than the next, so that every model is
scored on several (``--draws``). Beside FD-digits it measures the error of the predicted noise
against the float model, over all digits at 16 timesteps: it varies far less from seed to seed.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation.images import image_grid, save_png
from dit_qat.dit.evaluation.sensitivity import output_error
from dit_qat.dit.experiment import Recipe, digits_sampler, score, train_quantized
from dit_qat.dit.methods import AMPN, Method, RobuQ
from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.training.allocation import BIT_MAP, PICTURE
from dit_qat.dit.training.loading import load_checkpoint
from dit_qat.export.inspect import describe

RANK = 4
BITS = 2
ERROR_SEED, ERROR_TIMESTEPS = 99, 16
DRAW_STRIDE = 1000


def ampn(steps: int, **changed: Any) -> Method:
    """As ``dit-qat demo --ampn`` has it: a sixth of the steps is warm-up."""
    settings = {"warmup_steps": max(1, steps // 6), "score": "local_gradient"} | changed
    return AMPN(average_bits=BITS, rank=RANK, **settings)


METHODS: dict[str, Callable[[int], Method]] = {
    "uniform": lambda steps: RobuQ(activation_bits=BITS, rank=RANK),
    "ampn": ampn,
    "ampn-output": lambda steps: ampn(steps, score="output"),
    # What is the allocation's share, and what that of a warm-up at more bits?
    "uniform-after-warm-up": lambda steps: ampn(steps, choices=(BITS,), activation_bits=4),
    "ampn-warm-up-at-2": lambda steps: ampn(steps, activation_bits=2),
}


def teacher_error(network: DiT) -> float:
    images, labels = digit_images()
    return output_error(
        network.eval(),
        load_dit("digits").eval(),
        images,
        labels,
        ERROR_SEED,
        ERROR_TIMESTEPS,
    )


def run_method(name: str, seed: int, steps: int, samples: int, out: Path) -> dict[str, Any]:
    folder = out / "training" / f"{name}_s{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    module, curve = train_quantized(METHODS[name](steps), Recipe(steps=steps), seed, folder)
    found: dict[str, Any] = {"method": name, "seed": seed, "steps": steps}
    if (folder / BIT_MAP).exists():
        found["bit_map"] = json.loads((folder / BIT_MAP).read_text())
        shutil.copy(folder / PICTURE, out / f"{name}_s{seed}_bits.png")
    scored = score(module.network, digits_sampler(seed), samples)
    save_png(out / f"{name}_s{seed}.png", image_grid(scored.images[:100], columns=10, scale=4))
    return {
        **found,
        "last_losses": statistics.mean(curve[1][-50:]),
        "average_bits": describe(module.network).average_activation_bits,
        "output_error": teacher_error(module.network),
        **scored.scores,
        "fd_draws": [scored.scores["fd_digits"]],
    }


def draw_again(run: dict[str, Any], draws: int, samples: int, out: Path) -> bool:
    """Score a trained model on further draws; whether that was needed."""
    found = run.setdefault("fd_draws", [run["fd_digits"]])
    if len(found) >= draws:
        return False
    folder = out / "training" / f"{run['method']}_s{run['seed']}"
    network = load_checkpoint(folder / "checkpoints" / "last.ckpt").network
    for draw in range(len(found), draws):
        sampler = digits_sampler(run["seed"] + DRAW_STRIDE * draw)
        found.append(score(network, sampler, samples).scores["fd_digits"])
    return True


def keep(path: Path, run: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(run, indent=2) + "\n")
    temporary.replace(path)


def collect(out: Path) -> dict[str, list[dict[str, Any]]]:
    cells: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((out / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        cells.setdefault(run["method"], []).append(run)
    return cells


def table(cells: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| method | average bits | FD-digits, mean (each) | output error, mean (each) | "
        "class accuracy | mean bits: proj, qkv, fc1, fc2 |",
        "|---|---|---|---|---|---|",
    ]
    for method in sorted(cells, key=[*METHODS].index):
        runs = sorted(cells[method], key=lambda run: run["seed"])
        fd = [statistics.mean(run.get("fd_draws", [run["fd_digits"]])) for run in runs]
        error = [run["output_error"] for run in runs]
        types = [run["bit_map"]["mean_by_type"].values() for run in runs if "bit_map" in run]
        means = ", ".join(f"{statistics.mean(kind):.2f}" for kind in zip(*types, strict=True))
        accuracy = statistics.mean(run["class_accuracy"] for run in runs)
        lines.append(
            f"| {method} | {runs[0]['average_bits']:.3f} | {statistics.mean(fd):.2f} "
            f"({', '.join(f'{value:.2f}' for value in fd)}) | {statistics.mean(error):.5f} "
            f"({', '.join(f'{value:.5f}' for value in error)}) | {accuracy:.3f} | "
            f"{means or 'all 2'} |"
        )
    return "\n".join(lines) + "\n"


def write_report(out: Path) -> None:
    cells = collect(out)
    (out / "table.md").write_text(table(cells))
    print(table(cells))
    runs = [run for cell in cells.values() for run in cell]
    (out / "metrics.json").write_text(json.dumps(runs, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_ampn"))
    parser.add_argument("--methods", nargs="+", default=["uniform", "ampn"], choices=[*METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--draws", type=int, default=4, help="times so many samples are drawn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = arguments.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    wanted = [(method, seed) for seed in arguments.seeds for method in arguments.methods]
    for method, seed in [] if arguments.report else wanted:
        path = runs / f"{method}_s{seed}.json"
        if path.exists():
            found = json.loads(path.read_text())
        else:
            found = run_method(method, seed, arguments.steps, arguments.samples, arguments.out)
            keep(path, found)
        if draw_again(found, arguments.draws, arguments.samples, arguments.out):
            keep(path, found)
        print(
            f"{path.stem}: FD-digits {statistics.mean(found['fd_draws']):.2f}, output error "
            f"{found['output_error']:.5f}",
            flush=True,
        )
    if collect(arguments.out):
        write_report(arguments.out)


if __name__ == "__main__":
    main()
