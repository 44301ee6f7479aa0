"""A causal language model and its tokenizer, from a folder or the hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from torch import nn

from dit_qat.export.extras import import_extra
from dit_qat.llm.models.checks import check_tokenizer
from dit_qat.llm.models.files import StoredTensors, locate_model
from dit_qat.llm.models.residency import BlockResidency
from dit_qat.llm.models.roles import Family
from dit_qat.llm.models.room import free_bytes

__all__ = ["LoadedLLM", "Residency", "load_llm", "load_llm_by_block", "load_llm_to_quantize"]

Residency = Literal["all", "block", "auto"]
"""What of a model is in memory: all, one block, or all if there is ample room."""

_AMPLE = 1.5  # of a float model's bytes: with what calibration holds and quantized layers beside it


class LoadedLLM(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def load_llm(
    source: str | os.PathLike[str] = "tiny",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
) -> LoadedLLM:
    """Load a causal language model of Hugging Face with its tokenizer.

    Args:
        source: A folder, a hub id "org/name", or "tiny" for the shipped model.
        device: Where the weights go.
        dtype: What they become; None: as stored.
        revision: Branch, tag or commit of the hub's repository.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a file.
        OSError: if the hub cannot be reached or has no such model.
        ValueError: if the folder is damaged or of an unknown architecture, tensors are missing, the
            tokenizer does not fit, or the device is not there.
    """
    _check_device(device)
    folder = locate_model(source, revision)
    auto = import_extra("transformers", "llm").AutoModelForCausalLM
    with _explained(folder):
        model, told = auto.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, such as "
            f"{missing[0]}; they would be random numbers. Download or save the model again"
        )
    tokenizer = _load_tokenizer(folder)
    check_tokenizer(model, tokenizer)
    return LoadedLLM(model.to(device).eval(), tokenizer)


def load_llm_by_block(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    family: Family | None = None,
) -> tuple[BlockResidency, Any]:
    """Load a model larger than memory: what lies outside of its blocks, and blocks when they run.

    Args:
        source: As for :func:`load_llm`.
        device: Where what is in use goes.
        dtype: What the weights become there.
        revision: As for :func:`load_llm`.
        family: As for :func:`~dit_qat.llm.models.roles.roles_of`.

    Returns:
        What holds the model, and the tokenizer.

    Raises:
        FileNotFoundError: as :func:`load_llm`, as the following.
        OSError: as there.
        ValueError: as there, and for a quantized folder or an architecture without roles.
    """
    _check_device(device)
    folder = locate_model(source, revision)
    transformers, config = import_extra("transformers", "llm"), _float_config(folder)
    with _explained(folder):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    tokenizer = _load_tokenizer(folder)
    check_tokenizer(model, tokenizer)
    return BlockResidency(model.eval(), folder, device, dtype, family=family), tokenizer


def load_llm_to_quantize(
    source: str | os.PathLike[str] = "tiny",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    residency: Residency = "auto",
    limit_bytes: int | None = None,
) -> LoadedLLM:
    """Load a float model whole, or so that its blocks come into memory when they run.

    Args:
        source: As for :func:`load_llm`.
        device: Where what is in use goes.
        dtype: What the weights become there.
        residency: See :data:`Residency`; "auto" takes the whole model if 1.5 times its bytes are
            free.
        limit_bytes: What may be taken; None: what is free.

    Raises:
        FileNotFoundError: as :func:`load_llm`, as the following.
        OSError: as there.
        ValueError: as there, for an unknown residency or a quantized folder, and by block as
            :func:`load_llm_by_block`.
    """
    if residency not in get_args(Residency):
        raise ValueError(f"residency={residency!r} is unknown; use one of {get_args(Residency)}")
    _check_device(device)
    folder = locate_model(source)
    _float_config(folder)
    if residency == "all" or (residency == "auto" and _fits(folder, device, dtype, limit_bytes)):
        return load_llm(folder, device, dtype)
    held, tokenizer = load_llm_by_block(folder, device, dtype)
    return LoadedLLM(held.model, tokenizer)


def _float_config(folder: Path) -> Any:
    """The configuration of a model that is not quantized."""
    auto = import_extra("transformers", "llm").AutoConfig
    with _explained(folder):
        config = auto.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} is quantized already; give the float model that it was made from"
        )
    return config


def _fits(
    folder: Path, device: torch.device | str, dtype: torch.dtype, limit_bytes: int | None
) -> bool:
    limits = [limit for limit in (free_bytes(device), limit_bytes) if limit is not None]
    numbers = sum(prod(shape) for shape in StoredTensors(folder).shapes.values())
    return not limits or _AMPLE * numbers * dtype.itemsize <= min(limits)


def _load_tokenizer(folder: Path) -> Any:
    auto = import_extra("transformers", "llm").AutoTokenizer
    with _explained(folder):
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Name the folder in what transformers has to say about it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} does not load as a causal language model with its tokenizer "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason})") from error
