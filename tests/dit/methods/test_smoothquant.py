from collections.abc import Callable

import torch

from dit_qat.calibration import BlockView
from dit_qat.dit.methods import RTN, SmoothQuant

QKV = tuple(f"blocks.0.attn.to_{x}" for x in "qkv")


def test_one_scale_for_all_consumers_of_an_input(view_of: Callable[..., BlockView]) -> None:
    method = SmoothQuant(alpha=0.5)
    view = view_of(method.needs)
    layers = method.quantize_block(view)
    w_max = torch.cat([view.linears[name].weight for name in QKV]).abs().amax(0)
    expected = (view.statistics[QKV[0]].absmax / w_max).sqrt()
    for name in QKV:
        torch.testing.assert_close(layers[name].transform.vector0, expected)


def test_alpha_one_flattens_the_input(view_of: Callable[..., BlockView]) -> None:
    method = SmoothQuant(alpha=1.0)
    view = view_of(method.needs)
    layer = method.quantize_block(view)["blocks.0.ff.0"]
    x_max = view.statistics["blocks.0.ff.0"].absmax
    torch.testing.assert_close(layer.transform.vector0, x_max)


def test_smoothing_helps_where_channels_stand_out(view_of: Callable[..., BlockView]) -> None:
    errors = {}
    for method in (RTN(weight_bits=8), SmoothQuant(weight_bits=8)):
        view = view_of(method.needs)
        errors[method.name] = view.error(method.quantize_block(view), "blocks.0.attn")
    assert errors["smoothquant"] < 0.7 * errors["rtn"]
