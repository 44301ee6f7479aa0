from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dit_qat.dit.methods.adatsq import Policy
from dit_qat.dit.report.plots_policy import policy_plot


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (20, 16), (50, 60), (50, 456)])
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
    assert image.height <= 1900  # however many layers
    if layers > 1:
        constant = replace(policy, bits=((3,) * layers,) * steps)
        other = Image.open(BytesIO(policy_plot(constant))).convert("RGB")
        assert len(image.getcolors(1 << 20)) > len(other.getcolors(1 << 20))


def test_many_layers_are_grouped_by_kind() -> None:
    """Whatever the order of the model: a kind with other bits is one band, not stripes."""
    layers = tuple(f"blocks.{i}.{kind}" for i in range(30) for kind in ("attn.qkv", "mlp.fc1"))
    policy = Policy(
        layers=layers,
        timesteps=(999.0, 0.0),
        bits=(tuple(8 if name.endswith("qkv") else 3 for name in layers),) * 2,
        operations=(100,) * len(layers),
        scores=((1.0,) * len(layers),) * 2,
        average_asked=6.0,
    )
    image = Image.open(BytesIO(policy_plot(policy))).convert("RGB")
    column = np.asarray(image)[:, 900].astype(int)
    dark = np.abs(column - [0x12, 0x3A, 0x6B]).sum(-1) < 6
    assert dark.sum() > 300
    assert np.count_nonzero(np.diff(dark.astype(int)) == 1) == 1
