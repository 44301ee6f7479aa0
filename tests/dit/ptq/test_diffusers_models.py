"""The block driver on every transformer of diffusers that has default patterns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockChain, BlockView, CallStore, Needs, record_calls
from dit_qat.dit.ptq import PTQMethod, quantize_post_training, target_of
from dit_qat.layers.int_linear import IntLinear

MakeTransformer = Callable[..., nn.Module]
Inputs = Callable[[str, float], dict[str, Any]]

# Blocks whose inputs something else than the block before computes.
STARTS = {
    "DiTTransformer2DModel": [True, False],
    "PixArtTransformer2DModel": [True, False],
    "SD3Transformer2DModel": [True, False, False],
    "FluxTransformer2DModel": [True, False, False, False],
    "ZImageTransformer2DModel": [True, False, True, False, True, False],
    "WanTransformer3DModel": [True, False],
}
SHARED = {
    "DiTTransformer2DModel": ["attn1.to_q attn1.to_k attn1.to_v"],
    "PixArtTransformer2DModel": ["attn1.to_q attn1.to_k attn1.to_v", "attn2.to_k attn2.to_v"],
    "SD3Transformer2DModel": [
        "attn.to_q attn.to_k attn.to_v",
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "attn2.to_q attn2.to_k attn2.to_v",
    ],
    "FluxTransformer2DModel": [
        "attn.to_q attn.to_k attn.to_v",
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    ],
    "ZImageTransformer2DModel": [
        "attention.to_q attention.to_k attention.to_v",
        "feed_forward.w1 feed_forward.w3",
    ],
    "WanTransformer3DModel": ["attn1.to_q attn1.to_k attn1.to_v", "attn2.to_k attn2.to_v"],
}


def _record(name: str, model: nn.Module, inputs: Inputs) -> CallStore:
    def run() -> None:
        with torch.no_grad():
            for timestep in (900.0, 100.0):
                model(**inputs(name, timestep))

    return record_calls(model, run, timestep_argument=target_of(model).timestep_argument)


@pytest.mark.parametrize("name", sorted(STARTS))
def test_chained_and_captured_blocks_and_shared_inputs_are_found(
    name: str, make_transformer: MakeTransformer, transformer_inputs: Inputs
) -> None:
    model = make_transformer(name)
    target, store = target_of(model), _record(name, model, transformer_inputs)
    chain = BlockChain(model, target.find_blocks(), target.linears(), store[0])
    shapes = chain.of(store[0])
    assert [link.starts for link in shapes.links] == STARTS[name]
    assert chain.of(store[1]) is shapes
    assert not any(link.mutates for link in shapes.links)
    first = chain.blocks[0][0]
    groups = {
        " ".join(linear.removeprefix(f"{first}.") for linear in group)
        for group in shapes.shared
        if group[0].startswith(f"{first}.")
    }
    assert groups == set(SHARED[name])


def test_flux_single_blocks_share_one_input_among_attention_and_mlp(
    make_transformer: MakeTransformer, transformer_inputs: Inputs
) -> None:
    model = make_transformer("FluxTransformer2DModel")
    target, store = target_of(model), _record("FluxTransformer2DModel", model, transformer_inputs)
    chain = BlockChain(model, target.find_blocks(), target.linears(), store[0])
    single = [g for g in chain.of(store[0]).shared if g[0].startswith("single")]
    parts = {"proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"}
    assert [set(group) for group in single] == [
        {f"single_transformer_blocks.{b}.{part}" for part in parts} for b in range(2)
    ]


@pytest.mark.parametrize("name", sorted(STARTS))
def test_every_block_sees_what_the_quantized_prefix_brings(
    name: str,
    make_transformer: MakeTransformer,
    transformer_inputs: Inputs,
    make_round: Callable[..., PTQMethod],
) -> None:
    model, fresh = make_transformer(name), make_transformer(name)
    store = _record(name, model, transformer_inputs)
    method, seen = make_round(4, Needs(tokens=10_000)), {}
    of_block = method.quantize_block

    def watch(view: BlockView) -> Any:
        modules = of_block(view)
        # The fresh model follows: what was quantized so far, and this block float.
        expected = _received(fresh, store, list(view.linears))
        for linear, statistics in view.statistics.items():
            seen[linear] = torch.equal(statistics.rows, expected[linear])
        for linear, module in modules.items():
            fresh.set_submodule(linear, module)
        return modules

    method.quantize_block = watch
    result = quantize_post_training(model, method, store)
    assert all(seen.values())
    assert list(seen) == list(dict.fromkeys(seen))
    assert len(seen) == len(result.table)
    assert all(isinstance(model.get_submodule(row.name), IntLinear) for row in result.table)
    assert all(0 < row.error < 0.5 and row.tokens > 0 for row in result.table)
    assert result.averages["weight_bits"] == result.averages["activation_bits"] == 4


def _received(model: nn.Module, store: CallStore, names: list[str]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for call in store:
            model(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}
