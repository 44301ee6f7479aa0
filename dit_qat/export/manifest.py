"""``config.json`` of a packed folder: what the tensors are and where they came from."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dit_qat.export.coded_entry import CODED_LINEAR, CodedEntry
from dit_qat.export.digests import digest_for
from dit_qat.export.entry import ModuleEntry
from dit_qat.export.int_entry import INT_LINEAR, IntEntry
from dit_qat.export.layer_entry import LINEAR, LayerEntry
from dit_qat.layers import AttentionConfig

__all__ = [
    "CARRIER",
    "CONFIG_FILE",
    "DIGEST_KEY",
    "FIRST_BIASES",
    "FORMAT",
    "QUANT_METHOD",
    "TENSOR_FILE",
    "VERSIONS",
    "Manifest",
    "TensorEntry",
    "carried_digest",
    "check_arguments",
    "file_header",
    "is_packed_folder",
    "manifest_of",
    "read_manifest",
]

FORMAT = "dit_qat.packed"
QUANT_METHOD = "dit_qat"  # by which transformers finds its quantizer
VERSIONS = (1, 2, 3, 4)  # that are read; the last one is written
FIRST_BIASES = 3  # the first version with biases that an architecture does not have
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"

CARRIER = "quantization_config"  # the part of transformers' config.json that holds a manifest
DIGEST_KEY = "config_sha256"

_EMBEDDED = "manifest_sha256"
_FIRST_EMBEDDED = 3
_FIRST_COVERED = 4  # the first version whose digest covers the rest of transformers' config.json
_ARGUMENTS = "arguments_sha256"
_NOT_COVERED = (CARRIER, "transformers_version", "_name_or_path")
_ATTENTION = "attention"
_LINEARS: dict[str, Callable[[Mapping[str, Any]], ModuleEntry]] = {
    LINEAR: LayerEntry.from_json,
    INT_LINEAR: IntEntry.from_json,
    CODED_LINEAR: CodedEntry.from_json,
}
_KEYS = {"format", "version", "architecture", "modules", "tensors", "provenance", "written_by"}


class TensorEntry(NamedTuple):
    """A tensor as it is in the file; which digest it has is the version's to say."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Manifest:
    """All that a packed folder says about itself.

    Attributes:
        architecture: Name in the registry.
        arguments: Plain values that build the float model.
        layers: Packed linear layers by module name.
        attention_bits: Bits of the attention products by module name; others are float.
        tensors: All tensors of the file by name.
        provenance: Source checkpoint, training, data, metrics: plain values, not interpreted.
        written_by: Versions.
        version: Of the format.
        embedded: Whether ``config.json`` is that of transformers, the architecture's arguments,
            with all the rest inside.
    """

    architecture: str
    arguments: Mapping[str, Any]
    layers: Mapping[str, ModuleEntry]
    attention_bits: Mapping[str, int]
    tensors: Mapping[str, TensorEntry]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    written_by: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSIONS[-1]
    embedded: bool = False

    @property
    def activation_bits(self) -> dict[str, float | None]:
        """The bit map: activation bits of every packed layer; None where activations are float.

        Of a policy, the mean over its timesteps.
        """
        return {name: entry.activation_bits for name, entry in self.layers.items()}

    def as_text(self) -> str:
        """JSON, keys in order, a line per module and per tensor: the same bytes every time.

        Raises:
            ValueError: for arguments or provenance that are no plain, finite values.
        """
        if self.embedded:
            content = {**self.arguments, CARRIER: self.carried()}
            return _rendered(content, depth=3) + "\n"
        architecture = {"name": self.architecture, "arguments": dict(self.arguments)}
        return _rendered({**self._sections(), "architecture": architecture}, depth=2) + "\n"

    def carried(self) -> dict[str, Any]:
        """What a ``config.json`` of transformers says about quantization."""
        carried = {
            **self._sections(),
            "architecture": self.architecture,
            "quant_method": QUANT_METHOD,
        }
        if self.version >= _FIRST_COVERED:
            carried[_ARGUMENTS] = _digest_of_arguments(self.arguments)
        return carried

    def _sections(self) -> dict[str, Any]:
        digest = digest_for(self.version)
        modules = {name: entry.as_json() for name, entry in self.layers.items()}
        for name, bits in self.attention_bits.items():
            modules[name] = {"kind": _ATTENTION, "bits": bits}
        return {
            "format": FORMAT,
            "modules": modules,
            "provenance": dict(self.provenance),
            "tensors": {
                name: {"dtype": e.dtype, "shape": list(e.shape), digest: e.digest}
                for name, e in self.tensors.items()
            },
            "version": self.version,
            "written_by": dict(self.written_by),
        }


def file_header(manifest: Manifest, digest: str) -> dict[str, str]:
    """What the header of the tensor file says, beside the tensors.

    Args:
        manifest: Of the folder.
        digest: Of the bytes of ``config.json``, or of what is embedded there.
    """
    version = str(manifest.version)
    if manifest.embedded:  # transformers asks for the format "pt"
        return {"format": "pt", "quant_method": QUANT_METHOD, "version": version, _EMBEDDED: digest}
    return {"format": FORMAT, "version": version, DIGEST_KEY: digest}


def carried_digest(carried: Mapping[str, Any]) -> str:
    """sha256 of what is embedded, however it is laid out; of JSON without spaces, keys in order."""
    text = json.dumps(carried, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of_arguments(arguments: Mapping[str, Any]) -> str:
    return carried_digest({k: v for k, v in arguments.items() if k not in _NOT_COVERED})


def check_arguments(carried: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` of transformers whose own part is not the one that was written.

    Args:
        carried: What is embedded there.
        arguments: All else; what else is there may be missing.

    Raises:
        ValueError: if a setting of the model was damaged or changed.
    """
    if carried.get(_ARGUMENTS) not in (None, _digest_of_arguments(arguments)):
        raise ValueError(
            "config.json is not the one that was written: what it says outside quantization_config "
            "was damaged or changed (its sha256 differs); copy the whole folder again, or load the "
            "one that was written and save it with another setting"
        )


def is_packed_folder(path: Path) -> bool:
    """Whether a folder says that it is packed, whatever its version or state."""
    try:
        content = _parsed(path / CONFIG_FILE, (path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return _says_packed(content)


def _says_packed(content: object) -> bool:
    if not isinstance(content, dict):
        return False
    carried = content.get(CARRIER)
    return content.get("format") == FORMAT or (
        isinstance(carried, dict) and carried.get("quant_method") == QUANT_METHOD
    )


def read_manifest(folder: Path | str) -> Manifest:
    """Read what a packed folder holds, without its tensors.

    Raises:
        FileNotFoundError: if it has no ``config.json``.
        ValueError: if that is damaged, of another format, or of an unknown version.
    """
    return read_manifest_and_digest(Path(folder))[0]


def read_manifest_and_digest(folder: Path) -> tuple[Manifest, str]:
    """A manifest and the sha256 of its file, which the tensor file repeats."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; give a folder that dit-qat export wrote, and copy it whole"
        )
    data = path.read_bytes()  # once, so that what is understood is what is hashed
    content = _parsed(path, data)
    if not _says_packed(content):
        raise ValueError(f"{path} is not of a packed folder; give one that dit-qat export wrote")
    try:
        if content.get("format") == FORMAT:
            return manifest_of(content), hashlib.sha256(data).hexdigest()
        carried = content.pop(CARRIER)
        manifest = manifest_of(carried, content)
        check_arguments(carried, content)
        return manifest, carried_digest(carried)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def manifest_of(content: Mapping[str, Any], arguments: Mapping[str, Any] | None = None) -> Manifest:
    """Understand what was parsed.

    Args:
        content: All of a ``config.json`` of ours, or what is embedded in one of transformers.
        arguments: The rest of the latter; None for one of ours.

    Raises:
        ValueError: for another version, or anything that no writer writes.
    """
    version = content.get("version")
    if type(version) is not int or version not in VERSIONS:
        known = [str(known) for known in VERSIONS]
        raise ValueError(
            f"the format's version is {version!r}, and this dit_qat reads "
            f"{', '.join(known[:-1])} and {known[-1]}; install the version that wrote it, or "
            "export the checkpoint again"
        )
    if arguments is None:
        return _from_json(content)
    covered = (_ARGUMENTS,) if version >= _FIRST_COVERED else ()
    if not all(isinstance(content.get(key), str) for key in covered):
        raise ValueError(f"version {version} has {_ARGUMENTS}, and there is none")
    added = ("quant_method", *covered)
    inner = {key: value for key, value in content.items() if key not in added}
    named = {"name": content.get("architecture"), "arguments": dict(arguments)}
    manifest = _from_json({**inner, "architecture": named})
    if content.get("quant_method") != QUANT_METHOD or version < _FIRST_EMBEDDED:
        raise ValueError(f"version {version} is not embedded in a config of transformers")
    return replace(manifest, embedded=True)


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); copy or export it again") from error


def _from_json(content: Mapping[str, Any]) -> Manifest:
    if content.keys() != _KEYS:
        raise ValueError(f"it has the keys {sorted(content)}, not {sorted(_KEYS)}")
    for key in _KEYS - {"format", "version"}:
        if not isinstance(content[key], dict):
            raise ValueError(f"{key} is no JSON object")
    architecture = content["architecture"]
    if architecture.keys() != {"name", "arguments"} or not isinstance(architecture["name"], str):
        raise ValueError("architecture has no name and arguments")
    if not isinstance(architecture["arguments"], dict):
        raise ValueError("the architecture's arguments are no JSON object")
    digest = digest_for(content["version"])
    layers: dict[str, ModuleEntry] = {}
    attention: dict[str, int] = {}
    for name, entry in content["modules"].items():
        try:
            _read_module(name, entry, layers, attention)
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from error
    needed = max((entry.version for entry in layers.values()), default=1)
    if needed > content["version"]:
        raise ValueError(f"version {content['version']} has no modules of version {needed}")
    return Manifest(
        architecture=architecture["name"],
        arguments=architecture["arguments"],
        layers=layers,
        attention_bits=attention,
        tensors={name: _tensor(name, entry, digest) for name, entry in content["tensors"].items()},
        provenance=content["provenance"],
        written_by=content["written_by"],
        version=content["version"],
    )


def _read_module(
    name: str, entry: Any, layers: dict[str, ModuleEntry], attention: dict[str, int]
) -> None:
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if isinstance(kind, str) and kind in _LINEARS:
        layers[name] = _LINEARS[kind](entry)
    elif kind == _ATTENTION and entry.keys() == {"kind", "bits"} and type(entry["bits"]) is int:
        attention[name] = AttentionConfig(entry["bits"]).bits
    else:
        kinds = ", ".join((*_LINEARS, _ATTENTION))
        raise ValueError(f"{entry!r} is of none of the kinds {kinds}")


def _tensor(name: str, entry: Any, digest: str) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", digest}:
        raise ValueError(f"tensor {name!r} has no dtype, shape and {digest}")
    shape = entry["shape"]
    sizes = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not sizes or not isinstance(entry["dtype"], str) or not isinstance(entry[digest], str):
        raise ValueError(f"tensor {name!r} has a damaged entry, {entry!r}")
    return TensorEntry(entry["dtype"], tuple(shape), entry[digest])


def _rendered(content: Mapping[str, Any], depth: int, indent: str = "") -> str:
    """JSON with a line per entry down to ``depth`` levels of objects."""
    lines = []
    for key in sorted(content):
        value = content[key]
        text = (
            _rendered(value, depth - 1, indent + " ")
            if depth > 1 and isinstance(value, dict) and value
            else json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
        )
        lines.append(f"{indent} {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
