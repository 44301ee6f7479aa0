"""Packed folders read back: strictly, one tensor at a time, never as floats."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_qat.export.layer_entry import LayerEntry
from dit_qat.export.manifest import TENSOR_FILE, Manifest, read_manifest_and_digest
from dit_qat.export.skeleton import build_skeleton, check_names, check_tensors, listed
from dit_qat.export.tensor_file import TensorFile, open_tensors
from dit_qat.primitives.packing import base3_to_ternary, check_base3, check_ternary

__all__ = ["load_quantized"]

DIGEST_KEY = "config_sha256"


def load_quantized(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Load a packed model, in evaluation mode, without gradients.

    Codes stay codes: storage of five per byte becomes four per byte, tensor by tensor.

    Args:
        folder: What ``dit-qat export`` wrote.
        device: Where the model goes.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder is damaged, changed, incomplete, or of an unknown version or
            architecture.
    """
    folder = Path(folder)
    manifest, digest = read_manifest_and_digest(folder)
    with open_tensors(folder / TENSOR_FILE) as file:
        _check_digest(folder, file.metadata, digest)
        try:
            check_names("the file", file.places, manifest.tensors, "config.json lists")
            with _loading(file, manifest) as coming:
                model = build_skeleton(
                    manifest.architecture,
                    manifest.arguments,
                    manifest.layers,
                    manifest.attention_bits,
                )
                check_tensors(model, manifest, file.places)
                for name, tensor in coming.items():
                    _install(model, name, tensor.result().to(device))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    _check_complete(model, manifest.architecture)
    return model.eval().requires_grad_(False)


@contextmanager
def _loading(file: TensorFile, manifest: Manifest) -> Iterator[dict[str, Future[Tensor]]]:
    """Read, check and unpack tensors in the background; reading and hashing are half the time."""
    pool = ThreadPoolExecutor(max_workers=2)
    try:
        yield {name: pool.submit(_resident, name, file, manifest) for name in file.places}
    finally:
        pool.shutdown(cancel_futures=True)


def _check_digest(folder: Path, metadata: Mapping[str, str], digest: str) -> None:
    if metadata.get(DIGEST_KEY) != digest:
        raise ValueError(
            f"{folder}: config.json is not the one that was written with {TENSOR_FILE} (its sha256 "
            "differs), so it was damaged, changed or mixed with another export; copy the whole "
            "folder again, or export it again"
        )


def _resident(name: str, file: TensorFile, manifest: Manifest) -> Tensor:
    """A tensor as it is in memory."""
    tensor, digest = file.read(name)
    if digest != manifest.tensors[name].sha256:
        raise ValueError(
            f"the bytes of {name} are not those that were written (their sha256 differs); the file "
            "is damaged, so copy or export it again"
        )
    owner, _, leaf = name.rpartition(".")
    entry = manifest.layers.get(owner)
    try:
        if entry is None:
            return _checked(tensor.float()) if tensor.is_floating_point() else tensor
        if leaf == "codes":
            return _resident_codes(tensor, entry)
        return _checked(tensor, positive=leaf == "scale")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _resident_codes(packed: Tensor, entry: LayerEntry) -> Tensor:
    if entry.storage == "ternary_2":
        check_ternary(packed, entry.in_features)
        return packed
    check_base3(packed, entry.in_features)
    return base3_to_ternary(packed, entry.in_features)


def _checked(tensor: Tensor, positive: bool = False) -> Tensor:
    if tensor.numel():
        least, most = (float(bound) for bound in tensor.aminmax())  # both are NaN if any is
        if not isfinite(least) or not isfinite(most):
            raise ValueError("holds NaN or infinite values; export another checkpoint")
        if positive and least <= 0:
            raise ValueError(f"holds scales down to {least}, which must be above zero")
    return tensor


def _install(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    is_parameter = leaf in dict(module.named_parameters(recurse=False))
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _check_complete(model: nn.Module, architecture: str) -> None:
    """Refuse what no file can fill: buffers that are not saved with a model."""
    rest = [name for name, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    if rest:
        raise ValueError(
            f"the builder of {architecture!r} leaves {listed(rest)} without values; it must make "
            "what a state dict does not hold on the CPU"
        )
