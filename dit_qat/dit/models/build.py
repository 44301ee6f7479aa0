"""A float DiT from a configuration and tensors that fit it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_qat.dit.models.dit import DiT

__all__ = ["build_dit", "check_state"]


def build_dit(config: Mapping[str, Any], state: Mapping[str, Tensor], source: object) -> DiT:
    """Build a DiT around tensors; float32 ones are taken over without a copy.

    Args:
        config: Arguments of :class:`DiT`.
        state: Tensors by the published names.
        source: Where both come from, for messages.

    Raises:
        ValueError: If the configuration builds no DiT, or the tensors do not fit it.
    """
    try:
        # Without storage: every tensor is about to be replaced.
        with torch.device("meta"):
            model = DiT(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its configuration does not build a DiT ({error})") from error
    check_state(model.state_dict(), state, source)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model


def check_state(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: object
) -> None:
    """Compare names and shapes, and refuse values that are not finite.

    Raises:
        ValueError: For the first tensor that does not fit.
    """
    for keys, what in ((expected.keys() - state, "lacks"), (state.keys() - expected, "also holds")):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            raise ValueError(
                f"{source}: {what} {len(keys)} tensors, such as {shown}; the weights belong to "
                "another model than the configuration describes"
            )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{source}: {key} has shape {tuple(tensor.shape)}, but the configuration asks for "
                f"{tuple(expected[key].shape)}; the two belong to different models"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{source}: {key} holds NaN or infinite values; the training that wrote it "
                "diverged or the file is damaged, so take an earlier checkpoint"
            )
