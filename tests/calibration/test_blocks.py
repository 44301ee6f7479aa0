from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockChain, Call, CallStore, find_blocks
from dit_qat.calibration.chain import Source

MakeStore = Callable[..., CallStore]
MakeToy = Callable[..., nn.Module]
LinearsOf = Callable[[nn.Module], dict[str, nn.Linear]]


def _chain(model: nn.Module, store: CallStore, linears: dict[str, nn.Linear]) -> BlockChain:
    return BlockChain(model, find_blocks(model), linears, store[0])


def test_blocks_are_found_by_patterns_or_alone(make_toy: MakeToy) -> None:
    model = make_toy()
    names = [name for name, _ in find_blocks(model)]
    assert names == ["blocks.0", "blocks.1", "blocks.2", "late.0", "late.1"]
    assert [name for name, _ in find_blocks(model, ["late.*", "blocks.[01]"])] == [
        "late.0",
        "late.1",
        "blocks.0",
        "blocks.1",
    ]


def test_a_call_puts_blocks_into_the_order_of_execution(
    make_toy: MakeToy, make_store: MakeStore
) -> None:
    model = make_toy()
    patterns = ["late.*", "blocks.*"]
    names = [name for name, _ in find_blocks(model, patterns, make_store(model)[0])]
    assert names == [name for name, _ in find_blocks(model)]


def test_patterns_that_match_nothing_are_refused_with_near_names(make_toy: MakeToy) -> None:
    with pytest.raises(ValueError, match=r"'block\.\*' matches no block of Toy; near names: block"):
        find_blocks(make_toy(), ["block.*"])
    with pytest.raises(ValueError, match="Linear has no list of blocks; give patterns"):
        find_blocks(nn.Linear(2, 2))


def test_chained_and_captured_inputs_are_told_apart(
    make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf
) -> None:
    model = make_toy()
    store = make_store(model)
    links = _chain(model, store, linears_of(model)).of(store[0]).links
    assert [link.starts for link in links] == [True, False, False, True, False]
    # x comes from the block before; the condition passes through the blocks as it is.
    assert links[1].args == (Source("out", 0, 0), Source("in", 0, 1))
    assert links[1].kwargs == {"scale": 0.7}
    assert links[4].args == (Source("out", 3, 0), Source("in", 3, 1))


def test_the_chain_brings_what_running_the_model_brings(
    make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf
) -> None:
    model = make_toy(late=0)
    store = make_store(model)
    chain = _chain(model, store, linears_of(model))
    shapes, state = chain.of(store[0]), chain.capture(store[0], 0)
    for block in (0, 1):
        state = shapes.advance(block, state, chain.run(shapes, block, state))
        exact = chain.capture(store[0], block + 1)
        assert state.keys() == exact.keys() == shapes.live(block + 1)
        assert all(torch.equal(state[source], exact[source]) for source in exact)


def test_calls_of_other_shapes_or_values_get_their_own_chain(
    make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf
) -> None:
    model = make_toy()
    store = make_store(model)
    chain = _chain(model, store, linears_of(model))
    wide = Call((torch.zeros(3, 9, 4), torch.ones(3)), {"scale": 0.7})
    other = Call(store[0].args, {"scale": 0.1})
    assert chain.of(store[0]) is chain.of(store[1])
    assert chain.of(wide).rows["blocks.0.up"] == 27
    assert chain.of(store[0]).rows["late.0.up"] == 20
    assert chain.of(other).links[1].kwargs == {"scale": 0.1}


def test_linears_that_receive_one_tensor_are_grouped(
    make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf
) -> None:
    model = make_toy(blocks=1, late=1)
    store = make_store(model)
    shared = _chain(model, store, linears_of(model)).of(store[0]).shared
    assert shared == tuple(tuple(f"{b}.0.attn.{n}" for n in "qkv") for b in ("blocks", "late"))


class _Odd(nn.Module):
    """Blocks that change their input, and something that does so between them."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between = between
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.blocks[1].register_forward_pre_hook(lambda _, args: (args[0].add_(1),))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        for block in self.blocks:
            x = block(x)
            if self.between:
                x.mul_(2)
        return x


def test_changes_in_place_are_seen() -> None:
    call = Call((torch.randn(2, 3),), {})
    within, between = _Odd(False), _Odd(True)
    for model, starts in ((within, [True, False, False]), (between, [True, True, True])):
        chain = BlockChain(model, find_blocks(model), {}, call)
        links = chain.of(call).links
        assert [link.starts for link in links] == starts
        state = chain.capture(call, 1)
        before = {source: tensor.clone() for source, tensor in state.items()}
        for _ in range(2):
            chain.run(chain.of(call), 1, state)
        assert all(torch.equal(state[source], before[source]) for source in state)


def test_values_that_change_from_call_to_call_are_refused() -> None:
    class Cached(nn.Module):
        def __init__(self, value: Callable[[Tensor], object]) -> None:
            super().__init__()
            self.value, self.blocks = value, nn.ModuleList([_Takes()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x, self.value(x))

    one, other = (Call((torch.full((2, 3), float(n)),), {}) for n in (1, 2))
    for value, shown in (
        (lambda x: [object()], r"a object, and with a object.*use_cache=False"),
        (lambda x: x.sum().item(), r"12\.0, and with 6\.0 in another call"),
    ):
        model = Cached(value)
        chain = BlockChain(model, find_blocks(model), {}, one)
        chain.of(one)
        with pytest.raises(ValueError, match=rf"block blocks\.0 is called with {shown}"):
            chain.capture(other, 0)


class _Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, value: object) -> Tensor:
        return self.linear(x)


def test_blocks_that_cannot_be_driven_are_refused(
    make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf
) -> None:
    model = make_toy()
    store = make_store(model)
    model.extra = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"block extra\.0 runs 0 times"):
        find_blocks(model, None, store[0])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn lies within block blocks\.0"):
        find_blocks(model, ["blocks.0", "blocks.0.attn"], store[0])
    idle = {"extra.0": model.extra[0]}
    blocks = find_blocks(model, ["blocks.*"])
    with pytest.raises(ValueError, match=r"1 linears never run.*extra\.0; skip them"):
        BlockChain(model, blocks, idle, store[0]).of(store[0])
    model.blocks.append(model.blocks[0])
    with pytest.raises(ValueError, match=r"block blocks\.0 runs 2 times"):
        find_blocks(model, ["blocks.*"], store[0])
