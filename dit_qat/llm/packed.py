"""What packed folders call a language model of transformers, entered in the registry."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dit_qat.export.extras import import_extra
from dit_qat.export.meta import parameters_on_meta
from dit_qat.export.registry import Architecture, register_family

__all__ = ["ARCHITECTURE", "is_causal_lm", "plain_config", "register_causal_lm", "tied_names"]

ARCHITECTURE = "causal_lm"

_NOT_OURS = ("quantization_config", "transformers_version", "_name_or_path", "auto_map")

# Beyond any model; a damaged number must not take hours or all memory.
_LARGEST, _DEEPEST = 1 << 24, 1 << 10


def register_causal_lm() -> None:
    """Let packed folders hold causal language models of transformers, of any of its classes."""
    register_family(
        Architecture(
            ARCHITECTURE,
            is_causal_lm,
            _build,
            plain_config,
            embeds=True,
            tied=tied_names,
            finish=_finish,
        )
    )


def is_causal_lm(kind: type[nn.Module]) -> bool:
    """Whether a class is one of transformers' causal language models."""
    package = kind.__module__.partition(".")[0]
    return package == "transformers" and kind.__name__.endswith("ForCausalLM")


def plain_config(model: Any) -> dict[str, Any]:
    """The configuration of a model in plain values, as its ``config.json`` has it.

    Raises:
        ValueError: for settings that JSON does not hold.
    """
    settings = {k: v for k, v in model.config.to_diff_dict().items() if k not in _NOT_OURS}
    settings["architectures"] = [type(model).__name__]
    settings["dtype"] = str(model.dtype).removeprefix("torch.")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the configuration of this {type(model).__name__} holds what JSON does not ({error}); "
            "build it from plain values"
        ) from error
    return plain


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    transformers = import_extra("transformers", "llm")
    _check_settings(arguments)
    settings = {k: v for k, v in arguments.items() if k not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(arguments["model_type"], **settings)
    # What draws random numbers for a parameter must not disturb those of the caller.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), parameters_on_meta():
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    if [type(model).__name__] != arguments["architectures"]:
        raise ValueError(
            f"these settings build a {type(model).__name__}, not {arguments['architectures']}"
        )
    return model


def _check_settings(arguments: Mapping[str, Any]) -> None:
    """Refuse code of the folder's own, and numbers that no model has."""
    if not isinstance(arguments.get("model_type"), str) or "architectures" not in arguments:
        raise ValueError("it has no model_type and architectures")
    if "auto_map" in arguments:
        raise ValueError("auto_map asks for code from the folder, which is not run")
    for name, value in arguments.items():
        limit = _DEEPEST if "layers" in name else _LARGEST
        for number in _whole_numbers(value):
            if abs(number) > limit:
                raise ValueError(f"{name}={value!r} is beyond what a language model has")


def _whole_numbers(value: Any) -> Iterator[int]:
    """All whole numbers within a plain value."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(inner)


def tied_names(model: Any) -> Collection[str]:
    """Names of tensors that stand for others: the head's, where it is the embedding's.

    By the configuration as it is now: a model that was made with tied weights may have been untied.
    """
    return set(model.get_expanded_tied_weights_keys(all_submodels=True))


def _finish(model: Any, carried: Mapping[str, Any]) -> None:
    """Tie what is tied, and tell transformers that the model is quantized."""
    from dit_qat.llm.hf.attach import attach

    model.tie_weights()
    attach(model, carried)
