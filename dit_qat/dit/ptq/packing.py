"""A quantized model as a packed folder: written, loaded again, run, and only then named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.calibration import Call, evaluating
from dit_qat.calibration.trees import map_tensors
from dit_qat.export.folders import written_folder
from dit_qat.export.loader import load_quantized
from dit_qat.export.manifest import CONFIG_FILE, TENSOR_FILE, Manifest
from dit_qat.export.verify import Agreement, verify_packed
from dit_qat.export.writer import check_target, write_packed

__all__ = ["PackedModel", "match_dtypes_", "pack_quantized"]


@dataclass(frozen=True)
class PackedModel:
    """What was written, and how it was checked.

    Attributes:
        folder: Where.
        manifest: What ``config.json`` says.
        agreement: Of the packed model with the one in memory, the worst over all calls.
        bytes: Of both files.
    """

    folder: Path
    manifest: Manifest
    agreement: Agreement
    bytes: int


def pack_quantized(
    model: nn.Module,
    folder: Path,
    calls: Sequence[Call],
    *,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> PackedModel:
    """Pack a model, run what was written against it layer by layer, and refuse what differs.

    Args:
        model: Quantized after training, of any device and dtype; unchanged. Floats are stored in
            the dtype that they have.
        folder: Made at once or not at all.
        calls: What to run both on; with bits by timestep, better of several timesteps.
        provenance: Plain values: source, method, calibration, metrics.
        overwrite: Replace a packed folder that is there.

    Raises:
        FileExistsError: if the folder is in use.
        ValueError: if both differ, naming the layer; without calls; or as
            :func:`~dit_qat.export.write_packed`.
        OSError: if there is no room.
    """
    if not calls:
        raise ValueError("no calls to compare the packed model on; give at least one")
    check_target(folder, overwrite)
    with written_folder(folder) as place:
        manifest = write_packed(model, place / "model", provenance=provenance)
        agreement = _agreement(model, place / "model", calls)
        for name in (CONFIG_FILE, TENSOR_FILE):
            (place / "model" / name).rename(place / name)
        (place / "model").rmdir()
    size = sum((folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))
    return PackedModel(folder, manifest, agreement, size)


@torch.no_grad()
def match_dtypes_(model: nn.Module, like: nn.Module) -> None:
    """Give float parameters and buffers the dtypes that those of the same names have elsewhere.

    What is loaded computes in float32; this turns it into what was packed.
    """
    wanted = {name: value.dtype for name, value in _tensors(like) if value.is_floating_point()}
    for name, value in _tensors(model):
        dtype = wanted.get(name)
        if dtype is not None and value.dtype != dtype:
            value.data = value.data.to(dtype)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = model.named_parameters(remove_duplicate=False)
    return [*parameters, *model.named_buffers(remove_duplicate=False)]


def _agreement(model: nn.Module, written: Path, calls: Sequence[Call]) -> Agreement:
    device = _tensors(model)[0][1].device
    packed = load_quantized(written, device)
    match_dtypes_(packed, model)
    layers: dict[str, float] = {}
    output = 0.0
    with evaluating(model):
        for call in calls:
            args, kwargs = map_tensors(lambda tensor: tensor.to(device), (call.args, call.kwargs))
            found = verify_packed(model, packed, args, kwargs)
            layers = {n: max(d, layers.get(n, 0.0)) for n, d in found.layers.items()}
            output = max(output, found.output)
    agreement = Agreement(layers, output)
    try:
        agreement.check()
    except ValueError as error:
        raise ValueError(f"{error}; nothing was written") from error
    return agreement
