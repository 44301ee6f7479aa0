"""``dit-qat demo``: the whole story on the embedded digits."""

from pathlib import Path
from typing import Literal

from dit_qat.cli.output import claim
from dit_qat.dit.demo import PACKED, DemoSettings, run_demo

__all__ = ["RESULTS", "demo"]

RESULTS = (
    "checkpoints",
    "baselines",
    PACKED,
    "float.png",
    "quantized.png",
    "side_by_side.png",
    "loss.png",
    "sensitivity.png",
    "bit_map.json",
    "bit_map.png",
    "metrics.json",
    "report.html",
)
"""What the command leaves in its folder."""


def demo(
    out: Path,
    bits: Literal[2, 3, 4] = 3,
    preset: Literal["paper", "exact"] = "exact",
    ampn: bool = False,
    compare: bool = False,
    seed: int = 0,
    steps: int = 600,
    samples: int = 1797,
    sampling_steps: int = 50,
    rank: int = 4,
    overwrite: bool = False,
) -> None:
    """Quantization-aware training of the shipped digits DiT, samples, scores, and a report.

    Starts from the float model that ships with the package; trains at ternary weights, samples
    both models, and leaves pictures, metrics.json, report.html, a checkpoint, and the packed
    model, both for ``dit-qat sample``.

    Args:
        out: Folder for the results.
        bits: Activation bits; with --ampn, on average.
        preset: RobuQ as published, or with what measured better.
        ampn: Allocate activation bits by layer after a sixth of the steps (AMPN).
        compare: Also train the baselines bitnet_v2 and minmax; with --ampn, robuq as well.
        seed: Seed of training and sampling.
        steps: Optimizer steps of training.
        samples: Images to score; 1797 is the number of real ones.
        sampling_steps: DDIM steps.
        rank: Rank of the low-rank branches.
        overwrite: Replace the results in the folder.

    Raises:
        ValueError: for numbers out of range.
        FileExistsError: if the folder holds results.
    """
    settings = DemoSettings(bits, preset, compare, seed, steps, samples, sampling_steps, rank, ampn)
    settings.check()
    claim(out, RESULTS, overwrite)
    metrics = run_demo(out, settings, print)
    packed = metrics["packed"]
    quantized, reference = metrics["quantized"], metrics["float"]["fd_digits"]
    print(f"\n{'model':<24}{'FD-digits':>10}{'x float':>9}")
    rows = {"float": reference, f"{quantized['method']} W1.58A{bits}": quantized["fd_digits"]}
    rows |= {name: scores["fd_digits"] for name, scores in metrics["baselines"].items()}
    for name, value in rows.items():
        print(f"{name:<24}{value:>10.2f}{value / reference:>9.2f}")
    print(
        f"\n{quantized['average_bits']:.2f} activation bits, "
        f"{quantized['effective_weight_bits']:.2f} effective weight bits (1.58 plus scales and the "
        f"rank-{rank} branch of these narrow layers)\n"
        f"packed: {packed['float32_bytes'] / packed['bytes']:.1f}x smaller than float32, "
        f"{packed['pixels_equal']:.2%} of its pixels equal; {metrics['seconds']:.0f} s\n"
        f"report: {out / 'report.html'}"
    )
