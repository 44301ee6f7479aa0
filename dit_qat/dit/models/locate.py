"""Where float weights are: shipped with the package, on disk, or on the Hugging Face hub."""

import os
import re
from importlib import resources
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from dit_qat.dit.models.hub import HTTP_ERROR
from dit_qat.dit.models.native import not_float
from dit_qat.dit.models.published import PUBLISHED_SUFFIXES
from dit_qat.dit.models.transformer_folder import CONFIG_FILE, WEIGHT_FILES, shards_of
from dit_qat.export.manifest import is_packed_folder

__all__ = ["EMBEDDED_WEIGHTS", "NATIVE_FILE", "PIPELINE_INDEX", "locate"]

EMBEDDED_WEIGHTS = {"digits": "digits_dit.safetensors"}
NATIVE_FILE = "model.safetensors"
PIPELINE_INDEX = "model_index.json"

_TRANSFORMER = "transformer"
_FILES = (".safetensors", ".ckpt", *PUBLISHED_SUFFIXES)


def locate(source: str | os.PathLike[str]) -> Path:
    """Find float weights; download them if the source is a hub id.

    Args:
        source: An embedded name, a file, a folder with our model.safetensors, a folder of
            diffusers' DiTTransformer2DModel or DiTPipeline, or a hub id "org/name" of a
            repository like one of these three.

    Returns:
        A file, or the folder of a DiTTransformer2DModel.

    Raises:
        FileNotFoundError: If there is no such file, or the hub does not have it or cannot be
            reached.
        OSError: If a download breaks off.
        ValueError: If it is a folder of something else.
    """
    name, path = os.fspath(source), Path(source)
    if name in EMBEDDED_WEIGHTS:
        # The package is installed as plain files, so that a resource is a path.
        return Path(str(resources.files("dit_qat.dit") / "assets" / EMBEDDED_WEIGHTS[name]))
    if path.is_file():
        return path
    if path.is_dir():
        return _inside(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in _FILES:
        return _Repository(name).download()
    raise FileNotFoundError(
        f"{path}: no such file; give an existing file or folder, a hub id 'org/name', or an "
        f"embedded name ({', '.join(EMBEDDED_WEIGHTS)})"
    )


def _inside(folder: Path) -> Path:
    if is_packed_folder(folder):
        raise not_float(folder)
    if (folder / NATIVE_FILE).is_file():
        return folder / NATIVE_FILE
    inner = folder / _TRANSFORMER if (folder / PIPELINE_INDEX).is_file() else folder
    if (inner / CONFIG_FILE).is_file():
        return inner
    raise ValueError(
        f"{folder}: is a folder without float weights (neither {NATIVE_FILE}, nor {CONFIG_FILE} "
        f"of a DiTTransformer2DModel, nor {PIPELINE_INDEX} and {_TRANSFORMER}/{CONFIG_FILE} of a "
        "DiTPipeline); give the file inside"
    )


class _Repository:
    """The files of one hub repository, fetched one by one through the hub's cache."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._revision: str | None = None
        self._offline: str | None = None
        self._tried: list[str] = []

    def download(self) -> Path:
        """Fetch the files that are needed, and no others; return as :func:`locate` does."""
        native = self._fetch(NATIVE_FILE)
        if native is not None:
            return native
        prefix = "" if self._fetch(PIPELINE_INDEX) is None else f"{_TRANSFORMER}/"
        config = self._fetch(prefix + CONFIG_FILE)
        if config is None:
            raise self._nothing()
        for name in WEIGHT_FILES:
            weights = self._fetch(prefix + name)
            if weights is not None:
                self._fetch_shards(weights, prefix)
                return config.parent
        raise self._nothing()

    def _fetch_shards(self, weights: Path, prefix: str) -> None:
        for shard in shards_of(weights) if weights.suffix == ".json" else ():
            if self._fetch(prefix + shard) is None:
                raise self._nothing()

    def _fetch(self, name: str) -> Path | None:
        """The path of a file in the cache; None if it cannot be had."""
        self._tried.append(name)
        offline = self._offline is not None
        try:
            path = Path(
                hf_hub_download(self._name, name, revision=self._revision, local_files_only=offline)
            )
        except LocalEntryNotFoundError as error:
            # A hub that cannot be reached is asked once: each time takes it half a minute.
            self._offline = self._offline or _first_line(error)
            return None
        except EntryNotFoundError:
            return None
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise FileNotFoundError(
                f"{self._name}: no such file, and the hub gives no repository of that name "
                f"({type(error).__name__}: {_first_line(error)}); check the name (a private or "
                "gated one needs 'hf auth login')"
            ) from error
        except (OSError, HTTP_ERROR) as error:
            raise OSError(
                f"{self._name}: {name} could not be downloaded ({type(error).__name__}: "
                f"{_first_line(error)}); check the connection and the space left where HF_HOME is, "
                "and repeat the command"
            ) from error
        if self._revision is None:  # the rest is of the same commit, whose name the folder has
            self._revision = path.parent.name
        return path

    def _nothing(self) -> FileNotFoundError:
        tried = ", ".join(self._tried)
        if self._offline is None:
            return FileNotFoundError(
                f"{self._name}: no such file, and the hub repository of that name holds no float "
                f"DiT (tried {tried}); give a repository of ours, of a DiTTransformer2DModel or "
                "of a DiTPipeline"
            )
        return FileNotFoundError(
            f"{self._name}: no such file, and the hub cannot be reached ({self._offline}) nor does "
            f"its cache on this machine hold what is needed (tried {tried}); check the connection "
            f"and HF_HUB_OFFLINE, or run 'hf download {self._name} --local-dir FOLDER' where there "
            "is one and give that folder (or copy the cache, HF_HOME)"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
