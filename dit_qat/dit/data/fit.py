"""Whether a network can be trained on a set of images, and which of them it is validated on."""

import torch
from torch import Tensor

from dit_qat.dit.models.dit import DiT
from dit_qat.dit.randomness import generator_for

__all__ = ["check_labels", "check_shape", "fixed_choice"]


def check_shape(network: DiT, channels: int, size: int, what: str) -> None:
    """Compare the network's input with the data's.

    Args:
        network: Not yet trained.
        channels: Of the data.
        size: Height and width of the data.
        what: Of which data this is, for the message.

    Raises:
        ValueError: saying which arguments of the network to set.
    """
    if (network.in_channels, network.input_size) != (channels, size):
        raise ValueError(
            f"{what} are ({channels}, {size}, {size}), the network takes ({network.in_channels}, "
            f"{network.input_size}, {network.input_size}); set its in_channels={channels} and "
            f"input_size={size}, or use the data that it was made for"
        )


def check_labels(network: DiT, labels: Tensor | None, what: str) -> None:
    """Compare the network's classes with the data's; an unconditional network ignores labels.

    Args:
        network: Not yet trained.
        labels: All of them (N,); None if there are none.
        what: Of which data this is, for the message.

    Raises:
        ValueError: if a conditional network would get no label, or one that it has no class for.
    """
    if not network.num_classes:
        return
    if labels is None:
        raise ValueError(
            f"{what} have no labels, the network is conditional (num_classes="
            f"{network.num_classes}); set its num_classes: 0, or take data with labels"
        )
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0:
        raise ValueError(
            f"{what} have labels from {smallest} on, which stand for unknown classes, as in test "
            "splits; take another split, or set the network's num_classes: 0"
        )
    if largest >= network.num_classes:
        raise ValueError(
            f"{what} have labels up to {largest}, the network num_classes={network.num_classes}; "
            f"set that to at least {largest + 1}, or to 0 to ignore labels"
        )


def fixed_choice(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``count`` images, or all: the same ones for every run and every seed."""
    order = torch.randperm(count, generator=generator_for(0, "validation"))
    return order[:wanted].tolist()
