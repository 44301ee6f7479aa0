"""Time of everything around training on ImageNet at 256x256: caching, sampling, decoding, scoring.

Floating-point operations are counted on the meta device with the published architectures (the
autoencoder of Stable Diffusion, DiT-XL/2, torch-fidelity's Inception) and divided by the rates that
a GPU sustains, which are assumptions. Reading, decoding and writing pictures is not counted.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dit_qat.dit.models import dit_variant

IMAGENET = 1_281_167


def flops(run: Callable[[Tensor], object], shape: tuple[int, ...]) -> int:
    """Of one image; two per multiply-accumulate."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(torch.zeros(shape, device="meta"))
    return counter.get_total_flops()


def autoencoder() -> nn.Module:
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    with torch.device("meta"):
        widths = (128, 256, 512, 512)
        return AutoencoderKL(block_out_channels=widths, layers_per_block=2, **kinds)


def counted() -> dict[str, int]:
    """Operations of one call for one image."""
    vae = autoencoder()
    with torch.device("meta"):
        network = dit_variant("DiT-XL/2")
        t = y = torch.zeros(1, dtype=torch.int64, device="meta")
    return {
        "encoder": flops(lambda x: vae.encode(x), (1, 3, 256, 256)),
        "decoder": flops(lambda x: vae.decode(x), (1, 4, 32, 32)),
        "network": flops(lambda x: network(x, t, y), (1, 4, 32, 32)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflops", type=float, default=300.0, help="sustained in bf16: the DiT")
    parser.add_argument(
        "--vae_tflops", type=float, default=60.0, help="in float32 or TF32: the VAE"
    )
    parser.add_argument("--qat_ratio", type=float, default=1.5, help="fake-quantized over float")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    one = counted()
    found = {f"{name} GFLOP per image": value / 1e9 for name, value in one.items()}
    hour = 3600 * 1e12
    found["cache-latents, both mirrors, h"] = (
        2 * IMAGENET * one["encoder"] / (args.vae_tflops * hour)
    )
    for num, steps in ((50_000, 250), (10_000, 250), (10_000, 50)):
        decode = num * one["decoder"] / (args.vae_tflops * hour)
        draw = num * steps * 2 * one["network"] / (args.tflops * hour)  # twice: guidance
        for kind, ratio in (("float", 1.0), ("fake-quantized", args.qat_ratio)):
            found[f"sample {num:,} at {steps} steps, {kind}, h"] = draw * ratio + decode
    for name, value in found.items():
        print(f"{name:<52} {value:10.2f}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
