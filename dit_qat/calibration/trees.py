"""Nested containers of tensors and plain values: what a module takes and returns."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "load_leaf",
    "load_tree",
    "map_leaves",
    "map_tensors",
    "replacing",
    "save_tree",
    "tensors_of",
]

_STRUCTURE = "structure"
_PLAIN = (bool, int, float, str, type(None))


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Copy the containers (tuples, lists, dicts) of a tree and put ``function(leaf)`` in them."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        items = [map_leaves(function, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(tree)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Copy a tree with ``function(tensor)`` for each tensor, in order, and other leaves as is."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def replacing(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree as one safetensors file, whole or not at all.

    Raises:
        ValueError: for a leaf that is neither a tensor nor None, a bool, a number or text.
        OSError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(tree, tensors))

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata={_STRUCTURE: structure})
        except (SafetensorError, RuntimeError) as error:
            raise OSError(
                f"could not write {path} ({error}); free space or choose another folder"
            ) from error

    replacing(path, write)


def load_tree(path: Path) -> Any:
    """Read what :func:`save_tree` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})[_STRUCTURE])
            # Copies: products round by alignment, which in a mapped file is anything.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return _decode(structure, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it, it is made again") from error


def load_leaf(path: Path, leaf: int) -> Tensor:
    """Read the ``leaf``-th tensor of a tree, and no other.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or has fewer tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(str(leaf)).clone()
            return tensor
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it, it is made again") from error


def _encode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        # A copy, for a view would bring all of its storage, and two names may not share one.
        tensors[name] = tree.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": [[key, _encode(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, tuple | list):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_encode(value, tensors) for value in tree]}
    if isinstance(tree, _PLAIN):
        return {"value": tree}
    raise ValueError(
        f"a value of type {type(tree).__name__} among the inputs of the model cannot be kept on "
        "disk; call the model with tensors and plain values, or keep the calls in memory"
    )


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in value}
    if kind in ("tuple", "list"):
        items: Iterator[Any] = (_decode(item, tensors) for item in value)
        return tuple(items) if kind == "tuple" else list(items)
    if kind == "value":
        return value
    raise ValueError(f"unknown kind {kind!r}")
