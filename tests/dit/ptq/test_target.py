from collections.abc import Callable
from types import SimpleNamespace

import pytest
from torch import nn

from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import PTQTarget, target_of, transformer_of

MakeTransformer = Callable[..., nn.Module]

# By the last part of their names that says what they are, over all blocks.
COUNTS = {
    "DiTTransformer2DModel": {"to_q": 2, "to_k": 2, "to_v": 2, "to_out": 2, "ff": 4},
    "PixArtTransformer2DModel": {"to_q": 4, "to_k": 4, "to_v": 4, "to_out": 4, "ff": 4},
    # The first block has a second attention, and the last ends the text stream.
    "SD3Transformer2DModel": {
        **{"to_q": 4, "to_k": 4, "to_v": 4, "to_out": 4, "ff": 6, "ff_context": 4},
        **{"add_q_proj": 3, "add_k_proj": 3, "add_v_proj": 3, "to_add_out": 2},
    },
    "FluxTransformer2DModel": {
        **{"to_q": 4, "to_k": 4, "to_v": 4, "to_out": 2, "ff": 4, "ff_context": 4},
        **{"add_q_proj": 2, "add_k_proj": 2, "add_v_proj": 2, "to_add_out": 2},
        **{"proj_mlp": 2, "proj_out": 2},
    },
    "ZImageTransformer2DModel": {
        **{"to_q": 6, "to_k": 6, "to_v": 6, "to_out": 6, "w1": 6, "w2": 6, "w3": 6},
    },
    "WanTransformer3DModel": {"to_q": 4, "to_k": 4, "to_v": 4, "to_out": 4, "ffn": 4},
}


def _kind(name: str) -> str:
    parts = name.split(".")
    known = ("ff", "ff_context", "ffn", "to_out")
    return next((part for part in parts if part in known), parts[-1])


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_the_defaults_reach_attention_and_mlp_and_nothing_else(
    name: str, make_transformer: MakeTransformer
) -> None:
    found: dict[str, int] = {}
    target = target_of(make_transformer(name))
    for linear in target.linears():
        found[_kind(linear)] = found.get(_kind(linear), 0) + 1
    assert found == COUNTS[name]
    blocks = tuple(f"{block}." for block, _ in target.find_blocks())
    assert all(linear.startswith(blocks) for linear in target.linears())


def test_wan_reads_images_too(make_transformer: MakeTransformer) -> None:
    names = target_of(make_transformer("WanTransformer3DModel", added_kv_proj_dim=24)).linears()
    assert sum("add_" in name for name in names) == 4


def test_our_dit_quantizes_four_linears_per_block(make_dit: Callable[..., DiT]) -> None:
    target = target_of(make_dit())
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(target.linears()) == [f"blocks.{b}.{part}" for b in range(2) for part in parts]
    assert target.timestep_argument == "t"


def test_patterns_of_the_caller_come_in_place_of_defaults(make_dit: Callable[..., DiT]) -> None:
    model = make_dit()
    target = target_of(model, quantize=["blocks.*"], skip=["*adaLN*", "*.fc2", "blocks.0.*"])
    assert list(target.linears()) == ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]


def test_a_pattern_that_matches_nothing_is_refused(make_dit: Callable[..., DiT]) -> None:
    model = make_dit()
    with pytest.raises(ValueError, match=r"'blocks\.\*\.atn\.qkv' matches no linear.*attn\.qkv"):
        target_of(model, quantize=["blocks.*.atn.qkv"])
    with pytest.raises(ValueError, match=r"'\*norm\*' matches no linear"):
        target_of(model, skip=["*norm*"])
    with pytest.raises(ValueError, match=r"'block\.\*' matches no block of DiT; near names: block"):
        target_of(model, blocks=["block.*"])
    with pytest.raises(ValueError, match=r"skip every linear"):
        target_of(model, skip=["blocks.*"])
    with pytest.raises(ValueError, match=r"no argument 'timestep'; it has x, t, y"):
        target_of(model, timestep_argument="timestep")


def test_unknown_classes_need_patterns() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])

        def forward(self, x: object, sigma: object) -> None: ...

    with pytest.raises(ValueError, match=r"Other has no default patterns.*FluxTransformer2DModel"):
        target_of(Other())
    target = target_of(
        Other(), blocks=["layers.*"], quantize=["layers.*"], timestep_argument="sigma"
    )
    assert isinstance(target, PTQTarget)
    assert list(target.linears()) == ["layers.0.0"]


def test_a_pipeline_without_a_transformer_is_refused(make_dit: Callable[..., DiT]) -> None:
    model = make_dit()
    assert transformer_of(SimpleNamespace(transformer=model)) is model
    pipeline = SimpleNamespace(components={"unet": 1, "vae": 2}, transformer=None)
    with pytest.raises(ValueError, match=r"no transformer to quantize \(its parts: unet, vae\)"):
        transformer_of(pipeline)
