"""Cost of a Hadamard rotation as a share of the linear layer it feeds.

Every candidate runs once per round, all of them in turn, so that load on the machine hits them
alike; medians over the rounds are compared. The GFLOP/s of the linear stand beside the ratios: a
slow baseline (bf16 without bf16 units, say) flatters everything measured against it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from dit_qat.primitives.hadamard import (
    Rotation,
    hadamard_factors,
    hadamard_matrix,
    hadamard_transform,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((1152, 3456), (4608, 1152))
BLOCK = 128


def candidates(width: int, outputs: int, tokens: int, dtype: torch.dtype, compiled: bool) -> Any:
    x = torch.randn(tokens, width).to(dtype)
    weight = torch.randn(outputs, width).to(dtype)
    dense = (hadamard_matrix(width, torch.float64).T * width**-0.5).to(dtype).contiguous()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "factored": hadamard_transform,
        "factored and signs": Rotation(width).apply,
        f"blocks of {BLOCK}": Rotation(width, seed=None, block_size=BLOCK).apply,
        "dense": lambda x: linear(x, dense),
    }
    if compiled:
        functions = {name: torch.compile(f, dynamic=False) for name, f in functions.items()}
    return x, {"linear": lambda x: linear(x, weight), **functions}


def interleaved_medians(
    functions: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int
) -> dict[str, float]:
    """Seconds per call of each function."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    with torch.inference_mode():
        for i in range(rounds + 2):
            for name, function in functions.items():
                start = perf_counter()
                function(x)
                if i >= 2:
                    times[name].append(perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def measure(args: argparse.Namespace, width: int, outputs: int, dtype: str) -> dict[str, Any]:
    x, functions = candidates(width, outputs, args.tokens, DTYPES[dtype], args.compile)
    seconds = interleaved_medians(functions, x, args.rounds)
    base = seconds["linear"]
    return {
        "width": width,
        "outputs": outputs,
        "dtype": dtype,
        "compiled": args.compile,
        "factors": hadamard_factors(width),
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "linear_gflops": 2e-9 * args.tokens * width * outputs / base,
        "ratio_to_linear": {name: value / base for name, value in seconds.items()},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="rows of the activations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--compile", action="store_true", help="measure under torch.compile")
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = []
    for dtype in args.dtypes:
        for width, outputs in SHAPES:
            result = measure(args, width, outputs, dtype)
            results.append(result)
            factors = " x ".join(map(str, result["factors"]))
            print(
                f"{width} = {factors} before {width}->{outputs}, {dtype}: the linear takes "
                f"{result['milliseconds']['linear']:.2f} ms ({result['linear_gflops']:.0f} GFLOP/s)"
            )
            for name, ratio in result["ratio_to_linear"].items():
                if name != "linear":
                    print(f"  {name:20s} {ratio:6.3f} of it")
    if args.out:
        settings = {"torch": torch.__version__, "tokens": args.tokens, "threads": args.threads}
        args.out.write_text(json.dumps({**settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
