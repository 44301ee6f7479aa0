from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView, CallStore
from dit_qat.dit.methods import RTN, SmoothQuant, ViDiTQ
from dit_qat.dit.methods.mixed_precision import MixedPrecision
from dit_qat.dit.ptq import quantize_post_training
from dit_qat.layers import IntLinear

QKV = tuple(f"blocks.0.attn.to_{x}" for x in "qkv")


def test_static_dynamic_scales_then_rotates_and_leaves_the_product(
    view_of: Callable[..., BlockView],
) -> None:
    method = ViDiTQ(weight_bits=8, activation_bits=None)
    view = view_of(method.needs)
    layer = method.quantize_block(view)[QKV[1]]
    assert [step.kind for step in layer.transform.steps] == ["scale", "rotate"]
    X, W = torch.randn(5, 16, dtype=torch.float64), view.linears[QKV[1]].weight.detach().double()
    torch.testing.assert_close(layer.transform(X) @ layer.transform.weight(W).T, X @ W.T)


def test_m_multiplies_the_input(view_of: Callable[..., BlockView]) -> None:
    method = ViDiTQ(alpha=0.8)
    view = view_of(method.needs)
    w_max = torch.cat([view.linears[name].weight for name in QKV]).abs().amax(0)
    m = w_max**0.8 / view.statistics[QKV[0]].absmax ** 0.2
    for name in QKV:
        found = method.quantize_block(view)[name].transform.vector0
        torch.testing.assert_close(found, 1 / m.clamp_min(1e-3))


def test_the_early_balance_is_that_of_smoothquant(view_of: Callable[..., BlockView]) -> None:
    early, smooth = ViDiTQ(balance="channel", alpha=0.5), SmoothQuant(alpha=0.5)
    mine, theirs = (m.quantize_block(view_of(m.needs))[QKV[0]] for m in (early, smooth))
    assert torch.equal(mine.transform.vector0, theirs.transform.vector0)
    assert ViDiTQ(balance="channel").config.alpha == 0.3
    assert ViDiTQ().config.alpha == 0.99
    assert not ViDiTQ(balance="channel").config.activation.symmetric
    assert ViDiTQ().config.activation.symmetric


def test_without_balance_it_is_rtn(view_of: Callable[..., BlockView]) -> None:
    plain = ViDiTQ(balance="none")
    rtn = RTN(weight_symmetric=False, activation_symmetric=False)
    x = torch.randn(5, 16)
    one, other = (m.quantize_block(view_of(m.needs))[QKV[0]](x) for m in (plain, rtn))
    assert torch.equal(one, other)


def test_uniform_bits_are_the_default(view_of: Callable[..., BlockView]) -> None:
    method = ViDiTQ()
    layers = method.quantize_block(view_of(method.needs)).values()
    assert {layer.config.grid.bits for layer in layers} == {4}
    assert all(layer.config.step_bits is None for layer in layers)


def test_weight_bits_meet_their_budget_and_lower_the_error(
    calibrated: tuple[Any, CallStore], output_of: Callable[..., Tensor]
) -> None:
    make, store = calibrated
    reference, errors = output_of(make(), store), []
    for mixed in (None, MixedPrecision(weight_budget=6.0)):
        method = ViDiTQ(weight_bits=4, activation_bits=8, mixed=mixed)
        result = quantize_post_training(make(), method, store)
        errors.append(float((output_of(result.model, store) - reference).norm()))
    assert 4 < result.averages["weight_bits_by_macs"] <= 6
    assert errors[1] < errors[0]
    assert set(result.report["weight_budgets"]) == {"self-attention", "feed-forward"}


def test_activation_bits_belong_to_layers_and_ranges_of_steps(
    calibrated: tuple[Any, CallStore], output_of: Callable[..., Tensor]
) -> None:
    make, store = calibrated
    mixed = MixedPrecision(activation_budget=5.0, ranges=2)
    result = quantize_post_training(make(), ViDiTQ(mixed=mixed), store)
    layers = {n: m for n, m in result.model.named_modules() if isinstance(m, IntLinear)}
    sizes = {n: m.in_features * m.out_features for n, m in layers.items()}
    for timestep in store.timesteps.values():
        bits = {name: layer.config.step_bits.at(timestep) for name, layer in layers.items()}
        assert set(bits.values()) <= {4, 6, 8}
        assert len(set(bits.values())) > 1
        mean = sum(sizes[name] * b for name, b in bits.items()) / sum(sizes.values())
        assert mean <= 5
    assert output_of(result.model, store).isfinite().all()


def test_a_group_is_ranked_by_its_own_metric(calibrated: tuple[Any, CallStore]) -> None:
    make, store = calibrated
    favourite = "blocks.1.attn.proj"
    asked: list[int] = []

    def metric(model: nn.Module) -> float:
        quantized = [n for n, m in model.named_modules() if isinstance(m, IntLinear)]
        asked.append(len(quantized))
        return float(favourite in quantized)

    mixed = MixedPrecision(weight_budget=4.5, weight_choices=(4, 8))
    method = ViDiTQ(mixed=mixed, metrics={"self-attention": metric})
    model = quantize_post_training(make(), method, store).model
    assert asked == [1, 1, 1, 1]  # each layer of the group alone
    attention = {
        n: m.config.grid.bits
        for n, m in model.named_modules()
        if isinstance(m, IntLinear) and "attn" in n
    }
    assert attention[favourite] == max(attention.values())
    with pytest.raises(ValueError, match=r"metrics for \['temporal'\].*self-attention"):
        quantize_post_training(make(), ViDiTQ(mixed=mixed, metrics={"temporal": metric}), store)
