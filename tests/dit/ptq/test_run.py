import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit_qat.calibration import BlockView, Needs
from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.ptq import (
    PTQMethod,
    PTQRun,
    Trajectory,
    calibrate_dit,
    quantize_post_training,
    trajectory_error,
)
from dit_qat.dit.sampling import SamplerConfig
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.step_bits import StepBits

MakeDiT = Callable[..., DiT]
MakeRound = Callable[..., PTQMethod]
SAMPLER = SamplerConfig(steps=4, batch_size=4)


def test_the_digits_dit_at_8_bits_draws_nearly_what_it_drew(make_round: MakeRound) -> None:
    model = load_dit("digits")
    config = SamplerConfig(steps=10, batch_size=16, clip_sample=True)
    trajectory = Trajectory(model, config, 4)
    exact = trajectory.run(model)
    store = calibrate_dit(model, config, images=16, steps=3)
    errors = {}
    for bits in (8, 4):
        quantized = load_dit("digits")
        result = quantize_post_training(quantized, make_round(bits), store, trajectory=trajectory)
        errors[bits] = trajectory_error(exact, trajectory.run(result.model))
        assert result.model is quantized
        assert len(result.table) == 16
        assert result.averages["weight_bits"] == bits < result.averages["effective_weight_bits"]
    assert errors[8] < 1e-3
    assert 10 * errors[8] < errors[4]


def test_the_table_tells_bits_errors_and_operations(
    make_dit: MakeDiT, make_round: MakeRound
) -> None:
    model = make_dit()
    store = calibrate_dit(model, SAMPLER, images=4)
    result = quantize_post_training(model, make_round(4), store)
    row = result.table[0]
    layer = model.get_submodule(row.name)
    assert (row.name, row.in_features, row.out_features) == ("blocks.0.attn.qkv", 64, 192)
    assert row.tokens == 4 * 4 * 4  # calls, images, patches
    assert row.macs == 64 * 192 * 64
    assert (row.bytes, row.effective_weight_bits) == (
        layer.bytes_stored,
        layer.effective_weight_bits,
    )
    assert result.layers[row.name]["error"] == row.error
    assert json.loads(json.dumps(result.plain()))["calibration_bytes"]["total"] > 0


def test_averages_by_operations_weigh_layers_by_their_size(
    make_dit: MakeDiT, make_round: MakeRound
) -> None:
    class Mixed(type(make_round())):
        def finish(self, run: PTQRun) -> None:
            assert all(isinstance(run.model.get_submodule(n), IntLinear) for n in run.names)
            layer = run.model.get_submodule("blocks.0.mlp.fc1")
            bits = StepBits((0.0, 999.0), (2, 4))
            run.model.set_submodule("blocks.0.mlp.fc1", layer.with_step_bits(bits))
            run.report["changed"] = "fc1"

    model = make_dit(depth=1)
    store = calibrate_dit(model, SAMPLER, images=4)
    result = quantize_post_training(model, Mixed(8), store)
    # qkv, proj, fc1, fc2 of 3, 1, 4 and 4 parts.
    assert result.averages["activation_bits"] == (3 * 8 + 3) / 4
    assert result.averages["activation_bits_by_macs"] == (8 * 8 + 4 * 3) / 12
    assert result.report == {"changed": "fc1"}
    # Bits by timestep are followed in every call of the model.
    model(torch.zeros(1, 2, 4, 4), torch.tensor([999]), torch.tensor([0]))


def test_the_reference_stays_float_and_shares_the_rest(
    make_dit: MakeDiT, make_round: MakeRound
) -> None:
    runs = []

    class Kept(type(make_round())):
        def start(self, run: PTQRun) -> None:
            runs.append(run)

    model = make_dit()
    quantize_post_training(model, Kept(4), calibrate_dit(model, SAMPLER, images=4))
    reference = runs[0].reference
    x, t, y = torch.randn(2, 2, 4, 4), torch.tensor([5, 5]), torch.tensor([0, 1])
    assert torch.equal(reference(x, t, y), make_dit()(x, t, y))
    assert not torch.equal(reference(x, t, y), model(x, t, y))
    assert reference.final_layer.linear.weight is model.final_layer.linear.weight


class _Killed(BaseException):
    """What no code catches by the way."""


def test_a_killed_run_goes_on_with_its_notes(
    make_dit: MakeDiT, make_round: MakeRound, tmp_path: Path
) -> None:
    class Fragile(type(make_round())):
        fatal = 1

        def quantize_block(self, view: BlockView) -> Mapping[str, IntLinear]:
            if view.index == self.fatal:
                raise _Killed
            return super().quantize_block(view)

    store = calibrate_dit(make_dit(), SAMPLER, images=4)
    with pytest.raises(_Killed):
        quantize_post_training(make_dit(), Fragile(4), store, state_folder=tmp_path)
    again = Fragile(4)
    again.fatal = 0  # the first block is not asked for again
    resumed = quantize_post_training(make_dit(), again, store, state_folder=tmp_path)
    straight = quantize_post_training(make_dit(), make_round(4), store)
    assert resumed.table == straight.table
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    tensors = [name for name, value in theirs.items() if isinstance(value, torch.Tensor)]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in tensors)


@pytest.mark.parametrize("change", ["bits", "seed", "weights", "calls", "layers"])
def test_blocks_of_another_run_are_refused(
    make_dit: MakeDiT, make_round: MakeRound, tmp_path: Path, change: str
) -> None:
    from dit_qat.dit.ptq import target_of

    def run(other: bool) -> None:
        def at(name: str) -> bool:
            return other and change == name

        model = make_dit(seed=1 if at("weights") else 0)
        sampler = SamplerConfig(steps=4, batch_size=4, seed=1 if at("calls") else 0)
        options: dict[str, Any] = {"seed": 1 if at("seed") else 0}
        if at("layers"):
            options["target"] = target_of(model, skip=["blocks.0.*"])
        quantize_post_training(
            model,
            make_round(8 if at("bits") else 4),
            calibrate_dit(model, sampler, images=4, steps=2),
            state_folder=tmp_path,
            **options,
        )

    run(False)
    run(False)
    with pytest.raises(ValueError, match="another run"):
        run(True)


def test_errors_come_before_the_run_and_name_the_layer(
    make_dit: MakeDiT, make_round: MakeRound
) -> None:
    class Early(type(make_round())):
        def start(self, run: PTQRun) -> None:
            pytest.fail("too late")

    class Narrow(type(make_round())):
        def quantize_linear(self, name: str, linear: nn.Linear, statistics: Any) -> IntLinear:
            if linear.in_features == 256:
                raise ValueError("in_features=256 is too wide")
            return super().quantize_linear(name, linear, statistics)

    class Whole(type(make_round())):
        def quantize_block(self, view: BlockView) -> Mapping[str, IntLinear]:
            raise ValueError("nothing to divide by")

    store = calibrate_dit(make_dit(), SAMPLER, images=4)
    with pytest.raises(ValueError, match="recorded from another DiT"):
        quantize_post_training(make_dit(seed=1), Early(4), store)
    with pytest.raises(ValueError, match=r"layer blocks\.0\.mlp\.fc2: in_features=256 is too"):
        quantize_post_training(make_dit(), Narrow(4), store)
    with pytest.raises(ValueError, match=r"^block blocks\.0: nothing to divide by"):
        quantize_post_training(make_dit(), Whole(4), store)
    with pytest.raises(ValueError, match="above the limit of 1 kB"):
        quantize_post_training(make_dit(), make_round(4), store, limit_bytes=1000)


@pytest.mark.filterwarnings("ignore:1 layers see fewer tokens")
def test_step_weights_of_a_method_reach_the_statistics(
    make_dit: MakeDiT, make_round: MakeRound
) -> None:
    weights, found = torch.tensor([0.4, 0.3, 0.2, 0.1]), {}

    class Weighted(type(make_round())):
        def start(self, run: PTQRun) -> None:
            run.step_weights = dict.fromkeys(run.target.linears(), weights)

        def quantize_linear(self, name: str, linear: nn.Linear, statistics: Any) -> IntLinear:
            found[name] = statistics.second_moment.matrix, statistics.rows
            return super().quantize_linear(name, linear, statistics)

    model = make_dit(depth=1)
    needs = Needs(second_moment=True, tokens=10_000)
    quantize_post_training(model, Weighted(4, needs), calibrate_dit(model, SAMPLER, images=4))
    for matrix, rows in found.values():
        parts = zip(weights, rows.split(16), strict=True)
        torch.testing.assert_close(matrix, sum(w * x.T @ x / 16 for w, x in parts))


@pytest.mark.filterwarnings("ignore:1 layers see fewer tokens")
def test_second_moments_take_as_many_tokens_of_a_call_as_are_asked_for(
    make_dit: MakeDiT, make_round: MakeRound
) -> None:
    found = {}

    class Moments(type(make_round())):
        @property
        def needs(self) -> Needs:
            return Needs(second_moment=True)

        def quantize_linear(self, name: str, linear: nn.Linear, statistics: Any) -> IntLinear:
            found[name] = statistics.second_moment.tokens
            return super().quantize_linear(name, linear, statistics)

    store = calibrate_dit(make_dit(depth=1), SAMPLER, images=4)
    for limit, tokens in ((None, 16), (5, 5)):
        quantize_post_training(make_dit(depth=1), Moments(4), store, moment_tokens=limit)
        assert set(found.values()) == {tokens * len(store)}
