import logging

import pytest
import torch
from torch import Tensor

from dit_qat.calibration import Needs
from dit_qat.calibration.statistics import LinearStatistics, step_scales
from dit_qat.dit.methods.adatsq.solver import (
    Moments,
    input_moments,
    rows_wanted,
    weighted_factors,
)
from dit_qat.layers.input_transform import InputTransform, Scale
from dit_qat.layers.token_quantizer import TokenQuantizer

WIDTH, OUT, ROWS = 16, 12, 60
QUANTIZER = TokenQuantizer(3, group_size=8)
ALPHA = torch.tensor([0.2, 0.5, 0.3])


def _calls() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator)
    return [(torch.randn(ROWS, WIDTH, generator=generator) * (t + 1)) @ mix for t in range(3)]


@pytest.fixture
def statistics() -> LinearStatistics:
    """Three steps of equally many rows, all of them kept."""
    found = LinearStatistics(WIDTH, 3, Needs(second_moment=True, tokens=3 * ROWS))
    scales = step_scales(ALPHA, [0, 1, 2], [ROWS] * 3)
    assert scales is not None
    for step, x in enumerate(_calls()):
        found.add(x, step, step, scales[step])
    return found


def _weight(seed: int) -> Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def _moments(statistics: LinearStatistics, rounds: bool = True) -> Moments:
    transform = InputTransform(WIDTH, [Scale(torch.linspace(0.5, 2, WIDTH))])
    return input_moments(statistics, transform, QUANTIZER if rounds else None, ALPHA)


def _brute(W: Tensor, Q: Tensor, rounds: bool = True) -> float:
    """The error itself, step by step."""
    total = 0.0
    for alpha, rows in zip(ALPHA, _calls(), strict=True):
        x = rows / torch.linspace(0.5, 2, WIDTH)
        inputs = QUANTIZER.fake_quantize(x) if rounds else x
        difference = x.double() @ W.T - inputs.double() @ Q.T
        total += float(alpha * difference.square().sum() / ROWS)
    return total


@pytest.mark.parametrize("rounds", [True, False])
def test_the_error_is_the_weighted_sum_over_steps(
    statistics: LinearStatistics, rounds: bool
) -> None:
    W, Q = _weight(1), _weight(2)
    found = _moments(statistics, rounds).error(W, Q)
    assert found == pytest.approx(_brute(W, Q, rounds), rel=1e-4)


def test_without_rounding_all_moments_are_one(statistics: LinearStatistics) -> None:
    moments = _moments(statistics, rounds=False)
    assert torch.equal(moments.exact, moments.cross)
    assert torch.equal(moments.exact, moments.rounded.matrix)
    assert moments.rounded.tokens == 3 * ROWS


def test_target_and_left_over_are_nearly_stationary(statistics: LinearStatistics) -> None:
    """Up to their damping no weight does better for rounded inputs, and none for exact ones."""
    moments, W, Q = _moments(statistics), _weight(1), _weight(2)
    best = moments.target(W)
    assert moments.error(W, best) < moments.error(W, W)
    for seed in range(4):
        assert moments.error(W, best + 0.2 * _weight(seed)) > moments.error(W, best)
    rest = moments.left_over(W, Q)
    assert moments.error(W - rest, Q) < 0.5 * moments.error(W, Q)
    for seed in range(4):
        nudged = rest + 0.2 * _weight(seed)
        assert moments.error(W - nudged, Q) > moments.error(W - rest, Q)


def test_weighted_factors_beat_the_plain_singular_vectors(statistics: LinearStatistics) -> None:
    H, E = _moments(statistics).exact, _weight(3)

    def error(A: Tensor, B: Tensor) -> float:
        rest = E - A.double() @ B.double()
        return float((rest @ H * rest).sum())

    A, B = weighted_factors(E, H, 4)
    assert (A.shape, B.shape, A.dtype) == ((OUT, 4), (4, WIDTH), torch.float16)
    U, S, V = torch.linalg.svd(E, full_matrices=False)
    plain = error(U[:, :4] * S[:4], V[:4])
    # The optimum: what is left of E L, L L^T = H, beyond its 4 leading singular values.
    values = torch.linalg.svdvals(E @ torch.linalg.cholesky(H))
    least = float(values[4:].square().sum())
    assert least <= error(A, B) < 1.1 * least < plain
    full = weighted_factors(E, H, OUT)
    assert error(*full) < 1e-4 * error(torch.zeros(OUT, 1), torch.zeros(1, WIDTH))


def test_where_rows_are_few_their_rounding_is_left_out(
    statistics: LinearStatistics, caplog: pytest.LogCaptureFixture
) -> None:
    few = LinearStatistics(WIDTH, 3, Needs(second_moment=True, tokens=rows_wanted(WIDTH) - 1))
    for step, x in enumerate(_calls()):
        few.add(x, step, step)
    with caplog.at_level(logging.WARNING):
        moments = input_moments(few, InputTransform(WIDTH, []), QUANTIZER)
    assert "63 rows are too few to count the rounding of 16 inputs (64" in caplog.text
    assert moments.cross is moments.exact
    assert moments.rounded.tokens == 3 * ROWS
    assert _moments(statistics).cross is not _moments(statistics).exact


def test_without_rounding_the_target_is_the_weight_and_the_branch_gets_the_rest(
    statistics: LinearStatistics,
) -> None:
    moments, W, Q = _moments(statistics, rounds=False), _weight(1), _weight(2)
    assert torch.equal(moments.target(W), W)
    assert torch.equal(moments.left_over(W, Q), W - Q)
