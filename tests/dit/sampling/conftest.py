from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_qat.dit.models import DiT


@pytest.fixture
def make_network() -> Callable[..., DiT]:
    """Make a small conditional network, all weights random, that draws one channel of 8 by 8."""

    def make(**changed: Any) -> DiT:
        sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
        network = DiT(**({"input_size": 8, "patch_size": 4, "in_channels": 1} | sizes | changed))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return network

    return make
