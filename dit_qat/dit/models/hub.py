"""A float DiT to and from a folder or a repository of the Hugging Face hub."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from dit_qat.export.files import write_json, written_whole

if TYPE_CHECKING:
    from dit_qat.dit.models.dit import DiT

__all__ = ["HubModel"]

# Of the HTTP library that huggingface_hub uses, whichever that is: the base of its errors.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

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


class HubModel:
    """What a DiT does with folders and the hub; mixed into :class:`DiT`."""

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> "DiT":
        """Load a float DiT; sources and errors as for :func:`dit_qat.dit.models.load_dit`."""
        from dit_qat.dit.models.weights import load_dit

        return load_dit(source, device)

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
            try:
                return _upload(
                    HfApi(token=token), Path(folder), repo_id, private, revision, commit_message
                )
            except (OSError, _HTTP_ERROR) as error:
                raise OSError(
                    f"{repo_id}: not uploaded ({type(error).__name__}: {error}); check the "
                    "connection, HF_HUB_OFFLINE, and a token with write permission ('hf auth "
                    "login'), or write a folder with save_pretrained and upload it elsewhere by "
                    f"'hf upload {repo_id} FOLDER'"
                ) from error


def _upload(
    api: HfApi, folder: Path, repo_id: str, private: bool, revision: str | None, message: str
) -> str:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
    )
    return str(commit.commit_url)


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
