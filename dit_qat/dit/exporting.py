"""A trained DiT as a packed folder: written, loaded again, run, and only then named."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_qat.dit.convert.difference import Inputs, difference, fixed_inputs, outputs
from dit_qat.dit.models import DiT
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8
from dit_qat.export.files import check_folder, write_json
from dit_qat.export.folders import check_place, written_folder
from dit_qat.export.layer_entry import Storage
from dit_qat.export.loader import load_quantized
from dit_qat.export.manifest import CONFIG_FILE, TENSOR_FILE, Manifest
from dit_qat.export.verify import Agreement, verify_packed
from dit_qat.export.writer import write_packed
from dit_qat.layers import LowRank, QuantLinear
from dit_qat.layers.linear import BranchDtype

__all__ = [
    "METRICS",
    "RESULTS",
    "Exported",
    "check_target",
    "compare_pixels",
    "export_network",
]

METRICS = "metrics.json"

RESULTS = (CONFIG_FILE, TENSOR_FILE, METRICS)
"""What an export leaves in its folder."""

_CARD = "README.md"  # of a folder that came from the hub
_CURE = "choose another --out, or pass --overwrite true to replace it"


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        folder: Where.
        files: Bytes by file name.
        float_parameters: Numbers of the float model of the same architecture.
        agreement: Of the packed model with the trained one; with the trained one rounded as asked,
            if the export was asked to round what training did not.
        rounded: What that rounding changed: the norm of the difference of the outputs over their
            norm; None if nothing was rounded.
        manifest: What ``config.json`` says.
    """

    folder: Path
    files: Mapping[str, int]
    float_parameters: int
    agreement: Agreement
    rounded: float | None
    manifest: Manifest

    @property
    def bytes(self) -> int:
        """Of the packed model."""
        return self.files[CONFIG_FILE] + self.files[TENSOR_FILE]

    @property
    def ratio(self) -> float:
        """How much smaller than the float model in float32."""
        return 4 * self.float_parameters / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for ``metrics.json``."""
        name, difference = self.agreement.worst_layer
        return {
            "bytes": self.bytes,
            "files": {name: self.files[name] for name in (CONFIG_FILE, TENSOR_FILE)},
            "float32_bytes": 4 * self.float_parameters,
            "times_smaller_than_float32": self.ratio,
            "agreement": {
                "worst_layer": {"name": name, "difference": difference},
                "output": self.agreement.output,
            },
            "rounded_beyond_training": self.rounded,
            "activation_bits": self.manifest.activation_bits,
            "attention_bits": dict(self.manifest.attention_bits),
        }


def export_network(
    network: DiT,
    folder: Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    storage: Storage = "ternary_1.6",
    branch_dtype: BranchDtype | None = None,
    float_dtype: BranchDtype = "float32",
    overwrite: bool = False,
) -> Exported:
    """Pack a quantized DiT, run what was written against it, and refuse what differs.

    Args:
        network: On the CPU; unchanged.
        folder: Made at once or not at all; gets a ``metrics.json`` beside the model.
        provenance: Plain values: source checkpoint, training, data, metrics.
        storage: Of the codes: five or four per byte.
        branch_dtype: What low-rank branches are rounded to; None: what training rounded them to.
            With another one, the packed model is checked against the network rounded like this,
            and the report says what the rounding changed.
        float_dtype: What all that is not packed is rounded to; other than float32, likewise.
        overwrite: Replace a packed folder that is there.

    Raises:
        ValueError: if both differ beyond float rounding, naming the layer; for a network that the
            format cannot hold.
        OSError: if the folder is in use, or there is no room for it.
    """
    check_target(folder, overwrite)
    inputs = fixed_inputs(network)
    rounds = bool(_other_branches(network, branch_dtype)) or float_dtype != "float32"
    with ExitStack() as restore:
        restore.enter_context(_evaluating(network))
        expected = outputs(network, inputs) if rounds else None
        restore.enter_context(_rounded(network, branch_dtype, float_dtype))
        place = restore.enter_context(written_folder(folder))
        manifest = write_packed(
            network,
            place / "model",
            provenance=provenance,
            branch_dtype=branch_dtype,
            float_dtype=float_dtype,
            storage=storage,
        )
        agreement = _agreement(network, place / "model", inputs)
        changed = None
        if expected is not None:
            changed = difference(expected, outputs(network, inputs)).overall
        for path in (place / "model").iterdir():
            path.rename(place / path.name)
        (place / "model").rmdir()
        files = {path.name: path.stat().st_size for path in place.glob("[!.]*")}
        count = _float_parameters(network)
        exported = Exported(folder, files, count, agreement, changed, manifest)
        write_json(place / METRICS, exported.as_dict())
    return exported


def compare_pixels(
    network: DiT, folder: Path, sampler: SamplerConfig, images: Tensor
) -> dict[str, float]:
    """Export a network, and draw images from the packed model that it has drawn already.

    Args:
        network: Quantized.
        folder: Where to write; made anew.
        sampler: How the images were drawn.
        images: Images 0, 1, ... of all classes in turn, uint8; one batch of them is compared.

    Returns:
        Bytes of the packed model and of the float one, and the share of pixels that are the same.
    """
    exported = export_network(network, folder, overwrite=True)
    packed = load_quantized(folder)
    assert isinstance(packed, DiT)
    count = min(len(images), sampler.batch_size)
    [(_, drawn)] = sample_images(packed, sampler, range(count))
    same = to_uint8(drawn.cpu()) == images[:count].cpu()
    return {
        "bytes": exported.bytes,
        "float32_bytes": 4 * exported.float_parameters,
        "pixels_equal": float(same.double().mean()),
    }


def check_target(folder: Path, overwrite: bool) -> None:
    """Make sure that an export may write a folder, without touching it.

    Raises:
        FileExistsError: if it holds a packed model and that may not go, or anything else.
        NotADirectoryError: if it is a file.
        OSError: if nothing can be written there.
    """
    check_folder(folder, RESULTS, overwrite, _CURE)
    check_place(folder)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(present - {*RESULTS, _CARD})
    if foreign:
        raise FileExistsError(
            f"{folder} holds other files ({', '.join(foreign[:3])}), which a packed model would "
            "replace; choose a new or an empty folder"
        )


def _agreement(network: DiT, written: Path, inputs: Inputs) -> Agreement:
    agreement = verify_packed(network, load_quantized(written), tuple(inputs))
    try:
        agreement.check()
    except ValueError as error:
        raise ValueError(f"{error}; nothing was written") from error
    return agreement


@contextmanager
def _evaluating(network: DiT) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _other_branches(
    network: DiT, branch_dtype: BranchDtype | None
) -> list[tuple[QuantLinear, LowRank]]:
    """Layers, with their branches, whose branch training did not round to this dtype."""
    if branch_dtype is None:
        return []
    layers = [module for module in network.modules() if isinstance(module, QuantLinear)]
    found = [(layer, layer.config.low_rank) for layer in layers]
    return [(layer, low) for layer, low in found if low is not None and low.dtype != branch_dtype]


@contextmanager
def _rounded(
    network: DiT, branch_dtype: BranchDtype | None, float_dtype: BranchDtype
) -> Iterator[None]:
    """Have a network compute with what will be stored."""
    with ExitStack() as restore:
        for layer, low_rank in _other_branches(network, branch_dtype):
            assert branch_dtype is not None
            restore.callback(setattr, layer, "config", layer.config)
            rounded = replace(low_rank, dtype=branch_dtype)
            layer.config = replace(layer.config, low_rank=rounded)
        layers = [module for module in network.modules() if isinstance(module, QuantLinear)]
        inside = {id(value) for layer in layers for value in layer.parameters(recurse=False)}
        for value in network.parameters() if float_dtype != "float32" else ():
            if id(value) not in inside:
                restore.callback(setattr, value, "data", value.data)
                value.data = value.data.to(getattr(torch, float_dtype)).to(value.dtype)
        yield


def _float_parameters(network: DiT) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(**network.config).parameters())
