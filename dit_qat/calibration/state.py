"""Finished blocks on disk, so that a killed run goes on where it was."""

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dit_qat.calibration.trees import load_tree, replacing, save_tree, tensors_of
from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.int_linear import IntLinear, IntLinearConfig
from dit_qat.layers.weight_code import Room, code_named

__all__ = [
    "ModuleCodec",
    "ResumeState",
    "fingerprint",
    "register_codec",
    "remove_state",
    "tensors_digest",
]

_STATE = "state.json"
_SAMPLED = 1024
_BLOCKS, _NOTES = "block_*.safetensors", "notes_*.safetensors"
_OWN = (_STATE, _BLOCKS, _NOTES, ".*.tmp", ".lock")


class ModuleCodec(Protocol):
    """How modules of one class are told in plain values and built again."""

    def describe(self, module: Any) -> dict[str, Any]:
        """Plain values from which :meth:`build` makes a module of the same shapes."""

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        """A module, perhaps on the meta device, whose state dict is about to be replaced."""


class _LinearCodec:
    def describe(self, module: nn.Linear) -> dict[str, Any]:
        return _sizes(module)

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        return nn.Linear(**description, device="meta")


class _IntLinearCodec:
    def describe(self, module: IntLinear) -> dict[str, Any]:
        return {**_sizes(module), "config": module.config.plain()}

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        config = IntLinearConfig.from_plain(description["config"])
        return IntLinear(**{**description, "config": config}, device="meta")


class _CodedLinearCodec:
    def describe(self, module: CodedLinear) -> dict[str, Any]:
        tensors = {name: module.get_buffer(name) for name in module.code_names}
        rooms = {
            n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()
        }
        return {
            **_sizes(module),
            "code": module.kind.name,
            "settings": module.settings,
            "rooms": rooms,
        }

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        given = dict(description)
        return CodedLinear.with_room(
            code_named(given["code"]),
            given["settings"],
            (given["out_features"], given["in_features"]),
            {n: Room(tuple(s), getattr(torch, t)) for n, (s, t) in given["rooms"].items()},
            given["bias"],
        )


def _sizes(module: nn.Linear | IntLinear | CodedLinear) -> dict[str, Any]:
    sizes = {"in_features": module.in_features, "out_features": module.out_features}
    return {**sizes, "bias": module.bias is not None}


_CODECS: dict[str, ModuleCodec] = {
    "Linear": _LinearCodec(),
    "IntLinear": _IntLinearCodec(),
    "CodedLinear": _CodedLinearCodec(),
}


def register_codec(module_class: type[nn.Module], codec: ModuleCodec) -> None:
    """Teach :class:`ResumeState` to keep modules of another class."""
    _CODECS[module_class.__name__] = codec


class _TwinCodec:
    """Modules that differ from the one in the model by their values alone, such as norms."""

    def __init__(self, original: nn.Module) -> None:
        self.original = original

    def describe(self, module: nn.Module) -> dict[str, Any]:
        return {}

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        return deepcopy(self.original)


def _codec(name: str, kind: str, model: nn.Module | None) -> ModuleCodec:
    if kind in _CODECS:
        return _CODECS[kind]
    original = None if model is None else model.get_submodule(name)
    if original is None or type(original).__name__ != kind:
        raise ValueError(
            f"{name} is a {kind}, which no finished block can be kept with; register a codec for "
            "it, or run without a state folder"
        )
    return _TwinCodec(original)


class ResumeState:
    """A folder of finished blocks, each whole or absent.

    Args:
        folder: Where they are.
        fingerprint: Of all that decides the result: model, calls, method and its configuration.

    Raises:
        ValueError: if the folder holds blocks of another fingerprint.
        FileExistsError: if it holds files, and none of a run.
    """

    version: ClassVar[int] = 1

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(folder), fingerprint
        path, wanted = self.folder / _STATE, {"version": self.version, "fingerprint": fingerprint}
        if not self._is_ours(path, wanted):
            self._check_free()
            for notes in self.folder.glob(_NOTES):
                notes.unlink()
            text = json.dumps(wanted, indent=2) + "\n"

            def write(temporary: Path) -> None:
                temporary.write_text(text, encoding="utf-8")

            replacing(path, write)

    def save(
        self, index: int, modules: Mapping[str, nn.Module], model: nn.Module | None = None
    ) -> None:
        """Keep the modules of a finished block, by full name.

        Args:
            index: Of the block.
            modules: What the block is quantized with.
            model: In which they take the place of others; modules of the same classes as those
                need no codec.

        Raises:
            ValueError: for a module of a class without codec.
        """
        entries = {}
        for name, module in modules.items():
            kind = type(module).__name__
            tensors = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
            description = _codec(name, kind, model).describe(module)
            entries[name] = {"kind": kind, "description": description, "tensors": tensors}
        save_tree(self._path(index), entries)

    def load(self, index: int, model: nn.Module | None = None) -> dict[str, nn.Module] | None:
        """The modules of a block, on the CPU; None if it was not finished.

        Args:
            index: Of the block.
            model: As for :meth:`save`.

        Raises:
            ValueError: if its file is damaged.
        """
        path = self._path(index)
        if not path.is_file():
            return None
        found = {}
        for name, entry in load_tree(path).items():
            module = _codec(name, entry["kind"], model).build(entry["description"])
            _fill(module, entry["tensors"])
            found[name] = module
        return found

    def save_notes(self, index: int, notes: Mapping[str, Any]) -> None:
        """Keep plain values about a block; before the block itself, which makes them count."""
        save_tree(self.folder / f"notes_{index:04d}.safetensors", dict(notes))

    def all_notes(self) -> dict[str, Any]:
        """Plain values about all blocks."""
        found: dict[str, Any] = {}
        for path in sorted(self.folder.glob(_NOTES)):
            found |= load_tree(path)
        return found

    def _path(self, index: int) -> Path:
        return self.folder / f"block_{index:04d}.safetensors"

    def _is_ours(self, path: Path, wanted: Mapping[str, Any]) -> bool:
        """Whether the folder is of this run; of another, unless it has finished no block."""
        if not path.is_file():
            return False
        finished = any(self.folder.glob(_BLOCKS))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            if not finished:
                return False
            raise ValueError(f"{path} is damaged ({error}); remove {self.folder}") from error
        if found != wanted and finished:
            raise ValueError(
                f"{self.folder} holds finished blocks of another run (model, calibration, method "
                "or configuration differ); choose another folder, or remove it to start over"
            )
        return bool(found == wanted)

    def _check_free(self) -> None:
        """Refuse to mix a run's files with others, which somebody may want to keep."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        names = (path.name for path in found)
        other = next((n for n in names if not any(fnmatchcase(n, own) for own in _OWN)), None)
        if other is not None:
            raise FileExistsError(
                f"{self.folder} holds other files, such as {other}, and no finished blocks; choose "
                "a new or an empty folder for them"
            )


def remove_state(folder: Path) -> None:
    """Remove what :class:`ResumeState` keeps, and the folder if nothing else is in it."""
    for pattern in _OWN:
        for path in folder.glob(pattern):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in, keeping the dtype of each, and what else a state dict holds."""
    extra = {k: v for k, v in module.state_dict().items() if not isinstance(v, Tensor)}
    module.load_state_dict({**extra, **tensors}, assign=True)


def fingerprint(model: nn.Module) -> str:
    """Tell models apart: class, names and shapes, and a sample of the values of each tensor."""
    return type(model).__name__ + ":" + tensors_digest(model.state_dict())


def tensors_digest(tree: Any) -> str:
    """Tell trees of tensors apart, by shapes and a sample of the values of each."""
    digest = hashlib.blake2b(digest_size=16)
    names = tree.keys() if isinstance(tree, Mapping) else ()
    digest.update("/".join(names).encode())
    for tensor in tensors_of(tree):
        digest.update(f"{tuple(tensor.shape)}/{tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        # A copy: one number with stride 0 counts as contiguous, but cannot be viewed as bytes.
        sample = (
            flat[:: max(1, flat.numel() // _SAMPLED)]
            .cpu()
            .clone(memory_format=torch.contiguous_format)
        )
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
