import pytest
import torch
from torch import nn

from dit_qat.dit.diffusion import NoiseSchedule
from dit_qat.dit.evaluation import local_sensitivity
from dit_qat.dit.evaluation.sensitivity import activation_bits, layer_sensitivity
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.randomness import generator_for
from dit_qat.layers import (
    LayerConfig,
    LowRank,
    MinMaxQuantizer,
    QuantLinear,
    RobustQuantizer,
    quantize_,
)

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def randomized(model, seed=0):
    generator = generator_for(seed, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def float_dit():
    sizes = {"input_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}
    return randomized(DiT(**sizes, num_classes=3))


@pytest.fixture
def network():
    return quantize_(float_dit(), RobuQ(activation_bits=3, rank=2).quant_config())


@pytest.fixture
def data():
    images = torch.randn(6, 1, 4, 4, generator=generator_for(0, "images"))
    return images, torch.arange(6) % 3


def configs(network):
    return {n: m.config for n, m in network.named_modules() if isinstance(m, QuantLinear)}


def test_the_layers_are_those_of_the_blocks_without_adaln(network, data):
    measured = layer_sensitivity(network, *data, bits=(2, 4), timesteps=2)
    assert measured.layers == tuple(f"blocks.{i}.{name}" for i in range(2) for name in LINEARS)
    assert measured.bits == (2, 4)
    assert measured.matrix.shape == (8, 2)
    assert measured.matrix.dtype == torch.float64


def test_present_bits_have_no_error_and_all_others_some(network, data):
    matrix = layer_sensitivity(network, *data, bits=(1, 2, 3, 4), timesteps=2).matrix
    assert torch.equal(matrix[:, 2], torch.zeros(8, dtype=torch.float64))
    assert (matrix[:, [0, 1, 3]] > 0).all()


def test_fewer_bits_cost_more(network, data):
    for layer in network.modules():
        if isinstance(layer, QuantLinear):
            layer.config = LayerConfig(
                layer.config.weight, RobustQuantizer(8), layer.config.rotation, LowRank(2)
            )
    matrix = layer_sensitivity(network, *data, bits=(1, 2, 3, 4, 6), timesteps=2).matrix
    assert (matrix.mean(0).diff() < 0).all()


def test_every_layer_has_its_bits_back(network, data):
    before = configs(network)
    layer_sensitivity(network, *data, bits=(1, 4), timesteps=1)
    assert configs(network) == before


def test_every_layer_has_its_bits_back_after_an_error(network, data):
    before, calls = configs(network), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 5:  # truth, unchanged, first layer twice, then the second layer
            assert configs(network) != before
            raise RuntimeError("out of memory")

    network.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer_sensitivity(network, *data, bits=(1, 4), timesteps=1)
    assert configs(network) == before


def test_numbers_are_a_function_of_the_seed(network, data):
    one, again, other = (
        layer_sensitivity(network, *data, bits=(2,), seed=seed, timesteps=2).matrix
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_against_a_teacher_present_bits_cost_every_layer_the_same(network, data):
    matrix = layer_sensitivity(
        network, *data, bits=(2, 3), timesteps=2, reference=float_dit()
    ).matrix
    assert matrix[0, 1] > 0
    assert (matrix[:, 1] == matrix[0, 1]).all()
    assert len(matrix[:, 0].unique()) == 8


class TwoBranches(nn.Module):
    """Predict (Q1(x), Q2(x)) on the two halves of the image, and a variance that is never read."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, t, y):
        halves = x.flatten(1).chunk(2, dim=1)
        noise = torch.cat([self.first(halves[0]), self.second(halves[1])], dim=1).view_as(x)
        return torch.cat([noise, torch.full_like(noise, torch.nan)], dim=1)


def identity(activation):
    layer = QuantLinear(
        8, 8, bias=False, config=LayerConfig(activation=activation, rotation=None, low_rank=None)
    )
    nn.init.eye_(layer.weight)  # absmean scale 1/8: the ternary weight is the identity over 8
    return layer


def test_closed_form_of_two_independent_layers(data):
    images = data[0]
    first, second = MinMaxQuantizer(3), MinMaxQuantizer(5)
    network = TwoBranches(identity(first), identity(second))
    measured = layer_sensitivity(network, images, None, (2, 4), seed=7, timesteps=2, layers=("*",))
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for t in (250, 750):
        noise = torch.randn(images.shape, generator=generator_for(7, "sensitivity", t))
        x = NoiseSchedule().add_noise(images, noise, torch.full((6,), t))
        halves = x.flatten(1).chunk(2, dim=1)
        true = [q.fake_quantize(h) for q, h in zip((first, second), halves, strict=True)]
        power = sum(h.square().sum() for h in true)
        for row, (half, unchanged) in enumerate(zip(halves, true, strict=True)):
            for column, bits in enumerate((2, 4)):
                error = MinMaxQuantizer(bits).fake_quantize(half) - unchanged
                expected[row, column] += (error.square().sum() / power).item() / 2
    assert torch.allclose(measured.matrix, expected, rtol=1e-4)


def test_average_bits_weigh_layers_by_their_size(network, data):
    wide = network.get_submodule("blocks.0.mlp.fc1")
    sizes = torch.tensor([3, 1, 4, 4, 3, 1, 4, 4])
    with activation_bits(wide, 1):
        measured = layer_sensitivity(network, *data, bits=(3,), timesteps=1)
        assert measured.costs == tuple((32 * 32 * sizes).tolist())
        assert measured.present_bits == (3, 3, 1, 3, 3, 3, 3, 3)
        assert measured.average_bits == pytest.approx(3 - 2 * 4 / 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": ()}, "no bits to try"),
        ({"bits": (2, 9)}, r"layer 'blocks\.0\.attn\.qkv': bits=9 is outside"),
        ({"bits": (2,), "timesteps": 0}, r"timesteps=0 is outside 1\.\.1000"),
        ({"bits": (2,), "timesteps": 1001}, "timesteps=1001 is outside"),
        ({"bits": (2,), "layers": ("blocks.*.mpl.*",)}, r"'blocks\.\*\.mpl\.\*' matches no"),
    ],
)
def test_settings_that_do_not_fit_are_refused(network, data, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_sensitivity(network, *data, **arguments)


def test_a_float_model_has_no_bits(data):
    with pytest.raises(ValueError, match="this network has none; quantize_ it first"):
        layer_sensitivity(float_dit(), *data, bits=(2,))


def test_a_layer_with_float_activations_has_no_bits(network, data):
    layer = network.get_submodule("blocks.1.mlp.fc2")
    layer.config = LayerConfig(activation=None)
    with pytest.raises(ValueError, match=r"layer 'blocks\.1\.mlp\.fc2': activations are not"):
        layer_sensitivity(network, *data, bits=(2,))
    with pytest.raises(ValueError, match="there are no bits"), activation_bits(layer, 2):
        pass


def test_a_broken_reference_is_refused(network, data):
    teacher = float_dit()
    with torch.no_grad():
        teacher.final_layer.linear.bias[0] = torch.nan
    with pytest.raises(ValueError, match="output is not finite"):
        layer_sensitivity(network, *data, bits=(2,), reference=teacher)


@pytest.mark.parametrize("score", ["output", "local_gradient"])
def test_many_images_go_through_in_parts(network, data, monkeypatch, score):
    given = {"bits": (2, 4), "timesteps": 2, "score": score}
    whole = layer_sensitivity(network, *data, **given).matrix
    rows = []
    network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr(local_sensitivity, "PART", 4)
    parts = layer_sensitivity(network, *data, **given).matrix
    assert set(rows) == {4, 2}
    assert torch.allclose(parts, whole, rtol=1e-3)


@pytest.mark.parametrize(("score", "passes"), [("output", 1 + 8 * 2), ("local_gradient", 1)])
def test_the_work_is_told_before_it_is_done(network, data, score, passes):
    network(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    calls, said = [], []
    network.register_forward_pre_hook(lambda *_: calls.append(1))

    def say(text):
        said.append((len(calls), text))

    layer_sensitivity(network, *data, bits=(2, 3, 4), timesteps=2, score=score, say=say)
    ((after, text),) = said
    assert len(calls) == 2 * (1 + passes)  # the reference comes on top
    assert after < len(calls) / 2 or score == "local_gradient"
    assert text.startswith(f"8 layers at 3 bit-widths: {2 * passes} batches, about ")


def test_an_error_that_is_not_finite_is_named_and_not_kept(network, data):
    layer = network.get_submodule("blocks.0.mlp.fc1")
    kept = {}

    def spoil(module, _, output):
        return output * (torch.nan if module.config.activation.bits == 1 else 1)

    layer.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp\.fc1' at 1 bits the network's output"):
        layer_sensitivity(network, *data, (1, 2), timesteps=1, on_row=kept.__setitem__)
    assert [*kept] == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
