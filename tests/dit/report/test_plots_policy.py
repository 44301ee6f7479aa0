from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from dit_qat.dit.methods.adatsq import Policy
from dit_qat.dit.report.plots_policy import policy_plot


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (20, 16), (50, 60)])
def test_a_policy_of_any_size_is_drawn(steps: int, layers: int) -> None:
    bits = tuple(tuple((3, 4, 8)[(t + i) % 3] for i in range(layers)) for t in range(steps))
    policy = Policy(
        layers=tuple(f"blocks.{i}.mlp.fc1" for i in range(layers)),
        timesteps=tuple(999.0 - 10 * t for t in range(steps)),
        bits=bits,
        operations=(100,) * layers,
        scores=((1.0,) * layers,) * steps,
        average_asked=5.0,
    )
    image = Image.open(BytesIO(policy_plot(policy))).convert("RGB")
    assert image.width == 1520
    if layers > 1:
        constant = replace(policy, bits=((3,) * layers,) * steps)
        other = Image.open(BytesIO(policy_plot(constant))).convert("RGB")
        assert len(image.getcolors(1 << 20)) > len(other.getcolors(1 << 20))
