"""Small networks that several folders of tests build."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from dit_qat.dit.models import DiT


@pytest.fixture
def make_dit() -> Callable[..., DiT]:
    """Build a small DiT in evaluation mode, no weight of it zero."""

    def make(seed: int = 0, **overrides: Any) -> DiT:
        sizes = {"input_size": 4, "in_channels": 2, "hidden_size": 64, "depth": 2, "num_heads": 1}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DiT(**(sizes | {"num_classes": 3} | overrides)).eval()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture
def same_state() -> Callable[[torch.nn.Module, torch.nn.Module], bool]:
    """Whether two modules hold the same tensors, bit for bit."""

    def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
        ours: Mapping[str, Any] = one.state_dict()
        theirs: Mapping[str, Any] = other.state_dict()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)

    return same
