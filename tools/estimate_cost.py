"""GPU memory and time that a training configuration should take, from what can be counted.

Counted here, on the CPU and without the weights: parameters, floating-point operations of a forward
pass, the bytes that a block keeps for backward under bf16 autocast, and the operations that Python
launches in a step. Assumed: AdamW and EMA in float32, a backward pass of twice the forward, the
rate that the GPU sustains (--tflops), how much longer a quantized layer takes than a float one
(--qat_ratio, see docs/performance.md), and how long a launch takes (--launch_us), which is all that
counts where a GPU gets few images of a small network. It is an estimate; no GPU is asked.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from kept_bytes import kept_for_backward
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dit_qat.dit import methods
from dit_qat.dit.models import DiT
from dit_qat.layers import quantize_

GIB = 2**30
FRAGMENTS = 1.1  # what the allocator keeps besides what is asked of it


def network_of(settings: dict[str, Any], quantized: bool, device: str, **overrides: Any) -> DiT:
    """The architecture of a configuration, its values left open."""
    arguments = settings["network"]["init_args"] | overrides
    with torch.device(device):
        network = DiT(**arguments)
        if quantized and settings.get("method"):
            method = method_of(settings)
            quantize_(network, method.quant_config(), initialize=False)
    return network


def method_of(settings: dict[str, Any]) -> Any:
    kind = getattr(methods, settings["method"]["class_path"].rpartition(".")[2])
    return kind(**settings["method"].get("init_args", {}))


def inputs_of(network: DiT, images: int, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = (images, network.in_channels, network.input_size, network.input_size)
    t = torch.zeros(images, dtype=torch.int64, device=device)
    return torch.zeros(shape, device=device), t, t if network.num_classes else None


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def forward_flops(settings: dict[str, Any]) -> int:
    """Of one image; two per multiply-accumulate."""
    network = network_of(settings, quantized=False, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs_of(network, 1, "meta"))
    return counter.get_total_flops()


def bytes_kept(network: DiT, images: int) -> int:
    """Bytes kept for backward under bf16 autocast."""
    with kept_for_backward(network) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(*inputs_of(network, images, "cpu"))
    assert output.requires_grad
    return sum(kept.values())


def bytes_per_block(settings: dict[str, Any]) -> tuple[float, float]:
    """What a block keeps per image, and besides (copies of weights), in bytes."""
    found = {}
    for depth, images in ((1, 1), (2, 1), (1, 3), (2, 3)):
        network = network_of(settings, quantized=True, device="cpu", depth=depth)
        for parameter in network.parameters():
            nn.init.constant_(parameter.data, 0.01)
        found[depth, images] = bytes_kept(network, images)
    one, three = (found[2, n] - found[1, n] for n in (1, 3))
    per_image = (three - one) / 2
    return per_image, one - per_image


class Launches(TorchDispatchMode):
    """Counts operations that compute something; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aliases = [argument.alias_info for argument in operation._schema.arguments]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return operation(*args, **(kwargs or {}))


def launched(settings: dict[str, Any], quantized: bool) -> tuple[int, int]:
    """Operations of one forward and one backward pass."""
    found = []
    for depth in (1, 1, 2):  # the first fills caches
        network = network_of(settings, quantized, "cpu", depth=depth)
        for parameter in network.parameters():
            nn.init.constant_(parameter.data, 0.01)
        with Launches() as forward, torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(*inputs_of(network, 1, "cpu"))
        with Launches() as backward:
            output.float().mean().backward()
        found.append((forward.count, backward.count))
    more = settings["network"]["init_args"]["depth"] - 1
    return tuple(one + more * (two - one) for one, two in zip(*found[1:], strict=True))  # type: ignore[return-value]


def launches_per_step(settings: dict[str, Any], distills: bool) -> int:
    """Operations of a micro-batch, those of the optimizer left out (it launches few)."""
    forward, backward = launched(settings, quantized=True)
    again = forward if settings.get("gradient_checkpointing", False) else 0
    teacher = launched(settings, quantized=False)[0] if distills else 0
    return forward + again + backward + teacher


def estimate(config: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    settings, trainer = config["model"], config["trainer"]
    network = network_of(settings, quantized=True, device="meta")
    distills = bool(settings.get("method")) and method_of(settings).distillation
    distills = bool(settings.get("distillation", distills))
    parameters, flops = count(network), forward_flops(settings)
    micro_batches = trainer.get("accumulate_grad_batches", 1)
    parts = args.gpus * micro_batches
    images = config["data"]["init_args"]["batch_size"] / parts
    per_image, fixed = bytes_per_block(settings)
    tokens = (network.input_size // network.patch_size) ** 2 * network.hidden_size
    checkpointed = settings.get("gradient_checkpointing", False)
    deep = network.depth if not checkpointed else 1
    activations = deep * (per_image * images + fixed) + network.depth * tokens * 4 * images
    averaged = config.get("ema", {}).get("enabled", True)
    states = parameters * 4 * (4 + averaged + (args.gpus > 1)) + (4 * parameters if distills else 0)
    ratio = args.qat_ratio if settings.get("method") else 1.0
    passes = (3 + checkpointed) * ratio + distills
    computing = passes * flops * images * parts / (args.tflops * 1e12 * args.gpus)
    launches = launches_per_step(settings, distills) * micro_batches
    seconds = max(computing, launches * args.launch_us * 1e-6)
    return {
        "parameters": parameters,
        "gflops_per_image": flops / 1e9,
        "images_per_gpu": images,
        "states_gib": states / GIB,
        "activations_gib": activations / GIB,
        "memory_gib": FRAGMENTS * (states + activations) / GIB,
        "checkpoint_gb": parameters * 4 * (3 + averaged) / 1e9,
        "launches_per_step": launches,
        "launch_bound": seconds > computing,
        "seconds_per_step": seconds,
        "hours": seconds * trainer["max_steps"] / 3600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tflops", type=float, default=300.0, help="sustained, bf16, of one GPU")
    parser.add_argument("--qat_ratio", type=float, default=1.5)
    parser.add_argument("--launch_us", type=float, default=5.0, help="of one operation, on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    found = {}
    for path in args.configs:
        found[str(path)] = estimate(yaml.safe_load(path.read_text()), args)
        shown = found[str(path)]
        print(
            f"{path}: {shown['memory_gib']:.0f} GiB on each of {args.gpus} GPUs "
            f"({shown['states_gib']:.1f} states, {shown['activations_gib']:.1f} kept for "
            f"backward), {shown['hours']:.1f} h at {args.tflops:g} TFLOP/s, "
            f"{shown['seconds_per_step']:.3f} s a step"
            f"{' (all of it launches)' if shown['launch_bound'] else ''}, checkpoints of "
            f"{shown['checkpoint_gb']:.1f} GB"
        )
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
