"""``dit-qat inspect``: layers, bits and sizes, and what of it is simulated."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_qat import load_quantized
from dit_qat.cli.sources import load_source
from dit_qat.dit.models.packed_source import locate_weights
from dit_qat.dit.training.loading import read_checkpoint
from dit_qat.export.files import write_json
from dit_qat.export.inspect import (
    FLOAT_INPUT_BITS,
    LayerDescription,
    ModelDescription,
    describe,
)
from dit_qat.export.manifest import CONFIG_FILE, is_packed_folder
from dit_qat.export.sizes import Disk, Size, Sizes, measure, packed_disk
from dit_qat.export.tensor_file import open_tensors
from dit_qat.layers import PackedLinear

__all__ = ["inspect"]

_SIMULATED = (
    "This checkpoint holds the float32 latents that training moves, not ternary codes, and its "
    "arithmetic is simulated: values are quantized and multiplied as floats (fake-quantized). The "
    "packed size is what the codes, scales and float parts would take."
)
_PACKED = (
    "These are packed weights: bytes on disk are those of the files, resident ones those of the "
    "tensors after a first call; effective bits are measured on disk."
)
_FLOAT = "These are float weights: nothing is quantized."

_HEADINGS = ("layer", "kind", "shape", "W bits", "A bits", "rank", "input", "effective W", "0s")
_SIZES = ("disk", "resident")
_NETWORK = "network."  # before the names in a training checkpoint
_LAST = Path("checkpoints", "last.ckpt")  # in the folder of a run


def inspect(
    source: str | None = None,
    checkpoint: Path | None = None,
    weights: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Print per layer and in total what a network stores and computes with.

    Args:
        source: What either of the next two takes, or the folder of a run of dit-qat fit.
        checkpoint: A .ckpt of dit-qat fit, whose EMA weights are described.
        weights: Other weights instead: a packed folder of dit-qat export, dit-qat ptq or dit-qat
            llm quantize, or float ones: digits, a .safetensors file or a published .pt of a DiT, a
            folder of transformers with a language model.
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
    if source is not None:
        checkpoint, weights = _told_apart(source, checkpoint, weights)
    network, disk, note = _load(checkpoint, weights)
    description, sizes = describe(network), measure(network, disk)
    note = note if description.quantized_layers else _FLOAT
    _print_layers(description, sizes)
    _print_parts(sizes)
    _print_totals(description, sizes)
    print(note)
    if out is not None:
        measured = {"measured": sizes.as_dict(), "note": note}
        write_json(out, description.as_dict() | measured)


def _told_apart(
    source: str, checkpoint: Path | None, weights: str | None
) -> tuple[Path | None, str | None]:
    """A source without an option in front: a training checkpoint, or weights."""
    if checkpoint is not None or weights is not None:
        raise ValueError(
            f"{source} is given besides --checkpoint or --weights; name one source, with or "
            "without an option"
        )
    last = Path(source) / _LAST
    if last.is_file():
        return last, None
    return (Path(source), None) if source.endswith(".ckpt") else (None, source)


def _load(checkpoint: Path | None, weights: str | None) -> tuple[nn.Module, Disk, str]:
    """A network, what its files hold, and what is to be said about both."""
    if checkpoint is None and weights is not None:
        if _is_language_model(Path(weights)):
            return _float_llm(Path(weights))
        path, packed = locate_weights(weights)
        if packed:  # of any architecture
            network = load_quantized(path)
            _use_once(network)
            return network, packed_disk(path), _PACKED
    source = load_source(checkpoint, weights)
    if checkpoint is None:
        return source.network, Disk({}, {}), _FLOAT
    return source.network, _checkpoint_disk(checkpoint), _SIMULATED


def _is_language_model(folder: Path) -> bool:
    """Whether a folder is of transformers, and not packed."""
    path = folder / CONFIG_FILE
    if not path.is_file() or is_packed_folder(folder):
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and "model_type" in content


def _float_llm(folder: Path) -> tuple[nn.Module, Disk, str]:
    from dit_qat.llm.models import load_llm  # transformers, seconds

    network = load_llm(folder, dtype=None).model
    tensors: dict[str, int] = {}
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        with open_tensors(path) as file:
            tensors |= {name: place.end - place.begin for name, place in file.places.items()}
    rest = sum(path.stat().st_size for path in files) - sum(tensors.values())
    return network, Disk(tensors, {"headers of the files of tensors": rest}), _FLOAT


def _use_once(network: nn.Module) -> None:
    """Have packed layers make what they make at their first call, so that it counts."""
    for layer in network.modules():
        if isinstance(layer, PackedLinear):
            layer(torch.zeros(1, layer.in_features))


def _checkpoint_disk(checkpoint: Path) -> Disk:
    """The averaged weights in the file, and the rest of it."""
    state = read_checkpoint(checkpoint)["state_dict"]
    tensors = {
        name.removeprefix(_NETWORK): tensor.nbytes
        for name, tensor in state.items()
        if name.startswith(_NETWORK) and isinstance(tensor, Tensor)
    }
    rest = checkpoint.stat().st_size - sum(tensors.values())
    return Disk(tensors, {"optimizer state, other weights, settings": rest})


def _print_layers(description: ModelDescription, sizes: Sizes) -> None:
    measured, effective = sizes.by_layer, sizes.effective_bits
    rows = []
    for layer in description.layers:
        size = measured[layer.name]
        bits = effective.get(layer.name, (layer.effective_weight_bits,))[0]
        rows.append((*_row(layer, bits), _size(size.disk), _size(size.resident)))
    _print_table([(*_HEADINGS, *_SIZES), *rows])


def _print_parts(sizes: Sizes) -> None:
    """What of the bytes is codes, and what stays float."""
    parts = sizes.by_part
    total = Size(
        sum(size.numbers for size in parts.values()), sizes.disk_bytes, sizes.resident_bytes
    )
    rows: list[tuple[str, ...]] = [
        ("part", "numbers", "share", "disk", "share", "resident", "share")
    ]
    rows += [(name, *_shares(size, total)) for name, size in parts.items()]
    rows += [(name, *_shares(Size(0, count, 0), total)) for name, count in sizes.other.items()]
    rows.append(("total", *_shares(total, total)))
    _print_table(rows)


def _shares(size: Size, total: Size) -> Iterable[str]:
    yield f"{size.numbers:,}" if size.numbers else "-"
    yield f"{size.numbers / total.numbers:.2%}" if size.numbers else "-"
    for part, whole in ((size.disk, total.disk), (size.resident, total.resident)):
        yield from (_size(part), f"{part / whole:.2%}") if part else ("-", "-")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print()


def _print_totals(description: ModelDescription, sizes: Sizes) -> None:
    zeros, mean = description.zero_fraction, sizes.mean_effective_bits
    bits = set(description.attention_bits.values())
    totals = {
        "parameters": f"{description.parameters:,}",
        "share that stays float": f"{description.float_parameter_share:.2%}",
        "weight bits, nominal": f"{description.weight_bits:.3f}",
        "weight bits, effective": f"{description.effective_weight_bits:.3f}{_counted(description)}"
        if mean is None
        else f"{mean[0]:.3f} on disk, {mean[1]:.3f} resident (codes, scales, transforms, branches)",
        "activation bits": _averaged(
            description.average_activation_bits, "by multiply-adds, layers that see every token"
        ),
        "activation bits, plain": _averaged(
            description.mean_activation_bits,
            f"the mean over those layers{_over_steps(description)}",
        ),
        "activation bits, adaLN": _averaged(
            description.per_image_activation_bits, "one token per image"
        ),
        "attention product bits": ", ".join(map(str, sorted(bits))) or "float",
        "zeros among codes": "-" if zeros is None else f"{zeros:.2%}",
    }
    if not any(layer.per_image for layer in description.layers):
        del totals["activation bits, adaLN"]
    if mean is None and description.quantized_layers:
        totals["packed size"] = (
            f"{_size(description.packed_bytes)} ({description.bits_per_parameter:.3f} bits per "
            "parameter)"
        )
    if sizes.disk_bytes:
        totals["on disk"] = _compared(sizes.disk_bytes, 4 * sizes.float_numbers, "float32")
    totals["resident"] = _compared(sizes.resident_bytes, 2 * sizes.float_numbers, "bfloat16")
    width = max(map(len, totals))
    for name, value in totals.items():
        print(f"{name:<{width}}  {value}")


def _counted(description: ModelDescription) -> str:
    is_quantized = bool(description.quantized_layers)
    return " (codes at log2(3) bits, float32 scales, branches)" if is_quantized else ""


def _averaged(bits: float, over: str) -> str:
    return "float" if bits == FLOAT_INPUT_BITS else f"{bits:.3f} ({over})"


def _over_steps(description: ModelDescription) -> str:
    count = sum(layer.policy for layer in description.layers)
    return f", and over timesteps in {count} of them" if count else ""


def _compared(count: int, other: int, name: str) -> str:
    return f"{_size(count)} (the float model in {name}: {_size(other)}, {other / count:.2f}x)"


def _row(layer: LayerDescription, effective_bits: float) -> tuple[str, ...]:
    return (
        layer.name or "(root)",
        layer.kind,
        "x".join(map(str, layer.shape)),
        f"{layer.weight_bits:.2f}",
        _bits(layer) if layer.multiply_adds else "-",
        str(layer.rank) if layer.rank else "-",
        _transform(layer),
        f"{effective_bits:.2f}",
        "-" if layer.zero_fraction is None else f"{layer.zero_fraction:.1%}",
    )


def _bits(layer: LayerDescription) -> str:
    """Of the input; a mean over timesteps with the mark of one."""
    if layer.activation_bits == FLOAT_INPUT_BITS:
        return "float"
    return f"{layer.activation_bits:.2f} by step" if layer.policy else f"{layer.activation_bits:g}"


def _transform(layer: LayerDescription) -> str:
    """What is done to the input; the first rotation by its orders."""
    rotation, steps = layer.rotation, [*layer.transform]
    if rotation is not None:
        turned = "x".join(map(str, rotation.orders)) + (" signs" if rotation.signs else "")
        turned += "" if rotation.block_size is None else f" blocks of {rotation.block_size}"
        steps[steps.index("rotate")] = turned
    return ", ".join(steps) or "-"


def _size(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
