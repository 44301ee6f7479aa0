"""Sensitivities from one backward pass, against what the definition gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit_qat.dit.evaluation.sensitivity import layer_sensitivity, output_error, quantized_linears
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.randomness import generator_for
from dit_qat.layers import LayerConfig, MinMaxQuantizer, QuantLinear, quantize_

Make = Callable[..., DiT]


def images(channels: int = 1) -> Tensor:
    return torch.randn(6, channels, 4, 4, generator=generator_for(0, "images"))


class TwoBranches(nn.Module):
    """Predict (a Q1(x), Q2(x)) on the two halves of the image."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        config = LayerConfig(activation=MinMaxQuantizer(3), rotation=None, low_rank=None)
        self.first, self.second = (QuantLinear(8, 8, bias=False, config=config) for _ in range(2))
        for layer in (self.first, self.second):
            nn.init.eye_(layer.weight)  # absmean scale 1/8: the ternary weight is the identity / 8

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        one, two = x.flatten(1).chunk(2, dim=1)
        return torch.cat([self.gain * self.first(one), self.second(two)], dim=1).view_as(x)


def test_independent_layers_have_the_output_error_of_unquantized_inputs() -> None:
    network = TwoBranches(gain=3.0)
    exact = TwoBranches(gain=3.0)
    for layer in (exact.first, exact.second):
        layer.config = LayerConfig(activation=None, rotation=None, low_rank=None)
    table = layer_sensitivity(
        network,
        images(),
        None,
        (2, 4),
        7,
        2,
        layers=("*",),
        score="local_gradient",
        reference=exact,
    )
    for row, name in enumerate(("first", "second")):
        for column, bits in enumerate((2, 4)):
            alone = TwoBranches(gain=3.0)
            for other in {"first", "second"} - {name}:
                alone.get_submodule(other).config = exact.first.config  # type: ignore[assignment]
            layer = alone.get_submodule(name)
            layer.config = LayerConfig(  # type: ignore[assignment]
                activation=MinMaxQuantizer(bits), rotation=None, low_rank=None
            )
            expected = output_error(alone, exact, images(), None, 7, 2)
            assert float(table.matrix[row, column]) == pytest.approx(expected, rel=1e-4)


def test_a_dit_is_not_changed_and_more_bits_cost_less(make_dit: Make) -> None:
    network = quantize_(make_dit(), RobuQ(activation_bits=3, rank=2).quant_config())
    before = {name: layer.config for name, layer in quantized_linears(network).items()}
    labels = torch.arange(6) % 3
    table = layer_sensitivity(network, images(2), labels, (1, 2, 3, 4), score="local_gradient")
    assert (table.matrix > 0).all()
    assert (table.matrix.diff(dim=1) < 0).all()
    assert before == {name: layer.config for name, layer in quantized_linears(network).items()}
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(layer._forward_hooks for layer in network.modules())


def test_checkpointed_blocks_give_the_same(make_dit: Make) -> None:
    network = quantize_(make_dit(), RobuQ(activation_bits=2, rank=2).quant_config())
    labels = torch.arange(6) % 3
    tables = []
    for network.gradient_checkpointing in (False, True):
        network.train()  # blocks are recomputed in training only
        tables.append(
            layer_sensitivity(network, images(2), labels, (1, 2), score="local_gradient").matrix
        )
    assert torch.allclose(*tables, rtol=1e-6)


def test_blocks_are_recomputed_where_training_recomputes_them(make_dit: Make) -> None:
    network = quantize_(make_dit(), RobuQ(activation_bits=2, rank=2).quant_config()).eval()
    labels = torch.arange(6) % 3
    calls: list[bool] = []
    network.blocks[0].register_forward_pre_hook(lambda block, _: calls.append(block.training))
    tables, counts = [], []
    for network.gradient_checkpointing in (False, True):
        calls.clear()
        table = layer_sensitivity(
            network, images(2), labels, (1, 2), timesteps=2, score="local_gradient"
        )
        tables.append(table.matrix)
        counts.append(len(calls))
        assert not any(calls)  # the layers stay in evaluation mode
        assert not network.training
    assert counts == [2 * (1 + 1), 2 * (1 + 2)]  # per timestep: the reference, and the pass
    assert torch.allclose(*tables, rtol=1e-6)


def test_rows_that_are_known_are_not_measured_again(make_dit: Make) -> None:
    network = quantize_(make_dit(), RobuQ(activation_bits=2, rank=2).quant_config())
    names = [*quantized_linears(network)]
    rows: dict[str, list[float]] = {}
    whole = layer_sensitivity(
        network,
        images(2),
        None if not network.num_classes else torch.zeros(6, dtype=torch.int64),
        (1, 4),
        timesteps=1,
        on_row=rows.__setitem__,
    )
    assert [*rows] == names
    known = {name: rows[name] for name in names[1:]}
    again: dict[str, list[float]] = {}
    part = layer_sensitivity(
        network,
        images(2),
        torch.zeros(6, dtype=torch.int64),
        (1, 4),
        timesteps=1,
        known=known,
        on_row=again.__setitem__,
    )
    assert [*again] == names[:1]
    assert torch.equal(part.matrix, whole.matrix)


def test_without_a_teacher_the_highest_bits_can_be_the_truth(make_dit: Make) -> None:
    network = quantize_(make_dit(), RobuQ(activation_bits=4, rank=2).quant_config())
    labels = torch.arange(6) % 3
    names = [*quantized_linears(network)]
    given = (network, images(2), labels, (2, 4))
    own = layer_sensitivity(*given, timesteps=1)
    high = layer_sensitivity(*given, timesteps=1, reference_bits=dict.fromkeys(names, 4))
    assert torch.equal(own.matrix, high.matrix)
    higher = layer_sensitivity(*given, timesteps=1, reference_bits=dict.fromkeys(names, 8))
    assert (higher.matrix[:, 1] > 0).all()
