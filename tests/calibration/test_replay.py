"""Looking at a block again while some of its modules are replaced."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView, CallStore, Needs, ResumeState, drive, find_blocks

Quantize = Callable[[BlockView], Mapping[str, nn.Module]]
BOTH = Needs(second_moment=True, cross_moment=True, tokens=1000)


@pytest.fixture
def looked(
    make_toy: Callable[..., nn.Module],
    make_store: Callable[..., CallStore],
    linears_of: Callable[[nn.Module], dict[str, nn.Linear]],
) -> Callable[[Quantize], nn.Module]:
    """Drive a toy whose blocks are looked at by a function."""

    def run(look: Quantize, **options: Any) -> nn.Module:
        model = make_toy()
        linears, blocks = linears_of(model), find_blocks(model)
        store = make_store(make_toy())
        drive(model, store, blocks, linears=linears, needs=BOTH, quantize=look, **options)
        return model

    return run


def test_statistics_behind_nothing_are_those_of_before(
    looked: Callable[[Quantize], nn.Module], round_block: Quantize
) -> None:
    def look(view: BlockView) -> Mapping[str, nn.Module]:
        again = view.statistics_behind({})
        assert list(again) == list(view.linears)
        for name, statistics in again.items():
            before = view.statistics[name]
            assert torch.equal(statistics.rows, before.rows)
            for one, other in (
                (statistics.second_moment.matrix, before.second_moment.matrix),
                (statistics.cross_moment, before.cross_moment),
            ):
                assert torch.equal(one, other)
        return round_block(view)

    looked(look)


def test_statistics_behind_replaced_layers_see_their_outputs(
    looked: Callable[[Quantize], nn.Module], round_block: Quantize
) -> None:
    def look(view: BlockView) -> Mapping[str, nn.Module]:
        modules, up, down = round_block(view), f"{view.name}.up", f"{view.name}.down"
        found = view.statistics_behind({up: modules[up]}, [down])
        assert list(found) == [down]
        rows, exact = view.statistics[up].rows, view.statistics[down].rows
        torch.testing.assert_close(found[down].rows, modules[up](rows).relu())
        if view.index == 0:  # the float path is that of the float block still
            expected = (exact - found[down].rows).T @ found[down].rows
            torch.testing.assert_close(found[down].cross_moment, expected, rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match=rf"{up} is replaced itself"):
            view.statistics_behind({up: modules[up]}, [up])
        return modules

    looked(look)


def test_listeners_are_told_of_every_call(
    looked: Callable[[Quantize], nn.Module], round_block: Quantize
) -> None:
    def look(view: BlockView) -> Mapping[str, nn.Module]:
        name = f"{view.name}.up"
        module = round_block(view)[name]
        heard: list[tuple[Tensor, Tensor]] = []
        view.listen({name: lambda args, _, output: heard.append((args[0], output))}, {name: module})
        x = torch.cat([given.flatten(0, -2) for given, _ in heard])
        assert torch.equal(x, view.statistics[name].rows)
        assert all(torch.equal(output, module(given)) for given, output in heard)
        return {}

    looked(look)


def test_modules_that_are_no_linears_may_be_replaced_and_are_kept(
    looked: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    asked: list[int] = []

    def look(view: BlockView) -> Mapping[str, nn.Module]:
        asked.append(view.index)
        attention = f"{view.name}.attn"
        fresh = type(view.block.attn)()
        nn.init.zeros_(fresh.out.weight)
        return {attention: fresh}

    first = looked(look, state=ResumeState(tmp_path, "run"))
    assert not bool(first.blocks[0].attn.out.weight.any())
    assert len(asked) == 5
    again = looked(look, state=ResumeState(tmp_path, "run"))
    assert len(asked) == 5
    ours, theirs = again.state_dict(), first.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
