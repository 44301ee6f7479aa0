"""The files of a latent cache: shards of moments, and the index beside them (docs/latents.md)."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from dit_qat.dit.models.autoencoder import LatentSpace
from dit_qat.export.files import write_json, written_whole

__all__ = [
    "DTYPES",
    "INDEX",
    "DamagedShardError",
    "Index",
    "Settings",
    "Shard",
    "ShardFile",
    "file_sha256",
    "read_index",
    "shard_name",
    "write_index",
    "write_shard",
]

FORMAT = "dit-qat-latents"
VERSION = 1
INDEX = "index.json"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
"""How moments may be stored."""

_CODES = {"float16": ("F16", "<f2"), "float32": ("F32", "<f4")}
_RECORD = "dit_qat"
_CURE = "run dit-qat cache-latents again with the same options: it rewrites that shard"
_HASH_BLOCK = 1 << 24
_PLACES = ("latent_space.source", "source.root", "source.path")


class DamagedShardError(ValueError):
    """A shard that is missing, cut short, or not what the index says."""


@dataclass(frozen=True)
class Settings:
    """What every shard of a cache has in common.

    Attributes:
        latent_space: The autoencoder.
        image_size: Pixels a side, of the images that were encoded.
        crop: How pictures became images of that size.
        dtype: Of the moments: float16 or float32.
        shard_images: Pictures per shard; the last one has the rest.
        source: Identity of the pictures (:meth:`Pictures.identity`).
    """

    latent_space: LatentSpace
    image_size: int
    crop: str
    dtype: str
    shard_images: int
    source: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int, int, int]:
        """Of the moments of one image: (2 mirrors, 2 moments, C, h, w)."""
        side = self.latent_space.side(self.image_size)
        return (2, 2, self.latent_space.channels, side, side)

    @property
    def image_bytes(self) -> int:
        """On disk, for one image."""
        return int(np.prod(self.image_shape)) * DTYPES[self.dtype].itemsize

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Settings":
        """Read what ``asdict`` gave; raises KeyError or TypeError for anything else."""
        values = {name: content[name] for name in cls.__annotations__}
        return cls(**values | {"latent_space": LatentSpace(**content["latent_space"])})

    def differences(self, other: "Settings") -> list[str]:
        """What differs, as text; where the pictures and the autoencoder lie does not count."""
        mine, theirs = self._flat(), other._flat()
        return [
            f"{name} {mine.get(name)!r} instead of {theirs.get(name)!r}"
            for name in mine | theirs
            if mine.get(name) != theirs.get(name)
        ]

    def _flat(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            inner = value if isinstance(value, dict) else {"": value}
            flat |= {f"{name}.{key}".rstrip("."): inner[key] for key in inner}
        return {name: value for name, value in flat.items() if name not in _PLACES}


@dataclass(frozen=True)
class Shard:
    """One file of a cache, as the index lists it.

    Attributes:
        name: Of the file.
        first: Number of its first image among those of the cache.
        count: Of its images; fewer than its pictures if some were broken.
        bytes: Size of the file.
        sha256: Of the file.
        skipped: Broken pictures that were left out.
    """

    name: str
    first: int
    count: int
    bytes: int
    sha256: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Index:
    """What a cache holds."""

    settings: Settings
    shards: tuple[Shard, ...]

    @property
    def num_images(self) -> int:
        """Images in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Classes of the pictures; 0 if they have none."""
        return int(self.settings.source["num_classes"])


def shard_name(number: int) -> str:
    """Of the shard of that number, from 0."""
    return f"moments-{number:05d}.safetensors"


def write_shard(
    path: Path, moments: Tensor, labels: Tensor, settings: Settings, skipped: list[str]
) -> Shard:
    """Write a shard, whole or not at all.

    Args:
        path: Of the file.
        moments: (n, 2 mirrors, 2 moments, C, h, w) in the dtype of the settings.
        labels: (n,), int64.
        settings: Of the cache; kept in the header.
        skipped: Names of broken pictures.

    Returns:
        Its line of the index, with ``first`` 0.

    Raises:
        OSError: if it cannot be written, above all for lack of space; finished shards stay.
    """
    # One entry, since safetensors writes several in random order, and equal shards shall be equal.
    record = {"format": FORMAT, "version": VERSION, **asdict(settings), "skipped": skipped}
    content = save({"moments": moments, "labels": labels}, {_RECORD: json.dumps(record)})
    try:
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{path}: no space left for its {len(content)} bytes ({error.strerror}); the finished "
            "shards are whole: make room and run the same command again"
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    return Shard(path.name, 0, len(moments), len(content), sha256, tuple(skipped))


def file_sha256(path: Path) -> str:
    """Of a file of any size, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class ShardFile:
    """A shard on disk, memory-mapped when its images are first asked for.

    Args:
        path: Of the file.

    Attributes:
        settings: Of the cache that it was written for.
        skipped: Broken pictures that were left out.
        count: Number of images.
        labels: (count,), int64.

    Raises:
        DamagedShardError: if it is not there, cut short, or no shard of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._parse()
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"damaged ({error})" if path.exists() else "missing"
            raise DamagedShardError(f"{path}: {reason}; {_CURE}") from error
        self._moments: np.ndarray[Any, Any] | None = None

    def _parse(self) -> None:
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= os.fstat(file.fileno()).st_size - 8:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(length))
            self._base, size = 8 + length, os.fstat(file.fileno()).st_size
            record = json.loads(header["__metadata__"][_RECORD])
            if (record["format"], record["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {record['format']!r}, version {record['version']!r}")
            self.settings = Settings.from_json(record)
            self.skipped = tuple(record["skipped"])
            moments, labels = header["moments"], header["labels"]
            self.count = int(labels["shape"][0])
            code = _CODES[self.settings.dtype][0]
            if (moments["dtype"], moments["shape"]) != (code, [self.count, *self._image_shape]):
                raise ValueError(f"moments of shape {moments['shape']}, {moments['dtype']}")
            end = self._base + max(moments["data_offsets"][1], labels["data_offsets"][1])
            if size != end:
                raise ValueError(f"{size} bytes instead of {end}")
            self._offset = self._base + moments["data_offsets"][0]
            file.seek(self._base + labels["data_offsets"][0])
            self.labels = torch.from_numpy(np.frombuffer(file.read(8 * self.count), "<i8").copy())
        self.bytes = size

    @property
    def _image_shape(self) -> tuple[int, ...]:
        return self.settings.image_shape

    @property
    def moments(self) -> "np.ndarray[Any, Any]":
        """(count, 2 mirrors, 2 moments, C, h, w), read from disk where it is touched."""
        if self._moments is None:
            # torch's mapping, unlike numpy's, keeps no file open: a cache may have many shards.
            mapped = torch.from_file(str(self.path), size=self.bytes, dtype=torch.uint8)
            values = mapped.numpy()[self._offset : self._offset + self._length]
            dtype = _CODES[self.settings.dtype][1]
            self._moments = values.view(dtype).reshape(self.count, *self._image_shape)
        return self._moments

    @property
    def _length(self) -> int:
        return self.count * self.settings.image_bytes

    def check(self, listed: Shard, settings: Settings, checksum: bool) -> None:
        """Compare the file with its line in the index, byte for byte if asked to.

        Args:
            listed: The line.
            settings: Those of the index.
            checksum: Whether to read it all.

        Raises:
            DamagedShardError: naming the file.
        """
        if (self.bytes, self.count) != (listed.bytes, listed.count):
            raise DamagedShardError(
                f"{self.path}: {self.count} images in {self.bytes} bytes, but the index says "
                f"{listed.count} in {listed.bytes}; {_CURE}"
            )
        differing = self.settings.differences(settings)
        if differing:
            raise DamagedShardError(f"{self.path}: of another cache ({differing[0]}); {_CURE}")
        if checksum and file_sha256(self.path) != listed.sha256:
            raise DamagedShardError(f"{self.path}: its sha256 is not that in the index; {_CURE}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_moments": None}  # another process maps the file itself


def write_index(root: Path, index: Index) -> None:
    """Write the index, last of all: a cache with an index is complete."""
    settings = asdict(index.settings)
    write_json(
        root / INDEX,
        {
            "format": FORMAT,
            "version": VERSION,
            "num_images": index.num_images,
            "num_classes": index.num_classes,
            "image_shape": list(index.settings.image_shape),
            **settings,
            "shards": [asdict(shard) for shard in index.shards],
        },
    )


def read_index(root: Path) -> Index:
    """Read the index of a complete cache.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another version.
    """
    path = root / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there, so {root} is no latent cache or an unfinished one; run dit-qat "
            "cache-latents (the same command again continues)"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = (content["format"], content["version"])
        if found == (FORMAT, VERSION):
            shards = [Shard(**{**s, "skipped": tuple(s["skipped"])}) for s in content["shards"]]
            return Index(Settings.from_json(content), tuple(shards))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); remove it and {_CURE}") from error
    raise ValueError(
        f"{path}: format {found[0]!r}, version {found[1]!r}; this dit_qat reads {FORMAT!r}, "
        f"version {VERSION}: use the dit_qat that wrote it, or cache again"
    )
