"""Methods on one weight: floors, orders between them, and that codes are what was made up for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_qat.layers.rounding import ClipSearch, Rounded
from dit_qat.llm.methods import awq, d2quant, gptaq, gptq, rtn, slim
from dit_qat.llm.methods.d2quant.quantize import _PlaneRounder, output_errors, round_integers
from dit_qat.primitives.asymmetric import Asymmetric
from dit_qat.primitives.compensation import Block, compensate
from dit_qat.primitives.second_moment import SecondMoment


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(X: Tensor) -> SecondMoment:
    found = SecondMoment(X.shape[1])
    found.add(X)
    return found


def tokens(count: int, width: int, seed: int = 5) -> Tensor:
    mixed = normal(count, 16, seed=seed) @ normal(16, width, seed=90)
    return (mixed + normal(count, width, seed=seed + 1)) * (0.8 * normal(width, seed=91)).exp()


W = normal(48, 128) * (0.5 * normal(128, seed=3)).exp()
X = tokens(1024, 128)
H = moment(X)
EXACT = d2quant.D2QuantConfig(group_size=32)


def error(Q: Tensor, x: Tensor = X, exact: Tensor | None = None) -> float:
    return float((x @ Q.T - (x if exact is None else exact) @ W.T).square().sum())


NEAREST = error(rtn.quantize_weight(W, rtn.RTNConfig(group_size=32)).values)


def test_rounding_is_idempotent_and_within_half_a_step() -> None:
    config = rtn.RTNConfig(bits=3, group_size=32)
    codes, scales, values = rtn.quantize_weight(W, config)
    again = rtn.quantize_weight(values, config)
    torch.testing.assert_close(again.values, values, rtol=2e-3, atol=1e-4)
    steps = scales.scale.repeat_interleave(32, 1)
    assert bool(((values - W).abs() <= 1.01 * steps / 2 + steps / 2).all())
    assert bool((codes <= 7).all())
    clipped = rtn.quantize_weight(W, replace(config, clip=ClipSearch(exponent=2.0)))
    assert (clipped.values - W).square().sum() <= (values - W).square().sum()


def test_zero_rows_and_dead_columns_are_safe() -> None:
    weight, x = W.clone(), X.clone()
    weight[3], x[:, 7] = 0, 0
    H, D = moment(x), torch.zeros(128, 128)
    for Q in (
        rtn.quantize_weight(weight, rtn.RTNConfig(group_size=32)).values,
        gptq.quantize_weight(weight, H, gptq.GPTQConfig(group_size=32)).values,
        gptaq.quantize_weight(weight, H, D, gptaq.GPTAQConfig(group_size=32)).values,
        d2quant.quantize_weight(weight, H, d2quant.D2QuantConfig(group_size=32), D).decode(),
        slim.quantize_weight(weight, H, slim.SliMConfig(group_size=32), x[:64]).decode(),
    ):
        assert Q.isfinite().all()
        assert not Q[3].any() or float(Q[3].abs().max()) < 0.1


@pytest.mark.parametrize("act_order", ["static", "group", "none"])
def test_gptq_is_below_rounding_and_its_codes_are_its_values(act_order: str) -> None:
    config = gptq.GPTQConfig(group_size=32, act_order=act_order)  # type: ignore[arg-type]
    assert error(gptq.quantize_weight(W, H, config).values) < 0.8 * NEAREST


def test_many_bits_give_the_weight_and_uncorrelated_inputs_rounding() -> None:
    fine = gptq.quantize_weight(W, H, gptq.GPTQConfig(bits=8, group_size=32)).values
    torch.testing.assert_close(fine, W, rtol=0, atol=0.15)
    flat = SecondMoment(128)
    flat.matrix, flat.tokens = torch.eye(128), 10_000
    for act_order in ("static", "group", "none"):
        config = gptq.GPTQConfig(group_size=32, act_order=act_order)  # type: ignore[arg-type]
        nearest = rtn.quantize_weight(W, rtn.RTNConfig(group_size=32)).values
        assert torch.equal(gptq.quantize_weight(W, flat, config).values, nearest)


def test_gptaq_on_equal_inputs_is_gptq_bit_for_bit() -> None:
    nothing = torch.zeros(128, 128)
    for act_order in ("static", "group", "none"):
        plain = gptq.GPTQConfig(group_size=32, act_order=act_order)  # type: ignore[arg-type]
        term = gptaq.GPTAQConfig(group_size=32, act_order=act_order)  # type: ignore[arg-type]
        found = gptaq.quantize_weight(W, H, nothing, term)
        assert torch.equal(found.codes, gptq.quantize_weight(W, H, plain).codes)


def test_gptaq_is_nearer_to_the_float_outputs() -> None:
    exact = X + 0.5 * tokens(1024, 128, seed=40)
    D = (exact - X).T @ X
    plain = error(gptq.quantize_weight(W, H, gptq.GPTQConfig(group_size=32)).values, exact=exact)
    for changed in ({}, {"multiplies": "as_released"}, {"retarget": True, "strength": 1.0}):
        config = gptaq.GPTAQConfig(group_size=32, **changed)  # type: ignore[arg-type]
        assert error(gptaq.quantize_weight(W, H, D, config).values, exact=exact) < plain


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("ordered", [False, True])
def test_planes_are_what_errors_were_made_up_for(bits: int, ordered: bool) -> None:
    order = "groups" if ordered else "none"
    config = d2quant.D2QuantConfig(bits=bits, group_size=32, order=order)
    code = d2quant.quantize_weight(W, H, config)
    rounder = _PlaneRounder(W, 32, config)
    order = "group_activation" if ordered else None
    result = compensate(W, H, rounder, 32, order=order, group_size=32)  # type: ignore[arg-type]
    assert torch.equal(code.decode(), result.weight)
    assert code.nominal_bits == bits


def test_dual_scales_beat_integers_where_columns_differ() -> None:
    """Column factors stay what they are under a flat second moment."""
    config = d2quant.D2QuantConfig(group_size=32, order="none")
    spread = W * (1.2 * normal(128, seed=8)).exp()

    def relative(Q: Tensor) -> float:
        return float((X @ (Q - spread).T).square().sum())

    planes = relative(d2quant.quantize_weight(spread, H, config).decode())
    _, integers = round_integers(spread, H, config)
    assert planes < 0.9 * relative(integers.values)


def test_column_scales_have_a_geometric_mean_of_one_by_group() -> None:
    code = d2quant.quantize_weight(W, H, d2quant.D2QuantConfig(group_size=32))
    assert code.column_scale is not None
    means = code.column_scale.float().log().view(4, 32).mean(1)
    torch.testing.assert_close(means, torch.zeros(4), rtol=0, atol=1e-2)


def test_scales_change_nothing_before_rounding_and_the_chosen_one_is_no_worse() -> None:
    config = awq.AWQConfig(bits=2, group_size=32, clip=False)
    scale = awq.search_scale([W], X[:256], config)
    assert bool((scale > 0).all())
    torch.testing.assert_close((X / scale) @ (W * scale).T, X @ W.T, rtol=1e-3, atol=1e-2)

    def loss(scale: Tensor | None) -> float:
        (rounded,) = awq.quantize_siblings([W], X[:256], config, scale, [False]).rounded
        x = X[:256] if scale is None else X[:256] / scale
        return float((x @ rounded.values.T - X[:256] @ W.T).square().sum())

    assert loss(scale) < loss(None)
    flat = awq.search_scale([W], X[:256], replace(config, ratios=1))
    assert torch.equal(flat, torch.ones(128))


def test_clipping_lowers_the_error_of_every_group() -> None:
    config = awq.AWQConfig(bits=2, group_size=32)
    grid = awq._grid(config, 128)

    def errors(factors: list[float]) -> Tensor:
        scales = awq.clip_ranges(W, X, grid, factors)
        Q = awq.decode(awq.encode(W, grid, scales), grid, scales)
        groups, x = (Q - W).view(48, 4, 32), X.view(-1, 4, 32)
        return torch.einsum("tgi,ogi->tog", x, groups).square().sum(0)

    full, clipped = errors([1.0]), errors(config.clip_factors)
    assert bool((clipped <= full * (1 + 1e-4)).all())
    assert float(clipped.sum()) < 0.95 * float(full.sum())
    assert config.clip_factors == pytest.approx([1 - k / 20 for k in range(10)])


def test_mixed_bits_average_exactly_and_beat_equal_ones() -> None:
    config = slim.SliMConfig(group_size=16, range_steps=5)
    weight = W.clone()
    weight[:, :16] *= 4
    code = slim.quantize_weight(weight, H, config, X[:128])
    assert code.nominal_bits == 2
    bits = slim.allocate_bits(weight, slim.salience(weight, H.matrix, 0.01), X[:128], config)
    assert int((bits == 1).sum()) == int((bits == 3).sum()) >= 1
    assert int(bits[0]) == 3
    short = slim.allocate_bits(weight[:, :120], weight[:, :120] ** 2, X[:128, :120], config)
    assert int(short[-1]) == 2
    assert float(short.float().mean()) == 2


def test_salience_divides_by_the_cholesky_diagonal_of_the_inverse() -> None:
    Hd = H.matrix.double()
    damped = Hd + 0.01 * Hd.diagonal().mean() * torch.eye(128).double()
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = W.double().square() / U.diagonal().square()
    torch.testing.assert_close(
        slim.salience(W, H.matrix, 0.01).double(), expected, rtol=1e-4, atol=0
    )


def test_mixed_codes_are_what_errors_were_made_up_for() -> None:
    config = slim.SliMConfig(group_size=16, range_steps=2)
    worth = slim.salience(W, H.matrix, 0.01)
    bits = slim.allocate_bits(W, worth, X[:128], config)
    rounder = slim._MixedRounder(W, worth, bits, config)
    code = slim.quantize_weight(W, H, config, X[:128])
    assert torch.equal(code.decode(), compensate(W, H, rounder, 16).weight)


def test_one_bit_groups_are_mean_and_spread_and_ranges_never_hurt() -> None:
    config = slim.SliMConfig(range_steps=10)
    salient = torch.zeros(48, 128, dtype=torch.bool)
    one = slim.fit_group(W, salient, 1, config)
    mean, spread = W.mean(1), (W - W.mean(1, keepdim=True)).abs().mean(1)
    levels = one.values(one.codes(W))
    torch.testing.assert_close(levels.amax(1), mean + spread, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(levels.amin(1), mean - spread, rtol=2e-3, atol=1e-3)
    for bits in (2, 3):
        searched, plain = (
            slim.fit_group(W, salient, bits, c) for c in (config, replace(config, range_steps=0))
        )
        errors = [(f.values(f.codes(W)) - W).square().sum(1) for f in (searched, plain)]
        assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rtn.RTNConfig(bits=5), "bits=5"),
        (lambda: gptq.GPTQConfig(act_order="yes"), "act_order='yes'"),  # type: ignore[arg-type]
        (lambda: gptq.GPTQConfig(damping=-1), "damping=-1"),
        (lambda: gptaq.GPTAQConfig(strength=-1), "strength=-1"),
        (lambda: d2quant.D2QuantConfig(bits=4), "bits=4"),
        (lambda: d2quant.D2QuantConfig(multiplies="all"), "multiplies='all'"),  # type: ignore[arg-type]
        (lambda: d2quant.D2QuantConfig(preset="best"), "preset='best'"),  # type: ignore[arg-type]
        (lambda: d2quant.D2QuantConfig(order="rows"), "order='rows'"),  # type: ignore[arg-type]
        (lambda: d2quant.D2QuantConfig(clips=()), "clips="),
        (lambda: d2quant.D2QuantConfig(headroom=(1.0, 0.0)), "headroom="),
        (lambda: awq.AWQConfig(ratios=0), "ratios=0"),
        (lambda: awq.AWQConfig(clip_least=2.0), "clip_least=2.0"),
        (lambda: slim.SliMConfig(bits=1), "bits=1"),
        (lambda: slim.SliMConfig(range_width=1.5), "range_width=1.5"),
        (lambda: rtn.RTN(rtn.RTNConfig(), bits=3), "not both: bits"),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_of_the_plane_rounder_need_whole_groups() -> None:
    """What compensate promises it: blocks of whole groups, in one piece."""
    seen: list[Block] = []
    rounder = _PlaneRounder(W, 32, d2quant.D2QuantConfig(group_size=32))

    def record(part: Tensor, block: Block) -> Tensor:
        seen.append(block)
        return rounder(part, block)

    compensate(W, H, record, 32, order="group_activation", group_size=32)
    assert all(len(set((block.columns // 32).tolist())) == 1 for block in seen)


def test_output_errors_are_those_of_the_outputs_but_for_a_constant() -> None:
    exact = X + 0.5 * tokens(1024, 128, seed=40)
    term = Asymmetric((exact - X).T @ X, 1.0)
    Q = [W + 0.1 * normal(48, 128, seed=seed) for seed in (1, 2)]
    plain, moved = ([output_errors(W, q, H.matrix, given) for q in Q] for given in (None, term))
    direct = [(X @ (q - W).T).square().sum(0) for q in Q]
    torch.testing.assert_close(plain, direct, rtol=1e-4, atol=1e-2)
    aimed = [(X @ q.T - exact @ W.T).square().sum(0) for q in Q]
    difference = moved[0] - moved[1]
    torch.testing.assert_close(difference, aimed[0] - aimed[1], rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("crossed", [False, True])
def test_every_row_takes_the_better_range(crossed: bool) -> None:
    full, clipped = ClipSearch(values=1), ClipSearch(41, 0.2, 2.0)
    D = 0.2 * (tokens(1024, 128, seed=40) - X).T @ X if crossed else None
    term = None if D is None else Asymmetric(D)

    def rounded(*clips: ClipSearch) -> Rounded:
        return round_integers(W, H, d2quant.D2QuantConfig(group_size=32, clips=clips), D)[1]

    both, *alone = rounded(full, clipped), rounded(full), rounded(clipped)
    errors = [output_errors(W, found.values, H.matrix, term) for found in (both, *alone)]
    assert torch.equal(errors[0], torch.minimum(*errors[1:]))
    assert bool((errors[0] < errors[1]).any())
    assert bool((errors[0] < errors[2]).any())
    grid = awq.IntegerGrid(2, False, 32)
    assert torch.equal(awq.decode(both.codes, grid, both.scales), both.values)


def test_headroom_leaves_what_later_columns_need() -> None:
    tight = d2quant.D2QuantConfig(group_size=32, headroom=(1.0,))
    errors = [error(d2quant.quantize_weight(W, H, c).decode()) for c in (tight, EXACT)]
    assert errors[1] < 0.95 * errors[0]


def test_columns_of_next_to_no_weight_spoil_no_scale() -> None:
    weight = W.clone()
    weight[:, :24] *= 1e-12
    weight[:, 33:64] = 0
    code = d2quant.quantize_weight(weight, H, EXACT)
    assert code.column_scale is not None
    assert 2.0**-9 < float(code.column_scale.min()) < float(code.column_scale.max()) < 2**8
    Q = code.decode()
    assert error(Q + W - weight) < 1.2 * error(d2quant.quantize_weight(W, H, EXACT).decode())


@pytest.mark.parametrize("bits", [2, 3])
def test_exact_is_no_worse_than_paper(bits: int) -> None:
    errors = {}
    for preset in ("paper", "exact"):
        config = d2quant.D2QuantConfig(preset=preset, bits=bits, group_size=32)  # type: ignore[arg-type]
        planes = d2quant.quantize_weight(W, H, config).decode()
        errors[preset] = error(planes), error(round_integers(W, H, config)[1].values)
    assert errors["exact"][0] < errors["paper"][0]
    assert errors["exact"][1] < errors["paper"][1]
