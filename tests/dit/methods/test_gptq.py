from collections.abc import Callable

import torch

from dit_qat.calibration import BlockView
from dit_qat.dit.methods import GPTQ, RTN
from dit_qat.layers.rounding import GPTQSettings


def test_gptq_beats_rounding_to_nearest_on_its_calibration(
    view_of: Callable[..., BlockView],
) -> None:
    errors = {}
    for method in (
        RTN(weight_bits=3, activation_bits=None),
        GPTQ(weight_bits=3, activation_bits=None),
    ):
        view = view_of(method.needs)
        errors[method.name] = view.linear_errors(method.quantize_block(view))
    better = [errors["gptq"][name] < errors["rtn"][name] for name in errors["rtn"]]
    assert all(better)
    total = {name: sum(found.values()) for name, found in errors.items()}
    assert total["gptq"] < 0.7 * total["rtn"]


def test_groups_are_the_largest_that_divide_a_width(view_of: Callable[..., BlockView]) -> None:
    method = GPTQ(group_size=24, gptq=GPTQSettings(act_order=True))
    layers = method.quantize_block(view_of(method.needs))
    assert layers["blocks.0.ff.0"].config.grid.group_size == 16
    assert layers["blocks.0.ff.2"].scale.shape == (16, 2)


def test_channels_that_no_token_reaches_get_no_weight(view_of: Callable[..., BlockView]) -> None:
    method = GPTQ()
    view = view_of(method.needs)
    statistics = view.statistics["blocks.0.ff.0"]
    statistics.second_moment.matrix[5] = statistics.second_moment.matrix[:, 5] = 0
    layer = method.quantize_block(view)["blocks.0.ff.0"]
    assert torch.equal(layer.dequantized()[:, 5], torch.zeros(32))
