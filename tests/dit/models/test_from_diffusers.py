import pytest
import torch
from diffusers import DiTTransformer2DModel

from dit_qat.dit.models import dit_from_diffusers


@pytest.fixture
def theirs():
    """A small diffusers model, all weights random, embedders tied over blocks."""
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=7,
        norm_num_groups=1,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 8, 8, generator=generator)
    return x, torch.tensor([0, 17, 500, 999]), torch.tensor([0, 3, 6, 7])


@torch.no_grad()
def test_outputs_are_those_of_diffusers(theirs):
    x, t, y = inputs()
    expected = theirs(x, t, y).sample
    ours = dit_from_diffusers(theirs).eval()
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, y), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_frequencies_and_norm_epsilon_matter(theirs):
    """The original's choices would give other outputs, so the test above can fail."""
    x, t, y = inputs()
    ours = dit_from_diffusers(theirs).eval()
    expected = ours(x, t, y)
    ours.t_embedder.shift = 0
    assert not torch.allclose(ours(x, t, y), expected, rtol=1e-4, atol=1e-4)
    ours.t_embedder.shift = 1
    assert [block.norm2.eps for block in ours.blocks] == [1e-5] * 3


def test_a_state_dict_with_its_config_does_as_well(theirs):
    converted = dit_from_diffusers(theirs.state_dict(), dict(theirs.config))
    for name, tensor in dit_from_diffusers(theirs).state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor)
    assert converted.config["learn_sigma"]
    with pytest.raises(ValueError, match="pass diffusers' config"):
        dit_from_diffusers(theirs.state_dict())


def test_embedders_that_differ_are_refused_by_name(theirs):
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[0] += 1
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\..*linear_1\.bias differs"):
        dit_from_diffusers(theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"out_channels": 3}, "out_channels=3"),
        ({"num_layers": 4}, "num_layers=4"),
    ],
)
def test_other_kinds_of_model_are_refused(theirs, change, message):
    with pytest.raises(ValueError, match=message):
        dit_from_diffusers(theirs.state_dict(), dict(theirs.config) | change)


@pytest.mark.parametrize(
    "name", ["sample_size", "in_channels", "num_layers", "num_embeds_ada_norm"]
)
def test_a_configuration_without_a_key_is_named(theirs, name):
    config = {key: value for key, value in theirs.config.items() if key != name}
    with pytest.raises(ValueError, match=f"lacks {name}; pass the whole config"):
        dit_from_diffusers(theirs.state_dict(), config)
