"""Cost of training a quantized layer: forward and backward against ``nn.Linear``.

Both layers run once per round, in turn, so that load on the machine hits them alike; medians over
the rounds are compared. The GFLOP/s of the linear stand beside the ratios: a slow baseline flatters
everything measured against it. Bytes are those of the tensors kept for backward, each counted once,
parameters excluded.
"""

import argparse
import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from kept_bytes import kept_for_backward
from torch import Tensor, nn

from dit_qat.layers import LayerConfig, LowRank, QuantLinear, RobustQuantizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((1152, 3456), (4608, 1152))
WARM_UP = 2


def hardware(device: str) -> dict[str, Any]:
    """Model of the device, and whether it computes in bf16 rather than emulating it."""
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "native_bf16": True}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    flags = fields.get("flags", "").split()
    units = {"avx512_bf16": "avx512_bf16" in flags, "amx_bf16": "amx_bf16" in flags}
    model = fields.get("model name", platform.processor() or platform.machine())
    return {"device": model, **units, "native_bf16": any(units.values())}


def layers(inputs: int, outputs: int, args: argparse.Namespace) -> dict[str, nn.Module]:
    linear = nn.Linear(inputs, outputs)
    config = LayerConfig(activation=RobustQuantizer(args.bits), low_rank=LowRank(args.rank))
    quantized = QuantLinear.from_float(linear, config)
    pair = {"linear": linear.to(args.device), "quantized": quantized.to(args.device)}
    return {n: torch.compile(m, dynamic=False) if args.compile else m for n, m in pair.items()}


def autocast(device: str, dtype: str) -> AbstractContextManager[object]:
    return torch.autocast(device, DTYPES[dtype]) if dtype != "fp32" else nullcontext()


def bytes_kept(layer: nn.Module, x: Tensor, context: AbstractContextManager[object]) -> int:
    """Bytes of the tensors kept for backward, without the layer's parameters."""
    # The output is alive while its storages are told apart by their address.
    with kept_for_backward(layer) as kept, context:
        output = layer(x)
    del output
    return sum(kept.values())


def seconds(run: Callable[[], None], device: str) -> float:
    if device != "cuda":
        start = perf_counter()
        run()
        return perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def measure(args: argparse.Namespace, inputs: int, outputs: int, dtype: str) -> dict[str, Any]:
    x = torch.randn(args.tokens, inputs, device=args.device, requires_grad=True)
    grad = torch.randn(args.tokens, outputs, device=args.device, dtype=DTYPES[dtype])
    pair = layers(inputs, outputs, args)
    times: dict[str, list[float]] = {name: [] for name in pair}

    def step(layer: nn.Module) -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with autocast(args.device, dtype):
            y = layer(x)
        y.backward(grad)

    for i in range(args.rounds + WARM_UP):
        for name, layer in pair.items():
            elapsed = seconds(lambda layer=layer: step(layer), args.device)
            if i >= WARM_UP:
                times[name].append(elapsed)
    took = {name: median(values) for name, values in times.items()}
    kept = {n: bytes_kept(layer, x, autocast(args.device, dtype)) for n, layer in pair.items()}
    return {
        "inputs": inputs,
        "outputs": outputs,
        "dtype": dtype,
        "compiled": args.compile,
        "milliseconds": {name: 1e3 * value for name, value in took.items()},
        "ratio": took["quantized"] / took["linear"],
        "linear_gflops": 6e-9 * args.tokens * inputs * outputs / took["linear"],
        "bytes_kept": kept,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="rows of the activations")
    parser.add_argument("--bits", type=int, default=4, help="activation bits")
    parser.add_argument("--rank", type=int, default=16, help="rank of the float branch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="measure under torch.compile")
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = hardware(args.device)
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    if "bf16" in args.dtypes and not machine["native_bf16"]:
        print("warning: this processor emulates bf16; its bf16 rows say nothing about others")
    results = []
    for dtype in args.dtypes:
        for inputs, outputs in SHAPES:
            result = measure(args, inputs, outputs, dtype)
            results.append(result)
            linear, quantized = (
                f"{result['milliseconds'][name]:.1f} ms, {result['bytes_kept'][name] / 2**20:.2f}"
                for name in ("linear", "quantized")
            )
            print(
                f"{inputs}->{outputs} {dtype}: ratio {result['ratio']:.2f}; linear {linear} MiB "
                f"kept ({result['linear_gflops']:.0f} GFLOP/s); quantized {quantized} MiB kept"
            )
    if args.out:
        settings = {"torch": torch.__version__, "tokens": args.tokens, "threads": args.threads}
        report = {**machine, **settings, "rank": args.rank, "bits": args.bits, "results": results}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
