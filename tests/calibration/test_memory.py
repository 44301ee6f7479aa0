"""The stated peak against bytes counted while the driver runs, and the counter itself."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.calibration import BlockView, Call, CallStore, Needs, Prefix, drive, find_blocks
from dit_qat.calibration.footprint import Footprint, uncounted
from dit_qat.layers import IntLinear, TokenQuantizer
from dit_qat.primitives.compensation import Block, compensate, compensation_bytes
from dit_qat.primitives.integer import IntegerGrid, decode, encode, fit_scales

WIDTH, TOKENS = 64, 96
GRID = IntegerGrid(4)


class _Block(nn.Module):
    """A transformer block: what it holds inside is many times what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out((q @ k.mT).softmax(-1) @ v)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class _Model(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _compensated(view: BlockView) -> Mapping[str, nn.Module]:
    found = {}
    for name, linear in view.linears.items():
        scales = fit_scales(linear.weight, GRID)

        def quantize(part: Tensor, block: Block, scales=scales) -> Tensor:  # type: ignore[no-untyped-def]
            codes = encode(part, GRID, scales, block.columns)
            return decode(codes, GRID, scales, block.columns)

        moment = view.statistics[name].second_moment
        assert moment is not None
        solved = compensate(linear.weight, moment, quantize).weight
        codes = encode(solved, GRID, scales)
        found[name] = IntLinear.build(
            linear, grid=GRID, scales=scales, codes=codes, activation=TokenQuantizer(4)
        )
    view.error(found)
    view.linear_errors(found)
    return found


def _run(
    calls: int,
    rows: int,
    folder: Path | None = None,
    prefix: Prefix = "all",
    depth: int = 2,
    dtype: torch.dtype = torch.float32,
    cross: bool = False,
) -> tuple[int, int]:
    """Bytes counted at the peak, and stated."""
    torch.manual_seed(0)
    model, store = _Model(depth).eval().to(dtype), CallStore(folder=folder)
    for step in range(calls):
        store.append(Call((torch.randn(rows, TOKENS, WIDTH, dtype=dtype),), {}, step))
    store.finish()
    held = sum(p.nbytes for p in model.parameters()) + (store.bytes if folder is None else 0)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    given = [] if folder else [call.args[0] for call in store]
    with Footprint([*model.parameters(), *given]) as footprint:
        plan = drive(
            model,
            store,
            find_blocks(model),
            linears=linears,
            needs=Needs(second_moment=True, cross_moment=cross),
            quantize=_compensated,
            prefix=prefix,
        )
    return held + footprint.peak, plan.total


@pytest.mark.parametrize("prefix", ["all", "previous"])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("calls", "rows"), [(1, 12), (10, 2)])
def test_the_stated_peak_is_one(
    tmp_path: Path, prefix: Prefix, on_disk: bool, calls: int, rows: int
) -> None:
    counted, stated = _run(calls, rows, tmp_path if on_disk else None, prefix)
    assert counted <= stated < 3 * counted


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("calls", "rows"), [(1, 12), (10, 2)])
def test_the_stated_peak_is_one_with_a_float_path(
    tmp_path: Path, on_disk: bool, calls: int, rows: int
) -> None:
    counted, stated = _run(calls, rows, tmp_path if on_disk else None, cross=True)
    assert counted <= stated < 3 * counted


def test_the_stated_peak_is_one_in_bfloat16() -> None:
    counted, stated = _run(2, 8, dtype=torch.bfloat16)
    assert counted <= stated < 3 * counted


def test_the_peak_grows_with_calls_in_memory_and_not_on_disk(tmp_path: Path) -> None:
    state = 4 * 4 * TOKENS * WIDTH
    memory = [_run(calls, 4)[0] for calls in (10, 16)]
    disk = [_run(calls, 4, tmp_path / str(calls))[0] for calls in (10, 16)]
    assert memory[1] - memory[0] == pytest.approx(2 * 6 * state, rel=0.05)  # calls and states
    assert disk[1] - disk[0] < state


def test_activations_of_one_block_alone_are_held() -> None:
    """A block more costs its weights, no activations."""
    shallow, deep = (_run(4, 4, depth=depth)[0] for depth in (2, 4))
    weights = sum(p.nbytes for p in _Model(2).parameters())
    assert deep - shallow < 1.5 * weights


def test_the_solver_takes_what_it_says() -> None:
    for rows, width in ((48, 256), (512, 128)):
        weight, x = torch.randn(rows, width), torch.randn(2 * width, width)
        H = x.T @ x
        for order in (None, "activation"):
            with Footprint([weight, H]) as footprint:
                result = compensate(weight, H, lambda W, _: W.round(), 32, order=order)  # type: ignore[arg-type]
            stated = compensation_bytes(rows, width)
            assert footprint.peak - result.weight.nbytes <= stated < 3 * footprint.peak


def test_a_footprint_counts_what_lives() -> None:
    given = torch.ones(100)
    with Footprint([given]) as footprint:
        view = given.view(10, 10)
        first = given + 1
        assert footprint.live == 400
        first.mul_(2)
        second = torch.cat([first, view.flatten()])
        assert footprint.live == 1200
        del first
        assert footprint.live == 800
        third = second.view(2, 100)[0] * 1
    assert (footprint.live, footprint.peak) == (1200, 1200)
    assert third.sum() == 400


def test_what_is_read_in_is_no_footprint() -> None:
    with Footprint() as footprint:
        with uncounted():
            weight = torch.zeros(1000)
        assert footprint.peak == 0
        view = weight[:10] + 1
        assert footprint.live == view.nbytes
        del weight
        fresh = torch.zeros(1000)
        assert footprint.live == view.nbytes + fresh.nbytes
