import copy
import math

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import nn

from dit_qat.dit.models import DiT
from dit_qat.dit.models.dit import TimestepEmbedder

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}


def small(randomize=True, **overrides):
    """Build a small model, by default with the zero-initialised layers randomised too."""
    model = DiT(**(SMALL | overrides))
    if randomize:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch(n=3, classes=5, **overrides):
    generator = torch.Generator().manual_seed(1)
    sizes = SMALL | overrides
    shape = (n, sizes["in_channels"], sizes["input_size"], sizes["input_size"])
    y = torch.randint(classes, (n,), generator=generator) if classes else None
    x = torch.randn(shape, generator=generator)
    return x, torch.randint(1000, (n,), generator=generator), y


def test_a_new_model_predicts_zero_and_its_blocks_are_identities():
    model = small(randomize=False)
    x, t, y = batch()
    assert torch.equal(model(x, t, y), torch.zeros(3, 4, 8, 8))
    tokens, condition = torch.randn(3, 16, 32), torch.randn(3, 32)
    assert torch.equal(model.blocks[1](tokens, condition), tokens)


def test_initialization_follows_the_paper():
    torch.manual_seed(0)
    model = DiT(input_size=4, in_channels=2, hidden_size=384, depth=1, num_heads=6, num_classes=50)
    weight = model.blocks[0].mlp.fc1.weight
    assert weight.abs().max() <= math.sqrt(6 / sum(weight.shape))
    for table in (model.t_embedder.mlp[2], model.y_embedder.embedding_table):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(not bias.any() for bias in biases)


def test_parameter_names_are_those_of_the_published_checkpoints():
    outer = {
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    }
    inner = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"}
    layers = outer | {f"blocks.{i}.{name}" for i in range(2) for name in inner}
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    names |= {"pos_embed", "y_embedder.embedding_table.weight"}
    assert set(small().state_dict()) == names


def test_position_embedding_is_fixed_and_has_the_published_axis_order():
    model = small()
    expected = get_2d_sincos_pos_embed(32, 4, base_size=4).float()
    torch.testing.assert_close(model.pos_embed[0], expected, rtol=0, atol=1e-6)
    assert not model.pos_embed.requires_grad
    rows = model.pos_embed[0].reshape(4, 4, 32)
    assert torch.equal(rows[0, 1, :16], rows[3, 1, :16])  # first half: the column only
    assert torch.equal(rows[1, 0, 16:], rows[1, 3, 16:])  # second half: the row only
    assert not torch.equal(rows[0, 1], rows[1, 0])


@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_features_match_diffusers_formula(shift):
    embedder = TimestepEmbedder(256, shift)
    embedder.mlp = nn.Identity()
    t = torch.tensor([0, 1, 500, 999])
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(embedder(t), expected, rtol=0, atol=1e-5)
    assert torch.equal(embedder(t), embedder(t.float()))


def test_patches_go_back_to_where_they_came_from():
    model = small(learn_sigma=False)
    x, _, _ = batch()
    patches = x.reshape(3, 2, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(3, 16, 8)
    assert torch.equal(model._unpatchify(patches), x)


def test_images_of_a_batch_do_not_see_each_other():
    model = small()
    x, t, y = batch()
    changed = model(torch.cat([x[:1], -x[1:]]), torch.cat([t[:1], t[1:] // 2]), y)
    assert torch.equal(changed[0], model(x, t, y)[0])
    assert not torch.equal(changed[1], model(x, t, y)[1])


def test_timestep_and_label_reach_the_output():
    model = small()
    x, t, y = batch()
    out = model(x, t, y)
    assert not torch.allclose(model(x, (t + 100) % 1000, y), out)
    assert not torch.allclose(model(x, t, (y + 1) % 5), out)


def test_unconditional_model_takes_no_labels():
    model = small(num_classes=0)
    x, t, _ = batch()
    assert model(x, t).shape == (3, 4, 8, 8)
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    with pytest.raises(ValueError, match="unconditional"):
        model(x, t, torch.zeros(3, dtype=torch.long))


def test_null_class_is_the_row_after_the_labels_or_a_clear_error():
    assert small().null_class == 5
    assert small().y_embedder.embedding_table.num_embeddings == 6
    assert small(class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == 5
    for lacking in ({"class_dropout_prob": 0.0}, {"num_classes": 0}):
        with pytest.raises(ValueError, match="no null class"):
            _ = small(**lacking).null_class


@pytest.mark.parametrize("guided_channels", [1, 3, None])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_extrapolates_the_guided_noise_channels_only(guided_channels, scale):
    model = small(in_channels=4)
    x, t, y = batch(in_channels=4)
    null = torch.full_like(y, model.null_class)
    both, times = torch.cat([x, torch.full_like(x, torch.nan)]), torch.cat([t, t])
    out = model.forward_with_cfg(both, times, torch.cat([y, null]), scale, guided_channels)
    with_label, without = model(x, t, y), model(x, t, null)
    guided = guided_channels or 4
    expected = with_label.clone()
    expected[:, :guided] = (without + scale * (with_label - without))[:, :guided]
    torch.testing.assert_close(out[:3], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[3:, :guided], out[:3, :guided])
    torch.testing.assert_close(out[3:, guided:], without[:, guided:], rtol=1e-4, atol=1e-4)


def test_guided_channels_beyond_the_image_guide_all_of_it():
    model = small()
    x, t, y = batch(4)
    out = [model.forward_with_cfg(x, t, y, 3.0, channels) for channels in (3, 2, None)]
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


def test_guidance_refuses_an_odd_batch():
    x, t, y = batch(3)
    with pytest.raises(ValueError, match="even batch"):
        small().forward_with_cfg(x, t, y, 2.0)


def test_gradient_checkpointing_changes_no_gradient():
    x, t, y = batch()
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        model.gradient_checkpointing = checkpointing
        model(x, t, y).square().mean().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_config_rebuilds_the_model():
    model = small(timestep_shift=1, norm2_eps=1e-5, mlp_ratio=2.0)
    again = DiT(**model.config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(*batch()), model(*batch()))


class _Doubled(nn.Module):
    """Some other layer with the call of a linear one and no weight of that name."""

    def __init__(self, linear):
        super().__init__()
        self.inner = linear

    def forward(self, x):
        return self.inner(x) + self.inner(x)


def test_every_linear_layer_can_be_swapped_for_another_module():
    model = small()
    linears = [name for name, child in model.named_modules() if type(child) is nn.Linear]
    assert len(linears) == 2 * 5 + 4
    for name in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _Doubled(model.get_submodule(name)))
    assert model(*batch()).isfinite().all()


def test_float64_and_bfloat16_models_run():
    x, t, y = batch()
    for dtype in (torch.float64, torch.bfloat16):
        assert small().to(dtype)(x.to(dtype), t, y).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 1, 8, 8)}, r"expected images of shape \(N, 2, 8, 8\)"),
        ({"x": torch.zeros(3, 2, 8, 6)}, r"got \(3, 2, 8, 6\)"),
        ({"t": torch.zeros(2)}, "one timestep per image"),
        ({"y": None}, "needs labels"),
        ({"y": torch.zeros(2, dtype=torch.long)}, "one integer label per image"),
        ({"y": torch.zeros(3)}, "one integer label per image"),
        ({"y": torch.tensor([0, 6, 1])}, r"rows 0 to 5"),
        ({"y": torch.tensor([0, -1, 1])}, r"labels span \[-1, 1\]"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    x, t, y = batch()
    with pytest.raises(ValueError, match=message):
        small()(**({"x": x, "t": t, "y": y} | change))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        *((name, value, 1) for name in ("input_size", "patch_size") for value in (0, -2)),
        *((name, value, 1) for name in ("in_channels", "hidden_size") for value in (0, -4)),
        ("num_heads", 0, 1),
        ("num_heads", -1, 1),
        ("depth", -1, 0),
        ("num_classes", -1, 0),
    ],
)
def test_sizes_out_of_range_are_named(name, value, least):
    with pytest.raises(ValueError, match=rf"{name}={value} is too small.* at least {least}"):
        small(**{name: value})


@pytest.mark.parametrize("mlp_ratio", [0.0, -1.0, math.inf, -math.inf, math.nan, 1e-3])
def test_mlp_ratios_without_an_mlp_are_refused(mlp_ratio):
    with pytest.raises(ValueError, match=rf"mlp_ratio={mlp_ratio} gives .* at least 1/32"):
        small(mlp_ratio=mlp_ratio)


def test_no_blocks_are_allowed():
    assert len(small(depth=0).blocks) == 0


@pytest.mark.parametrize(
    "sizes",
    [{"patch_size": 3}, {"num_heads": 5}, {"hidden_size": 30}, {"class_dropout_prob": 1.5}],
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=r"must|no multiple|no probability"):
        small(**sizes)


@pytest.mark.parametrize("nested", [False, True])
def test_quantized_state_does_not_enter_a_float_model(nested):
    model = copy.deepcopy(small())  # the guard must survive copies
    outer = nn.ModuleDict({"student": model}) if nested else model
    state = outer.state_dict()
    prefix = "student." if nested else ""
    state[f"{prefix}blocks.1.mlp.fc1._extra_state"] = {"format": "ternary"}
    with pytest.raises(RuntimeError, match=r"quantize_\(model, config\).*to_float"):
        outer.load_state_dict(state)


def test_the_forward_pass_draws_no_random_numbers():
    model, inputs = small().train(), batch()
    before = torch.get_rng_state()
    model(*inputs)
    assert torch.equal(before, torch.get_rng_state())
