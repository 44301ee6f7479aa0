"""What a run quantizes: a DiT of ours from any of its sources, or a diffusers pipeline."""

import json
import re
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.models.hub import HTTP_ERROR
from dit_qat.dit.models.locate import PIPELINE_INDEX
from dit_qat.dit.models.transformer_folder import CONFIG_FILE
from dit_qat.dit.ptq.target import transformer_of
from dit_qat.dit.training.loading import load_checkpoint
from dit_qat.layers import QuantLinear

__all__ = ["Dtype", "Subject", "open_subject"]

Dtype = Literal["float32", "bfloat16", "float16"]

# What load_dit takes over: class-conditional, of ADM's schedule. The older class name is also that
# of the published PixArts, which diffusers turns into PixArtTransformer2DModel as it loads them.
_OURS = ("DiTTransformer2DModel", "Transformer2DModel")
_OLD = "Transformer2DModel"
_OUR_PIPELINE = "DiTPipeline"
_PACKAGES = ("transformers", "accelerate")
_CURE = "pip install dit-qat[pipelines]"


@dataclass(frozen=True)
class Subject:
    """A float model, and what it is called with.

    Attributes:
        name: What the user called it.
        model: In evaluation mode.
        pipeline: A diffusers pipeline around it; None for a DiT of ours.
        vae: Where its own decoder is; None: there is none, or the pipeline has it.
    """

    name: str
    model: nn.Module
    pipeline: Any | None = None
    vae: str | None = None

    @property
    def dit(self) -> DiT:
        """The model, where it is one of ours."""
        assert isinstance(self.model, DiT)
        return self.model


def open_subject(
    name: str, device: torch.device | str = "cpu", dtype: Dtype = "float32"
) -> Subject:
    """Load what is to be quantized.

    Args:
        name: A source of :func:`~dit_qat.dit.models.load_dit`, a ``.ckpt`` of a float run, whose
            averaged weights are taken, or a diffusers pipeline, a folder or a hub id.
        device: Where it runs.
        dtype: Of a pipeline; DiTs of ours are float32.

    Raises:
        FileNotFoundError: if it is nowhere to be found.
        ValueError: for a pipeline without a transformer, a transformer that cannot be run alone, a
            checkpoint that is quantized already, and what the loaders refuse.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {get_args(Dtype)}")
    path = Path(name)
    index = _pipeline_index(name)
    if index is not None and not _is_ours(_transformer_class(name, index), index):
        return _open_pipeline(name, device, getattr(torch, dtype))
    if dtype != "float32":
        raise ValueError(f"dtype={dtype} is for pipelines; {name} is a DiT, which runs in float32")
    if path.suffix == ".ckpt":
        return Subject(name, _float_network(path, device))
    _refuse_lone_transformer(path)
    vae = name if (path / "vae" / CONFIG_FILE).is_file() else None
    return Subject(name, load_dit(name, device).eval(), vae=vae)


def _pipeline_index(name: str) -> dict[str, Any] | None:
    """The content of model_index.json, if a folder or hub repository has one."""
    path = Path(name)
    if path.is_dir():
        found = path / PIPELINE_INDEX
        return _read(found) if found.is_file() else None
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix:
        return None
    try:
        return _read(Path(hf_hub_download(name, PIPELINE_INDEX)))
    except (OSError, HTTP_ERROR):
        return None  # a repository of another kind, or none: load_dit says which


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; copy or download it again")
    return content


def _transformer_class(name: str, index: dict[str, Any]) -> str:
    entry = index.get("transformer")
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        return entry[1]
    parts = ", ".join(key for key in index if not key.startswith("_"))
    raise ValueError(
        f"{name} is a {index.get('_class_name', 'pipeline')} without a transformer (its parts: "
        f"{parts or 'none'}), and only transformers are quantized here; give a pipeline of a "
        "diffusion transformer"
    )


def _is_ours(kind: str, index: dict[str, Any]) -> bool:
    return kind in _OURS and (kind != _OLD or index.get("_class_name") == _OUR_PIPELINE)


def _open_pipeline(name: str, device: torch.device | str, dtype: torch.dtype) -> Subject:
    from diffusers import DiffusionPipeline  # seconds, which only this costs

    try:
        with warnings.catch_warnings():
            # Newer versions say ``dtype``, which the oldest that is supported does not know.
            warnings.filterwarnings("ignore", "`torch_dtype`", FutureWarning)
            pipeline = DiffusionPipeline.from_pretrained(
                name, torch_dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    except (AttributeError, ImportError, ValueError) as error:
        absent = [package for package in _PACKAGES if find_spec(package) is None]
        needed = f"; not installed: {', '.join(absent)} ({_CURE})" if absent else ""
        said = " ".join(str(error).split())
        raise ValueError(
            f"{name}: diffusers cannot build this pipeline here ({said}){needed}"
        ) from error
    pipeline.to(device)
    return Subject(name, transformer_of(pipeline).eval(), pipeline)


def _float_network(path: Path, device: torch.device | str) -> DiT:
    network = load_checkpoint(path, device=device).network
    if any(isinstance(module, QuantLinear) for module in network.modules()):
        raise ValueError(
            f"{path} is quantized already, by its training; give the float weights it came from, "
            "or pack it with dit-qat export"
        )
    return network


def _refuse_lone_transformer(path: Path) -> None:
    """A transformer of texts can be read, but nothing would tell it what to draw."""
    config = path / CONFIG_FILE
    if not config.is_file() or (path / PIPELINE_INDEX).is_file():
        return
    kind = _read(config).get("_class_name")
    if isinstance(kind, str) and kind.endswith("Model") and kind not in _OURS:
        raise ValueError(
            f"{path} is a {kind} on its own, which calibration cannot run; give the folder of its "
            "pipeline, with text encoders and scheduler"
        )
