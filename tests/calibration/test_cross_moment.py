"""(X_fp - X_q)^T X_q against its definition, with every prefix, on disk, and after a kill."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import (
    BlockView,
    CallStore,
    LinearStatistics,
    Needs,
    Prefix,
    ResumeState,
    drive,
    find_blocks,
)

MakeStore = Callable[..., CallStore]
MakeToy = Callable[..., nn.Module]
LinearsOf = Callable[[nn.Module], dict[str, nn.Linear]]
Quantize = Callable[[BlockView], Mapping[str, nn.Module]]
Crosses = dict[str, Tensor]
BOTH = Needs(second_moment=True, cross_moment=True, tokens=1000)


@pytest.fixture
def driven(make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf) -> Callable[..., Any]:
    """Drive a fresh toy; return cross moments, and the inputs that linears were seen to receive."""

    def run(quantize: Quantize, needs: Needs = BOTH, **options: Any) -> tuple[Crosses, Crosses]:
        model = make_toy()
        crosses: Crosses = {}
        rows: Crosses = {}
        store = options.pop("store", None) or make_store(make_toy())

        def watch(view: BlockView) -> Mapping[str, nn.Module]:
            for name, statistics in view.statistics.items():
                assert statistics.cross_moment is not None
                crosses[name], rows[name] = statistics.cross_moment, statistics.rows
            return quantize(view)

        linears, blocks = linears_of(model), find_blocks(model)
        drive(model, store, blocks, linears=linears, needs=needs, quantize=watch, **options)
        return crosses, rows

    return run


@pytest.mark.parametrize("prefix", ["all", "previous"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_it_is_that_of_the_float_model_and_the_quantized_prefix(
    driven: Callable[..., Any],
    round_block: Quantize,
    make_store: MakeStore,
    make_toy: MakeToy,
    tmp_path: Path,
    prefix: Prefix,
    on_disk: bool,
) -> None:
    """The toy has a break between its blocks, behind which the float path starts anew."""
    store = make_store(make_toy(), folder=tmp_path if on_disk else None)
    crosses, quantized = driven(round_block, prefix=prefix, store=store)
    _, exact = driven(lambda view: {}, prefix=prefix)
    assert len(crosses) == 5 * 6
    for name, cross in crosses.items():
        expected = (exact[name] - quantized[name]).T @ quantized[name]
        torch.testing.assert_close(cross, expected, rtol=1e-4, atol=1e-6)
        assert bool(cross.any()) == (not name.startswith("blocks.0."))
    assert not (tmp_path / "float_states").exists()


def test_without_quantization_it_is_zero(driven: Callable[..., Any]) -> None:
    crosses, _ = driven(lambda view: {})
    assert not any(bool(cross.any()) for cross in crosses.values())


def test_norms_that_a_method_replaces_are_float_on_the_float_path(
    make_store: MakeStore,
) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(self.norm(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Normed() for _ in range(3))

        def forward(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
            for block in self.blocks:
                x = block(x).clone()  # what stands between blocks breaks the chain
            return x

    def louder(view: BlockView) -> Mapping[str, nn.Module]:
        norm = nn.LayerNorm(4)
        nn.init.constant_(norm.weight, 1.5)
        name = f"{view.name}.fc"
        seen[name] = view.statistics[name]
        return {f"{view.name}.norm": norm}

    torch.manual_seed(0)
    model = Model().eval()
    seen: dict[str, LinearStatistics] = {}
    exact: list[Tensor] = []
    handle = model.blocks[2].fc.register_forward_pre_hook(
        lambda _, args: exact.append(args[0].flatten(0, -2))
    )
    store = make_store(model)
    with torch.no_grad():
        for call in store:
            model(*call.args, **call.kwargs)
    handle.remove()
    linears = {f"blocks.{n}.fc": model.blocks[n].fc for n in range(3)}
    blocks = find_blocks(model)
    drive(model, store, blocks, linears=linears, needs=BOTH, quantize=louder)
    found = seen["blocks.2.fc"]
    assert found.cross_moment is not None
    torch.testing.assert_close(found.cross_moment, (torch.cat(exact) - found.rows).T @ found.rows)
    assert bool((model.blocks[1].norm.weight == 1.5).all())


class _Killed(BaseException):
    """What no code catches by the way."""


@pytest.mark.parametrize("fatal", [0, 2, 3])
def test_a_killed_run_goes_on_to_the_same_moments(
    driven: Callable[..., Any], round_block: Quantize, tmp_path: Path, fatal: int
) -> None:
    def killed(view: BlockView) -> Mapping[str, nn.Module]:
        if view.index == fatal:
            raise _Killed
        return round_block(view)

    with pytest.raises(_Killed):
        driven(killed, state=ResumeState(tmp_path, "run"))
    resumed, _ = driven(round_block, state=ResumeState(tmp_path, "run"))
    straight, _ = driven(round_block)
    assert len(resumed) == 6 * (5 - fatal)
    assert all(torch.equal(resumed[name], straight[name]) for name in resumed)


def test_left_out_tokens_and_weights_count_as_in_the_second_moment() -> None:
    """With X_fp = 2 X the cross moment is the second moment."""
    statistics = LinearStatistics(3, 2, Needs(True, cross_moment=True, moment_tokens=4))
    for call in range(2):
        x = torch.randn(2, 5, 3)
        statistics.add(x, call, weight=0.3, reference=2 * x)
    assert statistics.second_moment is not None
    assert statistics.cross_moment is not None
    torch.testing.assert_close(statistics.cross_moment, statistics.second_moment.matrix)
    assert LinearStatistics(3, 2, Needs()).cross_moment is None


def test_a_float_path_that_is_not_finite_is_refused() -> None:
    statistics = LinearStatistics(3, 1, Needs(cross_moment=True))
    bad = torch.tensor([[1.0, torch.nan, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="1 of 2 inputs hold NaN"):
        statistics.add(torch.ones(2, 3), 0, reference=bad)
