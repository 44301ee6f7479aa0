"""Roles against the forward passes of the models themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dit_qat.llm.models import FAMILIES, check_unshared, roles_of, shared_weights

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def make(kind: str, **overrides: Any) -> nn.Module:
    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    if kind == "opt":
        sizes = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
        config = transformers.OPTConfig(**sizes | overrides)
    else:
        config = getattr(transformers, f"{classes[kind]}Config")(**GATED | overrides)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make(request.param, tie_word_embeddings=False)


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What each linear reads in one call."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0])
            )
    with torch.no_grad():
        model(torch.arange(12).view(1, 12))
    return seen


def test_all_linears_of_blocks_and_no_others(model: nn.Module) -> None:
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(roles_of(model).linears) == found - {"lm_head"}


def test_siblings_read_one_tensor_and_others_do_not(model: nn.Module) -> None:
    roles, seen = roles_of(model), inputs_of(model)
    for name in roles.linears:
        same = {other for other in roles.linears if seen[other] is seen[name]}
        assert set(roles.siblings(name)) == same
    assert [n for b in roles.block_names for g in roles.groups(b) for n in g] == list(roles.linears)


def test_linears_are_in_the_order_in_which_groups_run(model: nn.Module) -> None:
    roles, order = roles_of(model), list(inputs_of(model))
    places = [
        min(order.index(name) for name in group)
        for block in roles.block_names
        for group in roles.groups(block)
    ]
    assert places == sorted(places)


def test_a_norm_can_be_scaled_if_its_readers_are_scaled_back(model: nn.Module) -> None:
    """So nothing but the readers sees the norm's output."""
    roles, ids = roles_of(model), torch.arange(12).view(1, 12)
    expected = model(ids).logits
    scaled = copy.deepcopy(model).double()
    for norm in {roles.norm_before(name) for name in roles.linears} - {None}:
        readers = [name for name in roles.linears if roles.norm_before(name) == norm]
        factor = torch.linspace(0.5, 2, 32, dtype=torch.float64)
        with torch.no_grad():
            for parameter in scaled.get_submodule(str(norm)).parameters():
                parameter.mul_(factor)
            for name in readers:
                scaled.get_submodule(name).weight.div_(factor)
    assert len({roles.norm_before(name) for name in roles.linears} - {None}) == 4
    torch.testing.assert_close(scaled(ids).logits.float(), expected, atol=1e-4, rtol=1e-4)


def test_feeders_can_be_permuted_with_their_reader(model: nn.Module) -> None:
    roles, ids = roles_of(model), torch.arange(12).view(1, 12)
    expected = model(ids).logits
    readers = [name for name in roles.linears if roles.feeders(name)]
    assert [roles.role(name) for name in readers] in (["down"] * 2, ["fc2"] * 2)
    order = torch.randperm(48)
    with torch.no_grad():
        for name in readers:
            reader = model.get_submodule(name)
            reader.weight.copy_(reader.weight[:, order])
            for feeder in map(model.get_submodule, roles.feeders(name)):
                for parameter in feeder.parameters():
                    parameter.copy_(parameter[order])
    torch.testing.assert_close(model(ids).logits, expected)


def test_names_and_roles_are_inverse(model: nn.Module) -> None:
    roles = roles_of(model)
    for name in roles.linears:
        assert roles.name(name, roles.role(name)) == name
    assert roles.final_norm is not None
    assert isinstance(model.get_submodule(roles.final_norm), nn.Module)


def test_heads() -> None:
    roles = roles_of(make("llama"))
    assert (roles.heads, roles.key_value_heads) == (4, 2)
    assert roles_of(make("opt")).key_value_heads == 4


def test_norms_behind_the_layers_of_small_opt_feed_more() -> None:
    roles = roles_of(make("opt", do_layer_norm_before=False))
    assert {roles.norm_before(name) for name in roles.linears} == {None}
    assert roles.final_norm is None


@pytest.mark.parametrize("call", ["role", "siblings", "norm_before", "feeders"])
def test_what_has_no_role_is_refused(call: str) -> None:
    roles = roles_of(make("llama"))
    ask: Callable[[str], object] = getattr(roles, call)
    with pytest.raises(ValueError, match="lm_head lies in no block"):
        ask("lm_head")
    with pytest.raises(ValueError, match="no linear with a role"):
        ask("model.layers.0.input_layernorm")


def test_unknown_roles_and_architectures_are_refused() -> None:
    roles = roles_of(make("opt"))
    with pytest.raises(ValueError, match="'gate' is unknown here; there are q, k"):
        roles.name("model.decoder.layers.0", "gate")
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with pytest.raises(ValueError, match=r"'gpt2'.*llama, mistral"):
        roles_of(other)
    with pytest.raises(ValueError, match=r"no list of blocks 'model\.layers'"):
        roles_of(other, FAMILIES["llama"])


def test_a_missing_part_is_named() -> None:
    model = make("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"no model\.layers\.1\.mlp\.up_proj"):
        roles_of(model)


def test_tied_embeddings_are_found() -> None:
    model = make("llama", tie_word_embeddings=True)
    assert shared_weights(model) == [("model.embed_tokens.weight", "lm_head.weight")]
    check_unshared(model, roles_of(model).linears)
    with pytest.raises(ValueError, match=r"lm_head\.weight is shared with model\.embed_tokens"):
        check_unshared(model, ["lm_head"])


def test_shared_layers_are_refused() -> None:
    model = make("llama", tie_word_embeddings=False)
    layers = model.model.layers
    assert not shared_weights(model)
    layers[1].mlp.down_proj = layers[0].mlp.down_proj
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight is shared with"):
        check_unshared(model, roles_of(model).linears)


def test_views_of_one_memory_are_shared() -> None:
    model = make("llama", tie_word_embeddings=False)
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = nn.Parameter(layers[0].mlp.down_proj.weight.detach()[:])
    with pytest.raises(ValueError, match="is shared with"):
        check_unshared(model, roles_of(model).linears)


def test_pieces_of_one_memory_are_not_shared_unless_they_overlap() -> None:
    """As where a fused weight was cut, or a file is mapped."""
    model = make("llama", tie_word_embeddings=False)
    first, second = model.model.layers
    memory = torch.randn(2 * 32 * 48)
    for start, message in ((32 * 48, None), (32 * 47, r"gate_proj.weight is shared with .*up_pr")):
        for linear, at in ((first.mlp.gate_proj, 0), (second.mlp.up_proj, start)):
            linear.weight = nn.Parameter(memory[at : at + 32 * 48].view(48, 32))
        if message is None:
            assert shared_weights(model) == []
            check_unshared(model, roles_of(model).linears)
        else:
            with pytest.raises(ValueError, match=message):
                check_unshared(model, roles_of(model).linears)


@pytest.mark.parametrize("tied", [True, False])
def test_models_without_memory(tied: bool) -> None:
    model = make("qwen2", tie_word_embeddings=tied).to("meta")
    model.tie_weights()
    assert bool(shared_weights(model)) == tied
