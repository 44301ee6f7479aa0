"""Processor time of post-training quantization per layer: against width, tokens, and at XL size.

One block of a DiT with random weights, quantized by each method on random recorded calls. The
exponent is the slope between the two largest sizes in logarithms: fixed costs flatten it at small
ones. Peak memory beyond what stood before the run is compared with the plan that the driver states.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from compare_ptq import METHODS

from dit_qat.calibration import CallStore, record_calls
from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import Trajectory, quantize_post_training
from dit_qat.dit.sampling import SamplerConfig

WIDTHS = (128, 256, 512, 1024)
TOKENS = (2048, 4096, 8192, 16384)
FIXED_WIDTH, FIXED_TOKENS = 256, 2048
PATCHES = 256
XL = {"hidden_size": 1152, "num_heads": 16}
STATUS = Path("/proc/self/status")


def block_of(width: int, num_heads: int) -> DiT:
    torch.manual_seed(0)
    model = DiT(hidden_size=width, num_heads=num_heads, depth=1).eval().requires_grad_(False)
    for parameter in model.parameters():  # a new DiT's blocks are the identity
        if parameter.dim() == 2:
            parameter.normal_(std=0.02)
    return model


def recorded(model: DiT, tokens: int) -> CallStore:
    """Calls of four images each at as many timesteps as the tokens make."""
    generator = torch.Generator().manual_seed(0)
    calls = tokens // (4 * PATCHES)
    timesteps = torch.linspace(999, 0, calls).long()

    def run() -> None:
        for t in timesteps:
            x = torch.randn(4, 4, 32, 32, generator=generator)
            model(x, t.expand(4), torch.arange(4))

    return record_calls(model, run, timestep_argument="t")


def memory(field: str) -> int | None:
    """Bytes of this process from Linux's accounts; None elsewhere."""
    if not STATUS.exists():
        return None
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(lines[0].split()[1]) * 1024


def forget_peak() -> None:
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def cell(name: str, width: int, tokens: int, num_heads: int | None = None) -> dict[str, Any]:
    model = block_of(width, num_heads or max(1, width // 64))
    store = recorded(model, tokens)
    trajectory = Trajectory(model, SamplerConfig(kind="ddim", steps=2), images=1)
    forget_peak()
    before = memory("VmRSS")
    started = time.process_time()
    result = quantize_post_training(model, METHODS[name](4, 4), store, trajectory=trajectory)
    seconds = time.process_time() - started
    found: dict[str, Any] = {"seconds": seconds, "planned_bytes": result.plan.total}
    if before is not None:
        found["peak_bytes"] = (memory("VmHWM") or 0) - before
        # The plan counts the model and the calls, which stood before the run.
        found["planned_beyond"] = result.plan.total - store.bytes - model_bytes(model)
    return found


def model_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def exponent(seconds: dict[int, float]) -> float:
    (x0, y0), (x1, y1) = sorted(seconds.items())[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def table(found: dict[str, Any]) -> str:
    widths, tokens = found["width"], found["tokens"]
    sizes = [sorted(next(iter(runs.values()))) for runs in (widths, tokens)]
    lines = [
        "| method | " + " | ".join(f"{width} wide" for width in sizes[0]) + " | exponent | "
        "" + " | ".join(f"{count} tokens" for count in sizes[1]) + " | exponent |",
        "|---|" + "---|" * (len(sizes[0]) + len(sizes[1]) + 2),
    ]
    for name in widths:
        row = [name]
        for runs in (widths[name], tokens[name]):
            first = min(runs)
            row += [f"{runs[size] / runs[first]:.2f}" for size in sorted(runs)]
            row.append(f"{exponent(runs):.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--block", action="store_true", help="a block of DiT-XL/2 only")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cell("rtn", 64, 1024)  # what only the first call of a process pays
    found: dict[str, Any] = {"width": {}, "tokens": {}, "block": {}}
    for name in arguments.methods:
        if arguments.block:
            run = cell(name, XL["hidden_size"], FIXED_TOKENS, XL["num_heads"])
            found["block"][name] = run
            print(name, {key: round(value, 2) for key, value in run.items()}, flush=True)
            continue
        widths, tokens = arguments.widths, arguments.tokens
        found["width"][name] = {w: cell(name, w, FIXED_TOKENS)["seconds"] for w in widths}
        found["tokens"][name] = {n: cell(name, FIXED_WIDTH, n)["seconds"] for n in tokens}
        print(name, found["width"][name], found["tokens"][name], flush=True)
    if not arguments.block:
        print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
