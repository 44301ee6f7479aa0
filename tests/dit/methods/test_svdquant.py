from collections.abc import Callable

import pytest
import torch

from dit_qat.calibration import BlockView, Needs
from dit_qat.dit.methods.svdquant import (
    SharedLayers,
    SVDQuant,
    SVDQuantConfig,
    branch_and_round,
    iterate_branch,
    leading_factors,
    smoothing_grid,
    stacked_layers,
)
from dit_qat.primitives.integer import IntegerGrid

QKV = tuple(f"blocks.0.attn.to_{x}" for x in "qkv")


def test_the_grid_of_the_release_has_39_candidates() -> None:
    grid = smoothing_grid(20)
    assert len(set(grid)) == len(grid) == 39
    assert (0, 0) in grid
    assert (0.05, 0) in grid
    assert (0.95, pytest.approx(0.05)) in grid


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_leading_factors_are_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    up, down = leading_factors(W, rank)
    torch.testing.assert_close((up @ down).double(), best, rtol=0, atol=1e-5)


def test_approximate_factors_lose_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(200, 150, generator=generator) * torch.logspace(0, -2, 150)
    exact, near = (leading_factors(W, 16, flag) for flag in (True, False))
    errors = [float((W - up @ down).norm()) for up, down in (exact, near)]
    assert errors[0] <= errors[1] <= 1.01 * errors[0]


def test_the_full_rank_leaves_no_residual() -> None:
    W = torch.randn(24, 32)
    branched = branch_and_round(W, W, 24, IntegerGrid(4, group_size=16), "float32")
    assert branched.residual.abs().max() < 1e-5
    in_16_bits = branch_and_round(W, W, 24, IntegerGrid(4, group_size=16), "float16")
    assert in_16_bits.up is not None
    assert in_16_bits.down is not None
    torch.testing.assert_close(  # what 16 bits lose goes into the residual
        in_16_bits.up.float() @ in_16_bits.down.float() + in_16_bits.residual, W
    )


def test_errors_of_the_kept_rounds_fall_and_the_last_is_the_best() -> None:
    torch.manual_seed(0)
    W, grid = torch.randn(48, 64), IntegerGrid(3, group_size=16)

    def error(trial: object) -> float:
        up, down, _, rounded = trial  # type: ignore[misc]
        return float((W - up.float() @ down.float() - rounded.values).norm())

    best, errors = iterate_branch(W, 4, grid, error)
    assert len(errors) > 2
    assert errors == sorted(errors, reverse=True)
    assert error(best) == errors[-1]
    once, first = iterate_branch(W, 4, grid, error, iterations=1)
    assert first == [error(once)] == errors[:1]


def test_q_k_and_v_share_smoothing_and_down_projection(view_of: Callable[..., BlockView]) -> None:
    method = SVDQuant(rank=4, group_size=8, grid_steps=4)
    layers = method.quantize_block(view_of(method.needs))
    q, k, v = (layers[name] for name in QKV)
    for other in (k, v):
        assert torch.equal(q.low_rank_down, other.low_rank_down)
        assert not torch.equal(q.low_rank_up, other.low_rank_up)
        assert torch.equal(q.transform.vector0, other.transform.vector0)
    assert layers["blocks.0.ff.0"].low_rank_down.shape == (4, 16)


def test_smoothing_is_judged_with_the_branch_active_by_the_module_around(
    view_of: Callable[..., BlockView],
) -> None:
    view = view_of(Needs())
    config = SVDQuantConfig(rank=2, group_size=16, grid_steps=5, weight_bits=3)
    shared = SharedLayers(view, QKV, config)
    assert shared.submodule == "blocks.0.attn"
    best = shared.best_smoothing()

    def error(s: torch.Tensor) -> float:
        weight = shared.weight * s
        return shared.error(s, branch_and_round(weight, weight, 2, shared.grid))

    ones = torch.ones(16)
    assert error(best) < error(ones)
    layers = shared.layers(ones, branch_and_round(shared.weight, shared.weight, 2, shared.grid))
    assert error(ones) == view.error(layers, "blocks.0.attn")
    assert all(layer.config.rank == 2 for layer in layers.values())


def test_a_list_of_modules_is_no_module_that_runs(view_of: Callable[..., BlockView]) -> None:
    view = view_of(Needs())
    out = SharedLayers(view, ("blocks.0.attn.to_out.0",), SVDQuantConfig())
    assert out.submodule == "blocks.0.attn"
    both = SharedLayers(view, ("blocks.0.attn.to_q", "blocks.0.ff.0"), SVDQuantConfig())
    assert both.submodule is None


def test_the_rank_of_a_narrow_layer_is_its_own(view_of: Callable[..., BlockView]) -> None:
    shared = SharedLayers(view_of(Needs()), QKV, SVDQuantConfig(rank=32, group_size=64))
    assert (shared.rank, shared.group) == (16, 16)


def test_inputs_that_are_never_negative_get_unsigned_codes(
    view_of: Callable[..., BlockView],
) -> None:
    method = SVDQuant(rank=2, group_size=16, grid_steps=1)
    layers = method.quantize_block(view_of(method.needs))
    assert not layers["blocks.0.ff.2"].config.activation.symmetric  # behind a ReLU
    assert layers["blocks.0.ff.0"].config.activation.symmetric


def test_the_branch_helps_and_gptq_on_the_residual_helps_more(
    view_of: Callable[..., BlockView],
) -> None:
    errors = []
    for options in ({"rank": 0}, {"rank": 4}, {"rank": 4, "rounding": "gptq"}):
        method = SVDQuant(
            weight_bits=3, activation_bits=None, group_size=16, grid_steps=1, **options
        )
        view = view_of(method.needs)
        errors.append(view.error(method.quantize_block(view)))
    assert errors[0] > errors[1] > errors[2] > 0


def test_the_mlp_beside_an_attention_has_its_own_branch(
    view_of: Callable[..., BlockView], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = view_of(Needs())
    assert QKV in stacked_layers(view)
    parallel = (*QKV, "blocks.0.ff.0")  # all read one tensor, as in FLUX's single blocks
    monkeypatch.setattr(view, "shared_inputs", [parallel])
    groups = stacked_layers(view)
    assert QKV in groups
    assert ("blocks.0.ff.0",) in groups
    assert sorted(name for group in groups for name in group) == sorted(view.linears)


def test_factors_beyond_16_bits_are_balanced_between_each_other() -> None:
    W = 5000 * torch.randn(48, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 64)
    found = branch_and_round(W, W, 2, IntegerGrid(4, group_size=16), "float16")
    assert found.up is not None
    assert found.down is not None
    assert bool(found.up.isfinite().all())
    assert float(found.residual.abs().max()) < 1e-2 * float(W.abs().max())
