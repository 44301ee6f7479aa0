"""PT2-LLM on one weight: what each part is worth, and that the codes are the weight."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_qat.llm.methods.pt2 import PT2, PT2Config, quantize_weight
from dit_qat.llm.methods.pt2.quantize import _TernaryBlocks, most_alike
from dit_qat.primitives.compensation import compensate
from dit_qat.primitives.second_moment import SecondMoment
from dit_qat.primitives.ternary_fit import start_ternary


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(rows: int, width: int, seed: int = 0) -> Tensor:
    """Columns near one of a few prototypes, with outlying columns, in no order."""
    prototypes = normal(rows, 6, seed=seed)
    kinds = torch.randint(0, 6, (width,), generator=torch.Generator().manual_seed(seed + 1))
    noise = normal(rows, width, seed=seed + 2)
    return (prototypes[:, kinds] + 0.7 * noise) * (0.3 * normal(width, seed=seed + 3)).exp()


def tokens(count: int, width: int, seed: int = 5) -> Tensor:
    """Correlated features of unequal size, with much in common."""
    mixed = normal(count, 24, seed=seed) @ normal(24, width, seed=90) + normal(
        count, width, seed=seed + 1
    )
    return mixed * (0.6 * normal(width, seed=91)).exp() + 2 * normal(width, seed=92)


def moment(X: Tensor) -> SecondMoment:
    found = SecondMoment(X.shape[1])
    found.add(X)
    return found


W, X, FRESH = weight(96, 256), tokens(2048, 256), tokens(1024, 256, seed=50)
H = moment(X)
EXACT = PT2Config(group_size=32, asymmetric=0.0)


def error(config: PT2Config, on: Tensor = X) -> float:
    Q = quantize_weight(W, H, config).decode()
    return float((on @ (W - Q).T).square().sum() / (on @ W.T).square().sum())


@pytest.mark.parametrize("order", ["none", "random", "activation", "similarity"])
def test_alignment_helps_and_exact_beats_released_beats_no_compensation(order: str) -> None:
    config = replace(EXACT, order=order)  # type: ignore[arg-type]
    exact, released = error(config), error(replace(config, update="diagonal"))
    assert exact < released < error(replace(config, compensated=False))
    assert exact < error(replace(config, alignment=False))


def test_every_part_helps_on_other_tokens() -> None:
    plain = replace(EXACT, order="none")
    whole = error(plain, FRESH)
    for without in ({"alignment": False}, {"update": "diagonal"}, {"fitting": False}):
        assert whole < error(replace(plain, **without), FRESH)
    assert error(EXACT, FRESH) < whole
    unaligned = replace(plain, alignment=False)
    assert error(unaligned, FRESH) < error(replace(unaligned, fitting=False), FRESH)


def test_without_all_its_parts_it_is_rounding() -> None:
    bare = {"fitting": False, "alignment": False, "compensated": False, "order": "none"}
    config = PT2Config(group_size=32, **bare)  # type: ignore[arg-type]
    assert not PT2(config).needs.cross_moment
    Q = quantize_weight(W, H, config, cross_moment=H.matrix).decode()
    for group in range(8):
        part = slice(32 * group, 32 * group + 32)
        expected = start_ternary(W[:, part]).values
        torch.testing.assert_close(Q[:, part], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("order", ["none", "similarity"])
@pytest.mark.parametrize("width", [256, 100])
def test_the_codes_are_what_errors_were_made_up_for(order: str, width: int) -> None:
    """Bit for bit, the last block being short."""
    config, part, H = replace(EXACT, order=order), W[:, :width], moment(X[:, :width])
    code = quantize_weight(part, H, config)
    blocks = _TernaryBlocks(part.shape, H.matrix, config)
    chooser = most_alike("normalised") if order == "similarity" else None
    assert torch.equal(compensate(part, H, blocks, 32, order=chooser).weight, code.decode())


def test_the_next_block_is_the_columns_most_like_the_mean() -> None:
    picked = most_alike("normalised")(W, 10)
    unit = W / W.norm(dim=0)
    scores = torch.nn.functional.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=0)
    assert set(picked.tolist()) == set(scores.topk(10).indices.tolist())
    raw = torch.nn.functional.cosine_similarity(W, W.mean(1, keepdim=True), dim=0)
    assert set(most_alike("raw")(W, 10).tolist()) == set(raw.topk(10).indices.tolist())


def test_stacked_rows_are_quantized_as_they_are_alone_under_the_same_order() -> None:
    config = replace(EXACT, order="activation")
    both = quantize_weight(W, H, config)
    alone = quantize_weight(W[:40], H, config)
    rows = torch.arange(40)
    assert torch.equal(both.take_rows(rows).codes, alone.codes)
    torch.testing.assert_close(both.decode()[:40], alone.decode())


def test_bits_are_those_of_the_specification() -> None:
    code = quantize_weight(normal(64, 640), moment(tokens(700, 640)), PT2Config(order="none"))
    assert code.nominal_bits == pytest.approx(1.585, abs=1e-3)
    assert code.effective_bits == pytest.approx(1.85)


def test_the_asymmetric_term_brings_outputs_nearer_to_the_float_ones() -> None:
    exact = X + 0.3 * normal(2048, 24, seed=7) @ normal(24, 256, seed=90)
    D = (exact - X).T @ X

    def error(config: PT2Config) -> float:
        Q = quantize_weight(W, H, config, D).decode()
        return float((X @ Q.T - exact @ W.T).square().sum())

    plain = error(EXACT)
    assert error(replace(EXACT, asymmetric=0.25)) < plain
    assert error(replace(EXACT, asymmetric=1.0, retarget=True)) < plain


def test_degenerate_weights_and_inputs_are_safe() -> None:
    flawed, x = W.clone(), X.clone()
    flawed[3], flawed[4], flawed[:, 7] = 0, 0.5, 0
    x[:, 20:60] = 0  # more than a block of dead columns
    for config in (EXACT, replace(EXACT, preset="paper"), replace(EXACT, order="none")):
        Q = quantize_weight(flawed, moment(x), config).decode()
        assert Q.isfinite().all()
        assert float((x @ (flawed - Q).T).square().sum()) < float((x @ flawed.T).square().sum())
        assert quantize_weight(flawed, moment(0 * x), config).decode().isfinite().all()


def test_presets_and_what_overrides_them() -> None:
    paper, exact = PT2Config(preset="paper").recipe, PT2Config().recipe
    assert (paper.update, exact.update) == ("diagonal", "exact")
    assert not paper.order_down
    assert PT2Config(preset="paper", order_down=True).recipe == replace(paper, order_down=True)
    for changed, message in (
        ({"preset": "best"}, "preset='best'"),
        ({"order": "alphabet"}, "order='alphabet'"),
        ({"update": "none"}, "update='none'"),
        ({"group_size": 0}, "group_size=0"),
        ({"asymmetric": -0.1}, "asymmetric=-0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            PT2Config(**changed)  # type: ignore[arg-type]
