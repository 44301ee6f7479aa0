from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView, CallStore, Needs, drive, find_blocks, swapped

MakeStore = Callable[..., CallStore]
MakeToy = Callable[..., nn.Module]
LinearsOf = Callable[[nn.Module], dict[str, nn.Linear]]
Look = Callable[[Callable[[BlockView], None]], nn.Module]


@pytest.fixture
def look(make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf) -> Look:
    """Show every block's view to a function, with nothing quantized."""

    def show(function: Callable[[BlockView], None]) -> nn.Module:
        model = make_toy()

        def quantize(view: BlockView) -> Mapping[str, nn.Module]:
            function(view)
            return {}

        linears, needs = linears_of(model), Needs(probe_calls=3)
        store = make_store(model)
        drive(model, store, find_blocks(model), linears=linears, needs=needs, quantize=quantize)
        return model

    return show


def _scaled(linear: nn.Linear, factor: float) -> nn.Linear:
    scaled = nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        scaled.weight.copy_(factor * linear.weight)
        scaled.bias.copy_(factor * linear.bias)
    return scaled


def test_errors_are_relative_squared_errors(look: Look) -> None:
    def check(view: BlockView) -> None:
        name = f"{view.name}.attn.out"
        doubled = {name: _scaled(view.linears[name], 2.0)}
        assert view.error({}) == 0
        assert view.error({name: view.linears[name]}) == 0
        assert view.error(doubled, f"{view.name}.attn") == pytest.approx(1.0)
        assert view.linear_errors(doubled) == {name: pytest.approx(1.0)}
        assert 0 < view.error(doubled) < 1
        assert view.block.get_submodule("attn.out") is view.linears[name]

    look(check)


def test_the_block_error_is_that_of_the_recorded_calls(
    look: Look, make_toy: MakeToy, make_store: MakeStore
) -> None:
    found = []

    def measure(view: BlockView) -> None:
        if view.name == "late.0":
            found.append(view.error({"late.0.up": _scaled(view.linears["late.0.up"], 1.5)}))

    look(measure)
    model, outputs = make_toy(), []
    model.late[0].register_forward_hook(lambda _, __, output: outputs.append(output))
    for replaced in (False, True):
        if replaced:
            model.late[0].up = _scaled(model.late[0].up, 1.5)
        with torch.no_grad():
            for call in make_store(make_toy()):
                model(*call.args, **call.kwargs)

    def flat(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([t.flatten() for part in parts for t in part])

    exact, changed = flat(outputs[:3]), flat(outputs[3:])
    expected = (changed - exact).square().sum() / exact.square().sum()
    assert found == [pytest.approx(float(expected), rel=1e-5)]


def test_ahead_sees_the_linears_behind_with_float_blocks(
    look: Look, make_toy: MakeToy, make_store: MakeStore
) -> None:
    seen: dict[str, dict[str, Tensor]] = {}

    def measure(view: BlockView) -> None:
        if view.name == "blocks.1":
            worse = {"blocks.1.up": _scaled(view.linears["blocks.1.up"], 1.5)}
            seen.update(float=view.ahead({}, 3), worse=view.ahead(worse, 3))
            seen["near"] = view.ahead(worse, 0)
            seen["one"] = view.ahead(worse, 3, only=["blocks.2.down"])

    model = look(measure)
    # What lies behind the break between the lists is out of reach.
    parts = ["attn.q", "attn.k", "attn.v", "attn.out", "up", "down"]
    assert list(seen["float"]) == [f"blocks.{b}.{part}" for b in (1, 2) for part in parts]
    assert list(seen["near"]) == [f"blocks.1.{part}" for part in parts]
    assert list(seen["one"]) == ["blocks.2.down"]
    changed = {n for n, y in seen["worse"].items() if not torch.equal(y, seen["float"][n])}
    assert changed == {"blocks.1.up", "blocks.1.down"} | {f"blocks.2.{part}" for part in parts}
    model.blocks[1].up = _scaled(model.blocks[1].up, 1.5)
    outputs: list[Tensor] = []
    model.blocks[2].down.register_forward_hook(lambda _, __, y: outputs.append(y.flatten(0, -2)))
    with torch.no_grad():
        for call in make_store(make_toy()):
            model(*call.args, **call.kwargs)
    assert torch.equal(seen["one"]["blocks.2.down"], torch.cat(outputs))


def test_modules_outside_the_block_are_refused(look: Look) -> None:
    def check(view: BlockView) -> None:
        with pytest.raises(ValueError, match="'attn' is no module in block"):
            view.error({}, "attn")

    look(check)


def test_swapped_modules_come_back_whatever_happens(make_toy: MakeToy) -> None:
    model = make_toy()
    before, other = model.blocks[0].up, nn.Linear(8, 16)

    def fail() -> None:
        with swapped(model, {"blocks.0.up": other}):
            assert model.blocks[0].up is other
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.blocks[0].up is before
