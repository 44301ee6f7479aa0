"""Packed folders written: one layer in memory at a time, the whole folder or nothing."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.export.digests import digest_for, digest_of
from dit_qat.export.entry import ModuleEntry, owned
from dit_qat.export.folders import check_place, written_folder
from dit_qat.export.layer_entry import Storage
from dit_qat.export.manifest import (
    CONFIG_FILE,
    TENSOR_FILE,
    VERSIONS,
    Manifest,
    TensorEntry,
    carried_digest,
    file_header,
    is_packed_folder,
)
from dit_qat.export.packers import PACKERS, PackOptions, quantized_layers
from dit_qat.export.registry import architecture_of, timestep_argument
from dit_qat.export.skeleton import add_biases, build_skeleton, stored_tensors
from dit_qat.export.tensor_file import TensorWriter, dtype_name
from dit_qat.export.unlike import check_modules, own_dtypes
from dit_qat.layers import QuantAttention
from dit_qat.layers.linear import BranchDtype

__all__ = ["check_target", "write_packed"]

_NO_DIGEST = "0" * 64


def write_packed(
    model: nn.Module,
    folder: Path | str,
    *,
    provenance: Mapping[str, Any] | None = None,
    branch_dtype: BranchDtype | None = None,
    float_dtype: BranchDtype | None = None,
    storage: Storage = "ternary_1.6",
    overwrite: bool = False,
) -> Manifest:
    """Write a quantized model as a packed folder.

    Args:
        model: Of a registered architecture, with at least one :class:`QuantLinear`,
            :class:`~dit_qat.layers.IntLinear` or :class:`~dit_qat.layers.CodedLinear`; unchanged.
        folder: Made at once or not at all.
        provenance: Plain values: source checkpoint, training, data, metrics.
        branch_dtype: What low-rank branches are rounded to; None: what they compute with. Another
            one gives another model than ``model`` is.
        float_dtype: What all that is not packed is stored in; None: each tensor in its own. It
            computes in float32 again.
        storage: Of the codes: five or four per byte.
        overwrite: Replace a packed folder that is there.

    Returns:
        What ``config.json`` says.

    Raises:
        FileExistsError: if ``folder`` is in use.
        ValueError: for a model that the format cannot hold, with the modules named, or for values
            that are not finite, or codes that are all the same.
        OSError: if the disk has no room for it, or cannot be written.
    """
    target = Path(folder)
    check_target(target, overwrite)
    _check_plain(provenance or {})
    dtype = None if float_dtype is None else getattr(torch, float_dtype)
    plan = _Plan(model, dtype, PackOptions(branch_dtype, storage))
    blank = plan.manifest({}, {})
    check_place(target, plan.total_bytes)
    with written_folder(target) as partial:
        with (partial / TENSOR_FILE).open("wb") as file:
            writer = TensorWriter(file, plan.tensors, file_header(blank, _NO_DIGEST))
            digests = {}
            for name, tensor in plan.computed():
                writer.write(name, tensor)
                digests[name] = digest_of(tensor, digest_for(VERSIONS[-1]))
            manifest = plan.manifest(digests, provenance or {})
            text = manifest.as_text().encode()
            writer.finish(file_header(manifest, _digest(manifest, text)))
        (partial / CONFIG_FILE).write_bytes(text)
    return manifest


class _Plan:
    """What will be written, known before anything is computed."""

    def __init__(
        self, model: nn.Module, float_dtype: torch.dtype | None, options: PackOptions
    ) -> None:
        self._model, self._options = model, options
        self._architecture = architecture_of(model)
        self._arguments = dict(self._architecture.describe(model))
        self._quantized = quantized_layers(model)
        if not self._quantized:
            raise ValueError(
                f"this {type(model).__name__} has no quantized layers to pack; train one with a "
                "method, or write the float model with dit-qat convert"
            )
        self._layers = {n: _entry(n, m, options) for n, m in self._quantized.items()}
        if any(entry.by_timestep for entry in self._layers.values()):
            timestep_argument(self._architecture, model)
        self._attention_bits = {
            name: module.config.bits
            for name, module in model.named_modules()
            if isinstance(module, QuantAttention)
        }
        skeleton = build_skeleton(
            self._architecture.name, self._arguments, self._layers, self._attention_bits
        )
        add_biases(skeleton, (name for name, _ in model.named_parameters()))
        check_modules(model, skeleton)
        tied = self._architecture.tied(skeleton)
        self.tensors = stored_tensors(skeleton, self._layers, float_dtype or torch.float32, tied)
        if float_dtype is None:
            self.tensors |= own_dtypes(model, self.tensors, self._layers)

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        sizes = (torch.Size(shape).numel() * d.itemsize for d, shape in self.tensors.values())
        return sum(sizes)

    def computed(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as it is stored, a layer at a time."""
        for name, layer in self._quantized.items():
            try:
                yield from self._packed(name, layer)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        for name, value in self._model.state_dict().items():
            if name in self.tensors and owned(name, self._layers) is None:
                stored = value.detach().to(self.tensors[name][0])
                if not stored.isfinite().all():
                    raise ValueError(
                        f"{name} holds NaN or infinite values, or larger ones than {stored.dtype} "
                        "has; take another checkpoint, or another float_dtype"
                    )
                yield name, stored

    def _packed(self, name: str, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for leaf, tensor in PACKERS[type(layer)].tensors(layer, self._options):
            yield f"{name}.{leaf}", tensor

    def manifest(self, digests: Mapping[str, str], provenance: Mapping[str, Any]) -> Manifest:
        """What ``config.json`` says."""
        return Manifest(
            architecture=self._architecture.name,
            arguments=self._arguments,
            layers=self._layers,
            attention_bits=self._attention_bits,
            tensors={
                name: TensorEntry(dtype_name(dtype), shape, digests.get(name, _NO_DIGEST))
                for name, (dtype, shape) in self.tensors.items()
            },
            provenance=provenance,
            written_by={"dit_qat": version("dit-qat"), "torch": torch.__version__},
            embedded=self._architecture.embeds,
        )


def _digest(manifest: Manifest, text: bytes) -> str:
    if manifest.embedded:
        return carried_digest(manifest.carried())
    return hashlib.sha256(text).hexdigest()


def _entry(name: str, layer: nn.Module, options: PackOptions) -> ModuleEntry:
    try:
        return PACKERS[type(layer)].entry(layer, options)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _check_plain(provenance: Mapping[str, Any]) -> None:
    try:
        json.dumps(provenance, allow_nan=False, sort_keys=True)  # as it will be written
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"provenance holds what JSON does not ({error}); give plain values"
        ) from error


def check_target(target: Path, overwrite: bool) -> None:
    """Make sure that a folder may be written, without touching it.

    Raises:
        FileExistsError: if it holds a packed model that may not go, or anything else.
        NotADirectoryError: if it is a file.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; choose another folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not is_packed_folder(target):
        raise FileExistsError(f"{target} holds other files; choose a new or an empty folder")
    if not overwrite:
        raise FileExistsError(
            f"{target} already holds a packed model; add --overwrite, or choose another folder"
        )
