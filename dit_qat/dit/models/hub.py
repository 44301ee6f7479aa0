"""A DiT to and from a folder or a repository of the Hugging Face hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from dit_qat.export.files import write_json, written_whole
from dit_qat.export.loader import load_quantized
from dit_qat.export.manifest import (
    CONFIG_FILE,
    TENSOR_FILE,
    Manifest,
    read_manifest,
)

if TYPE_CHECKING:
    from dit_qat.dit.models.dit import DiT

__all__ = ["HTTP_ERROR", "HubModel", "push_packed_to_hub"]

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Of the HTTP library that huggingface_hub uses, whichever that is: the base of its errors."""

_CARD = """\
---
library_name: dit-qat
tags: [diffusion-transformer, dit]
{license}---

# {name}

A float diffusion transformer (DiT, arXiv:2212.09748): {sizes}.

```python
from dit_qat.dit.models import DiT

network = DiT.from_pretrained("{name}")  # float32; forward(x, t, y)
```

`model.safetensors` holds the weights by their published names, with the configuration and a sha256
of the tensors in its header; `config.json` repeats the configuration for readers.
"""

_PACKED_CARD = """\
---
library_name: dit-qat
tags: [diffusion-transformer, quantized]
{license}---

# {name}

A packed {architecture}: {bits}.

```python
from dit_qat.dit.models import DiT

network = DiT.from_pretrained("{name}")  # stays packed; forward(x, t, y)
```

`dit-qat sample --weights {name}` draws from it. `config.json` says what the tensors of
`model.safetensors` are, and where they came from.
"""


class HubModel:
    """What a DiT does with folders and the hub; mixed into :class:`DiT`."""

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> "DiT":
        """Load a float or a packed DiT; the latter in evaluation mode, for inference only.

        Args:
            source: As for :func:`dit_qat.dit.models.load_dit`, or a packed folder of dit-qat
                export, or a hub id of one.
            device: Where the weights go.

        Raises:
            OSError: As for ``load_dit``.
            ValueError: As for ``load_dit`` and :func:`dit_qat.load_quantized`.
        """
        from dit_qat.dit.models.packed_source import load_packed_dit, locate_weights
        from dit_qat.dit.models.weights import load_dit

        path, packed = locate_weights(source)
        return load_packed_dit(path, device) if packed else load_dit(path, device)

    def save_pretrained(self, folder: str | os.PathLike[str], license: str | None = None) -> None:
        """Write model.safetensors, config.json and README.md, replacing files of these names.

        Args:
            folder: Where to write; made if missing.
            license: Identifier for the model card, such as ``cc-by-nc-4.0``; the published
                weights have one that yours may inherit.

        Raises:
            ValueError: If the model has quantized layers.
            OSError: If a file cannot be written.
        """
        folder = Path(folder)
        _save(cast("DiT", self), folder, folder.name, license)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a DiT by dit-qat",
        license: str | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes; the repository is made if missing.

        Args:
            repo_id: "org/name".
            private: Whether a new repository is.
            token: An access token with write permission; by default that of ``hf auth login``.
            revision: Branch, made if missing; by default the main one.
            commit_message: Of the one commit.
            license: As for :meth:`save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: If the model has quantized layers, or the name is not valid.
            OSError: If the hub cannot be reached or refuses.
        """
        with TemporaryDirectory() as folder:
            _save(cast("DiT", self), Path(folder), repo_id, license)
            with _explained(repo_id, "write a folder with save_pretrained and upload it"):
                api = HfApi(token=token)
                _make_repository(api, repo_id, private, revision)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=Path(folder),
                    revision=revision,
                    commit_message=commit_message,
                )
                return str(commit.commit_url)


def push_packed_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a packed model by dit-qat",
    license: str | None = None,
) -> str:
    """Upload a packed folder of dit-qat export, with a model card; it is loaded first, as a check.

    Args:
        folder: The packed folder; unchanged.
        repo_id: As for :meth:`HubModel.push_to_hub`, like all that follows.
        private: As there.
        token: As there.
        revision: As there.
        commit_message: As there.
        license: As there.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the folder is damaged, or the name is not valid.
        OSError: If the hub cannot be reached or refuses.
    """
    folder = Path(folder)
    load_quantized(folder)
    card = _packed_card(read_manifest(folder), repo_id, license)
    files: dict[str, str | bytes] = {
        name: str(folder / name) for name in (CONFIG_FILE, TENSOR_FILE)
    }
    with _explained(repo_id, "upload the folder"):
        api = HfApi(token=token)
        _make_repository(api, repo_id, private, revision)
        commit = api.create_commit(
            repo_id=repo_id,
            operations=[
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                for name, content in {**files, "README.md": card.encode()}.items()
            ],
            commit_message=commit_message,
            revision=revision,
        )
        return str(commit.commit_url)


@contextmanager
def _explained(repo_id: str, otherwise: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTP_ERROR) as error:
        raise OSError(
            f"{repo_id}: not uploaded ({type(error).__name__}: {error}); check the connection, "
            f"HF_HUB_OFFLINE, and a token with write permission ('hf auth login'), or {otherwise} "
            f"elsewhere by 'hf upload {repo_id} FOLDER'"
        ) from error


def _make_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _packed_card(manifest: Manifest, name: str, license: str | None) -> str:
    found = {*manifest.activation_bits.values()}
    inputs = [f"{bits:.3g} bits" for bits in sorted(bits for bits in found if bits is not None)]
    inputs += ["float"] if None in found else []
    weights = sorted({entry.weights for entry in manifest.layers.values()})
    return _PACKED_CARD.format(
        license="" if license is None else f"license: {license}\n",
        name=name,
        architecture=manifest.architecture,
        bits=f"{len(manifest.layers)} linear layers with {' and '.join(weights)} weights, "
        f"inputs of {', '.join(inputs)}",
    )


def _save(model: "DiT", folder: Path, name: str, license: str | None) -> None:
    from dit_qat.dit.models.locate import NATIVE_FILE
    from dit_qat.dit.models.native import save_dit

    save_dit(model, folder / NATIVE_FILE)
    write_json(folder / "config.json", {"model_type": "dit_qat", **model.config})
    with written_whole(folder / "README.md") as temporary:
        temporary.write_text(_card(model, name, license), encoding="utf-8")


def _card(model: "DiT", name: str, license: str | None) -> str:
    sizes = (
        f"{model.depth} blocks of width {model.hidden_size}, patch size {model.patch_size}, "
        f"inputs {model.in_channels} x {model.input_size} x {model.input_size}, "
        + (f"{model.num_classes} classes" if model.num_classes else "unconditional")
    )
    licensed = "" if license is None else f"license: {license}\n"
    return _CARD.format(license=licensed, name=name, sizes=sizes)
