"""Every method for language models on one model: the table and the picture of docs/llm.md.

Each method is calibrated on windows of one text and judged by perplexity on another, for every
seed of the windows. What is quantized is packed, loaded again and compared with what is in memory.
``seconds`` are the processor's. Each cell is kept as one JSON file and not repeated, so the tool
can be stopped, continued, and shared by processes with disjoint ``--methods``; ``--report`` writes
table, picture and ``metrics.json`` only.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dit_qat.calibration import Method
from dit_qat.export.files import write_json, written_whole
from dit_qat.llm.data import calibration_windows, evaluation_windows
from dit_qat.llm.evaluation.perplexity import perplexity
from dit_qat.llm.hf.folder import save_quantized
from dit_qat.llm.methods import (
    ARB,
    AWQ,
    GPTAQ,
    GPTQ,
    PBLLM,
    PBS2P,
    PT2,
    RTN,
    STBLLM,
    BiLLM,
    D2Quant,
    SliM,
)
from dit_qat.llm.models import load_llm
from dit_qat.llm.models.checks import window_length
from dit_qat.llm.models.loading import LoadedLLM
from dit_qat.llm.quantize import quantize_llm
from dit_qat.llm.report import Point, perplexity_plot

SPARSITIES = (4, 5, 6)  # kept of eight
SHARED = ("model", "calibration", "evaluation", "window", "windows", "judged")  # of all cells

_BARE: dict[str, Any] = {"fitting": False, "alignment": False, "compensated": False}


def _binary() -> dict[str, Callable[[], Method]]:
    found: dict[str, Callable[[], Method]] = {
        "rtn_1bit": lambda: RTN(bits=1),
        "pb_llm": lambda: PBLLM(preset="paper"),
        "pb_llm_exact": lambda: PBLLM(preset="exact"),
        "billm": lambda: BiLLM(preset="paper"),
        "billm_exact": lambda: BiLLM(preset="exact"),
    }
    for variant in ("arb", "arb_x", "arb_rc"):
        for preset in ("paper", "exact"):
            for cgb in (False, True):
                name = variant + ("_cgb" if cgb else "") + ("_exact" if preset == "exact" else "")
                found[name] = lambda v=variant, p=preset, c=cgb: ARB(  # type: ignore[misc]
                    variant=v, preset=p, cgb=c
                )
    for variant in ("arb_x", "arb_rc"):
        found[f"{variant}_cgb_4groups"] = lambda v=variant: ARB(  # type: ignore[misc]
            variant=v, preset="paper", groups=4
        )
    return found


def _sparse() -> dict[str, Callable[[], Method]]:
    found: dict[str, Callable[[], Method]] = {}
    for kept in SPARSITIES:
        for name, kind in (("stbllm", STBLLM), ("pbs2p", PBS2P)):
            for preset in ("paper", "exact"):
                exact = "_exact" if preset == "exact" else ""
                found[f"{name}_{kept}of8{exact}"] = lambda k=kind, n=kept, p=preset: k(  # type: ignore[misc]
                    preset=p, kept=n
                )
    return found


def _ternary() -> dict[str, Callable[[], Method]]:
    return {
        "ternary_rounding": lambda: PT2(preset="paper", order="none", **_BARE),
        "pt2": lambda: PT2(preset="paper"),
        "pt2_no_itf": lambda: PT2(preset="paper", fitting=False),
        "pt2_no_aga": lambda: PT2(preset="paper", alignment=False),
        "pt2_no_ssr": lambda: PT2(preset="paper", order="none"),
        "pt2_exact": lambda: PT2(preset="exact"),
    }


def _integer() -> dict[str, Callable[[], Method]]:
    found: dict[str, Callable[[], Method]] = {}
    for bits in (2, 3):
        end = f"_{bits}bit"
        for name, kind in (("rtn", RTN), ("awq", AWQ), ("gptq", GPTQ), ("gptaq", GPTAQ)):
            found[name + end] = lambda k=kind, b=bits: k(bits=b)  # type: ignore[misc]
        found["slim" + end] = lambda b=bits: SliM(bits=b)  # type: ignore[misc]
        for name, own in (
            ("d2quant", {"preset": "paper"}),
            ("d2quant_unrotated", {"preset": "paper", "rotation": False}),
            ("d2quant_exact", {"preset": "exact"}),
        ):
            found[name + end] = lambda o=own, b=bits: D2Quant(bits=b, **o)  # type: ignore[misc]
    return found


FAMILIES = {
    "one bit": _binary(),
    "sparse binary": _sparse(),
    "ternary": _ternary(),
    "two and three bits": _integer(),
}
METHODS = {name: make for family in FAMILIES.values() for name, make in family.items()}


def orderings() -> list[tuple[str, str]]:
    """Pairs of which the first should have the higher perplexity, as the papers have it."""
    found = [("rtn_1bit", "billm"), ("billm", "arb"), ("arb", "arb_x"), ("billm", "arb_rc")]
    found += [(name, f"{name}_cgb") for name in ("arb", "arb_x", "arb_rc")]
    found += [(f"{name}_cgb", f"{name}_cgb_4groups") for name in ("arb_x", "arb_rc")]
    found += [(f"stbllm_{n}of8", f"pbs2p_{n}of8") for n in SPARSITIES]
    found += [
        (f"{a}_exact", f"{b}_exact")
        for a, b in found
        if f"{b}_exact" in METHODS and f"{a}_exact" in METHODS
    ]
    found += [(other, "pt2") for other in _ternary() if other not in ("pt2", "pt2_exact")]
    found += [("rtn_2bit", "gptq_2bit")]
    found += [("gptq_2bit", f"d2quant{preset}_2bit") for preset in ("", "_exact")]
    return found


def presets() -> list[tuple[str, str]]:
    """Every method as published, and ours, which should have no higher perplexity."""
    found = []
    for name in METHODS:
        family, _, end = name.rpartition("_")
        for exact in (f"{name}_exact", f"{family}_exact_{end}"):
            if exact in METHODS:
                found.append((name, exact))
    return found


@dataclass(frozen=True)
class Bench:
    """What all methods share.

    Attributes:
        loaded: The float model and its tokenizer.
        calibration: Windows (count, length) by seed.
        evaluation: Windows (count, length) that are judged on.
    """

    loaded: LoadedLLM
    calibration: Mapping[int, Tensor]
    evaluation: Tensor

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Bench":
        loaded = load_llm(arguments.model)
        length = window_length(loaded.model, arguments.window)
        calibration = {
            seed: calibration_windows(
                arguments.calibration, loaded.tokenizer, arguments.windows, length, seed
            )
            for seed in arguments.seeds
        }
        evaluation = evaluation_windows(
            arguments.evaluation, loaded.tokenizer, length, arguments.judged
        )
        return cls(loaded, calibration, evaluation)

    def judged(self, name: str, seed: int) -> dict[str, Any]:
        """Quantize by one method on the windows of one seed, pack, and judge."""
        model, windows = copy.deepcopy(self.loaded.model), self.calibration[seed]
        started = time.process_time()
        result = quantize_llm(model, METHODS[name](), windows, batch_size=16, seed=seed)
        seconds = time.process_time() - started
        with TemporaryDirectory() as place:
            saved = save_quantized(model, Path(place) / "packed", windows[:2])
        return {
            "perplexity": perplexity(model, self.evaluation),
            "nominal_bits": result.averages["weight_bits"],
            "effective_bits": result.averages["effective_weight_bits"],
            "bytes": saved.bytes,
            "seconds": seconds,
            "layer_error": fmean(row.error for row in result.table),
            "reload_equal": saved.agreement.output == 0,
        }


def check_settings(arguments: argparse.Namespace) -> None:
    """Keep what all cells of a folder share, and refuse to put others beside them.

    Raises:
        ValueError: if the folder's cells are of another model, text or number of windows.
    """
    path = arguments.out / "settings.json"
    wanted = {name: getattr(arguments, name) for name in SHARED}
    if not path.exists():
        write_json(path, wanted)
    elif (kept := json.loads(path.read_text())) != wanted:
        raise ValueError(f"{arguments.out} has cells of {kept}, not of {wanted}; use another --out")


def run_all(arguments: argparse.Namespace) -> None:
    """Fill the cells that are missing."""
    check_settings(arguments)
    bench, cells = Bench.of(arguments), arguments.out / "cells"
    reference = cells / "float.json"
    if not reference.exists():
        write_json(
            reference,
            {
                "perplexity": perplexity(bench.loaded.model, bench.evaluation),
                "bytes": sum(2 * p.numel() for p in bench.loaded.model.parameters()),
                "windows": len(bench.evaluation),
                "window": bench.evaluation.shape[1],
            },
        )
    for seed in arguments.seeds:
        for name in arguments.methods:
            path = cells / f"{name}@{seed}.json"
            if not path.exists():
                found = bench.judged(name, seed)
                write_json(path, found)
                print(name, seed, {k: round(v, 4) for k, v in found.items()}, flush=True)


def collect(out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Cells by method and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((out / "cells").glob("*@*.json")):
        name, _, seed = path.stem.partition("@")
        found.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    return {name: found[name] for name in METHODS if name in found}


def averaged(cells: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One method over its seeds: means, and the perplexity of each."""
    runs = list(cells.values())
    numbers = ("perplexity", "nominal_bits", "effective_bits", "bytes", "seconds", "layer_error")
    found: dict[str, Any] = {name: fmean(run[name] for run in runs) for name in numbers}
    found["perplexities"] = {str(seed): run["perplexity"] for seed, run in cells.items()}
    found["reload_equal"] = all(run["reload_equal"] for run in runs)
    return found


def table(found: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Any]) -> str:
    """One row per method, by family; times are ratios to the quickest method's."""
    least = min(one["seconds"] for one in found.values())
    lines = [
        "| method | perplexity | by seed | nominal bits | effective bits | kB | time |",
        "|---|---|---|---|---|---|---|",
        f"| float (16 bits) | {reference['perplexity']:.3f} | | 16 | 16 | "
        f"{reference['bytes'] / 1e3:.0f} | |",
    ]
    for family, methods in FAMILIES.items():
        rows = sorted((n for n in methods if n in found), key=lambda n: found[n]["perplexity"])
        if rows:
            lines.append(f"| **{family}** | | | | | | |")
        for name in rows:
            one = found[name]
            seeds = ", ".join(f"{value:.4g}" for value in one["perplexities"].values())
            lines.append(
                f"| {name} | {one['perplexity']:.4g} | {seeds} | {one['nominal_bits']:.2f} | "
                f"{one['effective_bits']:.2f} | {one['bytes'] / 1e3:.0f} | "
                f"{one['seconds'] / least:.1f} |"
            )
    return "\n".join(lines) + "\n"


def verdicts(
    pairs: Sequence[tuple[str, str]], found: Mapping[str, Mapping[str, Any]], allow_equal: bool
) -> str:
    """One row per pair: the perplexities and in how many seeds the order holds."""
    lines = ["| should be higher | than | perplexity | holds |", "|---|---|---|---|"]
    for worse, better in pairs:
        if worse in found and better in found:
            one, other = (found[name]["perplexities"] for name in (worse, better))
            seeds = [seed for seed in one if seed in other]
            right = [one[s] > other[s] or (allow_equal and one[s] == other[s]) for s in seeds]
            lines.append(
                f"| {worse} | {better} | {found[worse]['perplexity']:.4g}, "
                f"{found[better]['perplexity']:.4g} | {sum(right)} of {len(right)} |"
            )
    return "\n".join(lines) + "\n"


def write_report(out: Path) -> None:
    """Write ``metrics.json``, ``table.md`` and ``perplexity.png`` of the cells that are there."""
    found = {name: averaged(cells) for name, cells in collect(out).items()}
    reference = json.loads((out / "cells" / "float.json").read_text())
    write_json(out / "metrics.json", {"float": reference, **found})
    written = "\n".join(
        (
            table(found, reference),
            verdicts(orderings(), found, allow_equal=False),
            verdicts(presets(), found, allow_equal=True),
        )
    )
    with written_whole(out / "table.md") as temporary:
        temporary.write_text(written)
    points = [
        Point(name, family, found[name]["effective_bits"], found[name]["perplexity"])
        for family, methods in FAMILIES.items()
        for name in methods
        if name in found
    ]
    with written_whole(out / "perplexity.png") as temporary:
        temporary.write_bytes(perplexity_plot(points, reference["perplexity"]))
    print(written)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_llm"))
    parser.add_argument("--model", default="tiny", help="a folder or a hub id; tiny is shipped")
    parser.add_argument("--calibration", default="tiny", help="text file, wikitext2, c4 or ptb")
    parser.add_argument("--evaluation", default="tiny", help="text file, wikitext2, c4 or ptb")
    parser.add_argument("--window", type=int, help="tokens; by default 2048, or the model's most")
    parser.add_argument("--windows", type=int, default=128, help="to calibrate on")
    parser.add_argument("--judged", type=int, default=256, help="windows to judge on, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the windows")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write what was found")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (arguments.out / "cells").mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        run_all(arguments)
    write_report(arguments.out)


if __name__ == "__main__":
    main()
