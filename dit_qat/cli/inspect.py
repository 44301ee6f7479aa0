"""``dit-qat inspect``: layers, bits and sizes, and what of it is simulated."""

from pathlib import Path

import torch

from dit_qat.cli.sources import load_network
from dit_qat.export.files import write_json
from dit_qat.export.inspect import LayerDescription, ModelDescription, describe

__all__ = ["inspect"]

_SIMULATED = (
    "This checkpoint holds the float32 latents that training moves, not ternary codes, and its "
    "arithmetic is simulated: values are quantized and multiplied as floats (fake-quantized). The "
    "packed size is what the codes, scales and float parts would take."
)
_FLOAT = "These are float weights: nothing is quantized."

_HEADINGS = ("layer", "kind", "shape", "W bits", "A bits", "rank", "rotation", "effective W", "0s")


def inspect(
    checkpoint: Path | None = None,
    weights: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Print per layer and in total what a network stores and computes with.

    Args:
        checkpoint: A .ckpt of dit-qat fit, whose EMA weights are described.
        weights: Float weights instead: digits, a .safetensors file, a published .pt.
        out: JSON file for the same numbers.
        overwrite: Replace that file.

    Raises:
        ValueError: unless one source is given, or if it is damaged.
        FileExistsError: if the JSON file is there already.
    """
    if out is not None and out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder; name a file, such as {out}/inspect.json")
    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(
            f"{out} exists; choose another --out, or pass --overwrite true to replace it"
        )
    description = describe(load_network(checkpoint, weights, torch.device("cpu")))
    note = _SIMULATED if description.quantized_layers else _FLOAT
    _print(description)
    if checkpoint is not None:
        print(f"file: {_size(checkpoint.stat().st_size)} with averages and optimizer state")
    print(note)
    if out is not None:
        write_json(out, description.as_dict() | {"note": note})


def _print(description: ModelDescription) -> None:
    rows = [_HEADINGS, *map(_row, description.layers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print()
    zeros = description.zero_fraction
    bits = set(description.attention_bits.values())
    totals = {
        "parameters": f"{description.parameters:,}",
        "share that stays float": f"{description.float_parameter_share:.2%}",
        "weight bits, nominal": f"{description.weight_bits:.3f}",
        "weight bits, effective": f"{description.effective_weight_bits:.3f} "
        "(with float32 scales and branches)",
        "activation bits": f"{description.average_activation_bits:.3f} "
        "(by multiply-adds, layers that see every token)",
        "activation bits, adaLN": f"{description.per_image_activation_bits:.3f} "
        "(one token per image)",
        "attention product bits": ", ".join(map(str, sorted(bits))) or "float",
        "zeros among codes": "-" if zeros is None else f"{zeros:.2%}",
        "packed size": f"{_size(description.packed_bytes)} "
        f"({description.bits_per_parameter:.3f} bits per parameter)",
        "size in float32": _size(4 * description.parameters),
    }
    width = max(map(len, totals))
    for name, value in totals.items():
        print(f"{name:<{width}}  {value}")


def _row(layer: LayerDescription) -> tuple[str, ...]:
    rotation = layer.rotation
    turned = "-"
    if rotation is not None:
        turned = "x".join(map(str, rotation.orders)) + (" signs" if rotation.signs else "")
        turned += "" if rotation.block_size is None else f" blocks of {rotation.block_size}"
    return (
        layer.name or "(root)",
        layer.kind,
        "x".join(map(str, layer.shape)),
        f"{layer.weight_bits:.2f}",
        str(layer.activation_bits) if layer.multiply_adds else "-",
        str(layer.rank) if layer.rank else "-",
        turned,
        f"{layer.effective_weight_bits:.2f}",
        "-" if layer.zero_fraction is None else f"{layer.zero_fraction:.1%}",
    )


def _size(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
