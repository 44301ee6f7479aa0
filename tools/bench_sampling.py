"""Images per second of a float and of a fake-quantized DiT, eager and compiled, fp32 and bf16.

The float and the quantized network draw a batch in turn, so that load on the machine hits them
alike; medians over the rounds are compared. Weights are random, which costs the same. The rate is
given for ``--per`` steps: time grows with the steps, each being one call of the network.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from bench_qat_layer import hardware

from dit_qat import quantize_
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.models.variants import dit_variant
from dit_qat.dit.sampling import SamplerConfig, sample_images
from dit_qat.dit.sampling.job import SamplingJob

MODES = ("eager", "compile")
PRECISIONS = ("fp32", "bf16")


def networks(args: argparse.Namespace) -> dict[str, DiT]:
    """The float network and a quantized one of the same size, all weights random."""
    torch.manual_seed(0)
    pair = {"float": dit_variant(args.model), "quantized": dit_variant(args.model)}
    for network in pair.values():
        with torch.no_grad():
            for parameter in network.parameters():  # many of which start at zero
                parameter.add_(0.02 * torch.randn(parameter.shape))
    method = RobuQ(activation_bits=args.bits, rank=args.rank, distillation=0.0)
    quantize_(pair["quantized"], method.quant_config())
    return pair


def seconds(network: DiT, config: SamplerConfig) -> float:
    """For one batch."""
    start = perf_counter()
    for _, images in sample_images(network, config, range(config.batch_size)):
        images.cpu()  # waits for the GPU
    return perf_counter() - start


def measure(args: argparse.Namespace, mode: str, precision: str) -> dict[str, Any]:
    """Rates of both networks, and of the quantized one over the float one's."""
    options: dict[str, Any] = {"steps": args.steps, "precision": precision}
    config = SamplerConfig(batch_size=args.batch_size, guidance=args.guidance, **options)
    pair = {
        name: SamplingJob(network, config, 1, compiled=mode == "compile")
        .moved(torch.device(args.device))
        .network
        for name, network in networks(args).items()
    }
    warm_up = {name: seconds(network, config) for name, network in pair.items()}
    times: dict[str, list[float]] = {name: [] for name in pair}
    for _ in range(args.rounds):
        for name, network in pair.items():
            times[name].append(seconds(network, config))
    took = {name: median(values) for name, values in times.items()}
    images = args.batch_size * args.steps / args.per
    return {
        "mode": mode,
        "precision": precision,
        "images_per_second": {name: images / value for name, value in took.items()},
        "ratio": took["float"] / took["quantized"],
        "seconds_of_first_batch": warm_up,
        "seconds": times,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiT-S/2", help="a published size")
    parser.add_argument("--bits", type=int, default=4, help="activation bits of RobuQ")
    parser.add_argument("--rank", type=int, default=16, help="rank of the float branch")
    parser.add_argument("--steps", type=int, default=50, help="steps that are timed")
    parser.add_argument("--per", type=int, default=50, help="steps that the rates are given for")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0, help="1: one call per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    machine = hardware(args.device)
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    if "bf16" in args.precisions and not machine["native_bf16"]:
        print("warning: this processor emulates bf16; its bf16 rows say nothing about others")
    results = []
    for precision in args.precisions:
        for mode in args.modes:
            result = measure(args, mode, precision)
            results.append(result)
            rates = ", ".join(f"{n} {r:.3g}" for n, r in result["images_per_second"].items())
            print(
                f"{args.model} at {args.per} steps, {precision}, {mode}: {rates} images/s; "
                f"quantized over float {result['ratio']:.2f}",
                flush=True,
            )
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        report = {**machine, "torch": torch.__version__, **settings, "results": results}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
