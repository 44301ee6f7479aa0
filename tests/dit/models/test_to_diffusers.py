import pytest
import torch

from dit_qat import LayerConfig, Rule, quantize_
from dit_qat.dit.models import dit_from_diffusers, dit_to_diffusers


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, {"norm2_eps": 1e-5}, {"learn_sigma": False}])
@pytest.mark.parametrize("sizes", [{}, {"num_heads": 4, "patch_size": 1, "in_channels": 3}])
def test_outputs_and_weights_survive_both_ways(make_dit, same_state, overrides, sizes):
    model = make_dit(timestep_shift=1, **overrides, **sizes)
    theirs = dit_to_diffusers(model)
    assert not theirs.training
    x = torch.randn(4, model.in_channels, 4, 4, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 17, 500, 999]), torch.tensor([0, 1, 2, model.null_class])
    expected = model(x, t, y)
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(x, t, y).sample, expected, rtol=1e-5, atol=1e-5)
    back = dit_from_diffusers(theirs)
    assert back.config == model.config
    assert same_state(back, model)
    assert same_state(dit_to_diffusers(back), theirs)


def test_the_copy_is_not_the_source(make_dit, same_state):
    model, untouched = make_dit(timestep_shift=1), make_dit(timestep_shift=1)
    theirs = dit_to_diffusers(model)
    back = dit_from_diffusers(theirs)
    for module in (theirs, back):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(7.0)
    assert same_state(model, untouched)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"timestep_shift": 0}, "timestep_shift=0: .*across_conventions"),
        ({"num_classes": 0}, "num_classes=0: .*no unconditional"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob=0: .*always has a null class"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio=2\.0"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_what_diffusers_cannot_hold_is_named(make_dit, overrides, message):
    with pytest.raises(ValueError, match=message):
        dit_to_diffusers(make_dit(**({"timestep_shift": 1} | overrides)))


def test_positions_of_ones_own_are_refused(make_dit):
    model = make_dit(timestep_shift=1)
    with torch.no_grad():
        model.pos_embed[0, 1, 2] += 1e-3
    with pytest.raises(ValueError, match="pos_embed"):
        dit_to_diffusers(model)


def test_quantized_layers_are_refused(make_dit):
    model = quantize_(make_dit(timestep_shift=1), [Rule("blocks.0.mlp.fc1", LayerConfig())])
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1.*quantized"):
        dit_to_diffusers(model)
