"""A small DiT quantized by AdaTSQ, and what its search works with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_qat.calibration import CallStore
from dit_qat.calibration.engine import RunResult
from dit_qat.dit.methods.adatsq import AdaTSQ, AdaTSQConfig, WeightSettings
from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import Trajectory, quantize_post_training
from dit_qat.dit.sampling import SamplerConfig

SAMPLER = SamplerConfig(steps=4, batch_size=32)
SMALL = WeightSettings(bits=4, base="plain", group_size=32, clip=None, probe_calls=1)


@pytest.fixture
def quantize(calibrated: tuple[Callable[[], DiT], CallStore]) -> Callable[..., RunResult]:
    """Run AdaTSQ with some settings on the small DiT."""
    make, store = calibrated

    def run(quality: Any = None, trajectory: bool = True, **settings: Any) -> RunResult:
        model = make()
        path = Trajectory(model, SAMPLER, 4) if trajectory else None
        small = {"weights": SMALL, "search_images": 1, "final_images": 2, "fisher_rows": 4}
        settings = small | settings
        method = AdaTSQ(AdaTSQConfig(**settings), quality)
        return quantize_post_training(model, method, store, trajectory=path)

    return run


@pytest.fixture
def scores() -> torch.Tensor:
    """Scores (5, 3) of three layers at five steps."""
    return torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
