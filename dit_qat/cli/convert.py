"""``dit-qat convert``: checkpoints between ours, the published .pt and diffusers."""

from pathlib import Path

from dit_qat.dit.convert import CheckpointFormat, Conversion, convert_checkpoint
from dit_qat.dit.models.published import Weights

__all__ = ["convert"]

_MEANINGS = {
    "dequantized": "ternary weights as float, activations and attention no longer quantized",
    "conventions": "the same weights under the format's timestep frequencies and norm epsilon",
    "written": "what was read back from the target, against what was to be written",
}


def convert(
    source: str,
    out: Path,
    format: CheckpointFormat,
    vae: str | None = None,
    weights: Weights = "ema",
    across_conventions: bool = False,
    dequantize: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint, and measure how far the outputs are from the source's.

    Writes OUT and a record: OUT.json beside a file, conversion.json in a folder.

    Args:
        source: digits, a .safetensors file, a published .pt, a folder of DiTTransformer2DModel or
            DiTPipeline, a hub id of these, or a .ckpt of dit-qat fit.
        out: A .safetensors file (dit_qat), a .pt file (published), or a folder.
        format: dit_qat, published, diffusers (the transformer alone) or pipeline (with vae and
            scheduler, 1,000 classes).
        vae: Folder or hub id of the pipeline's autoencoder.
        weights: Which weights of a training checkpoint: ema, or model.
        across_conventions: Write although the format's timestep frequencies (or norm epsilon)
            change the outputs.
        dequantize: Write a quantized network as the float one of its ternary weights.
        overwrite: Replace what an earlier conversion wrote.

    Raises:
        ValueError: if the source is damaged, or the format cannot hold it.
        OSError: if the source is not found, or the target exists or cannot be written.
    """
    report = convert_checkpoint(
        source, out, format, vae, weights, across_conventions, dequantize, overwrite
    )
    _print(report)


def _print(report: Conversion) -> None:
    taken = f", {report.weights} weights" if report.weights else ""
    print(f"{report.source} -> {report.target}")
    print(f"format {report.format}, {report.parameters:,} parameters{taken}")
    print("relative difference of outputs on fixed inputs (norm over norm):")
    for name, found in report.differences.items():
        timestep, by = found.largest
        worst = f", {by:.1e} at timestep {timestep}" if by else ""
        print(f"  {name:<11}  {found.overall:.1e}{worst}  ({_MEANINGS[name]})")
