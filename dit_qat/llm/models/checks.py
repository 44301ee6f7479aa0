"""What a model can be fed: tokenizers that fit it, sequences that it allows."""

from typing import Any

from torch import Tensor, nn

__all__ = ["DEFAULT_LENGTH", "check_tokenizer", "check_windows", "window_length", "window_limit"]

DEFAULT_LENGTH = 2048
"""Tokens of a window in the protocol that the papers share."""

_LEAST_FILLED = 0.9  # published models pad their embedding by a few rows, never by a tenth


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids are not those of a model's embedding.

    Raises:
        ValueError: if it has ids beyond the embedding, or leaves a tenth of it without a token.
    """
    rows, tokens = _embedding_rows(model), len(tokenizer)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    name = type(model).__name__
    if highest >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {highest} and {name} embeds {rows} (0 to {rows - 1}): "
            "they do not belong together; use the tokenizer that came with the model"
        )
    if tokens < _LEAST_FILLED * rows:
        raise ValueError(
            f"the tokenizer has {tokens} tokens and {name} embeds {rows}: they do not belong "
            "together; use the tokenizer that came with the model"
        )


def window_limit(model: nn.Module) -> int:
    """The longest sequence that a model has positions for.

    Raises:
        ValueError: if its configuration does not tell.
    """
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(
            f"the configuration of {type(model).__name__} has no max_position_embeddings, so that "
            "its longest sequence is unknown; set it"
        )
    return limit


def window_length(model: nn.Module, wanted: int | None = None) -> int:
    """Tokens of a window: the wanted, or 2048 if the model allows that, or what it allows.

    Raises:
        ValueError: if the model does not allow the wanted length, or it is below 2.
    """
    limit = window_limit(model)
    if wanted is None:
        return min(DEFAULT_LENGTH, limit)
    if wanted > limit:
        raise ValueError(
            f"windows of {wanted} tokens are longer than {type(model).__name__} allows "
            f"(max_position_embeddings={limit}); use at most {limit}"
        )
    if wanted < 2:
        raise ValueError(f"windows of {wanted} tokens predict nothing; use at least 2")
    return wanted


def check_windows(model: nn.Module, windows: Tensor) -> None:
    """Refuse windows that a model cannot read.

    Args:
        model: A causal language model.
        windows: Token ids (count, length).

    Raises:
        ValueError: if they are no (count, length) integers, too long, or beyond the embedding.
    """
    if windows.ndim != 2 or windows.is_floating_point() or not windows.numel():
        raise ValueError(
            f"windows are token ids (count, length), but these are {windows.dtype} of shape "
            f"{tuple(windows.shape)}"
        )
    window_length(model, windows.shape[1])
    rows, low, high = _embedding_rows(model), int(windows.min()), int(windows.max())
    if low < 0 or high >= rows:
        raise ValueError(
            f"the windows hold ids from {low} to {high}, and {type(model).__name__} embeds 0 to "
            f"{rows - 1}; make them with the tokenizer that came with the model"
        )


def _embedding_rows(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
