from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView, CallStore, Needs, drive, find_blocks
from dit_qat.dit.methods.clq import CLQ, CLQConfig
from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import quantize_post_training, target_of
from dit_qat.layers import IntLinear

QUICK = {"values": 3, "probe_calls": 1, "probe_rows": 2, "tokens": 128, "ahead": 1}
Calibrated = tuple[Callable[[], DiT], CallStore]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("preset", ["paper", "exact"])
def test_end_to_end_and_better_at_more_bits(
    calibrated: Calibrated, output_of: Any, preset: Any
) -> None:
    make, store = calibrated
    exact = output_of(make(), store)
    errors = {}
    for weights, activations in ((8, 8), (4, 8), (4, 4)):
        bounds = "both" if activations == 4 else "none"
        method = CLQ(CLQConfig(weights, activations, preset, bounds=bounds, **QUICK))
        result = quantize_post_training(make(), method, store)
        assert result.averages["weight_bits"] == weights
        assert result.averages["activation_bits"] == activations
        errors[weights, activations] = _error(output_of(result.model, store), exact)
        for name, note in result.layers.items():
            assert note["permutation"] in ("none", "group", "zigzag")
            assert note["target"].startswith("blocks.")
            assert result.model.get_submodule(name).config.activation.clip == tuple(
                note["activation_bounds"]
            )
    assert 0 < errors[8, 8] < errors[4, 8] < errors[4, 4] < 1
    assert errors[8, 8] < errors[4, 4] / 50


def test_compensation_helps_the_weights(calibrated: Calibrated, output_of: Any) -> None:
    make, store = calibrated
    exact = output_of(make(), store)
    errors = {}
    for preset in ("paper", "exact"):
        method = CLQ(weight_bits=3, activation_bits=None, preset=preset, bounds="none", tokens=128)
        result = quantize_post_training(make(), method, store)
        errors[preset] = _error(output_of(result.model, store), exact)
    assert errors["exact"] < errors["paper"]


@pytest.mark.parametrize("bounds", ["weights", "activations", "none"])
def test_only_the_bounds_that_were_asked_for(calibrated: Calibrated, bounds: Any) -> None:
    make, store = calibrated
    method = CLQ(weight_bits=3, activation_bits=3, bounds=bounds, **QUICK)
    notes = quantize_post_training(make(), method, store).layers.values()
    for kind in ("weights", "activations"):
        found = {tuple(note[f"{kind.removesuffix('s')}_bounds"]) for note in notes}
        assert (found == {(1.0, 1.0)}) == (bounds != kind)


def _recorded(model: nn.Module, store: CallStore, name: str) -> Tensor:
    """All inputs of a layer when the whole model runs on the recorded calls."""
    rows: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, x: rows.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for call in store:
            model(*call.args, **call.kwargs)
    handle.remove()
    return torch.cat(rows)


def _moment(x: Tensor) -> Tensor:
    return x.T @ x


def _drive(model: DiT, store: CallStore, quantize: Any) -> None:
    target = target_of(model)
    drive(
        model,
        store,
        find_blocks(model, target.blocks),
        linears=target.linears(),
        needs=Needs(second_moment=True),
        quantize=quantize,
    )


def test_with_nothing_quantized_the_record_is_the_float_one(calibrated: Calibrated) -> None:
    make, store = calibrated

    def look(view: BlockView) -> Mapping[str, nn.Module]:
        for name, statistics in view.statistics.items():
            moment = statistics.second_moment
            assert moment is not None
            exact = _moment(_recorded(make(), store, name))
            assert _error(moment.matrix, exact) < 1e-9
        return {}

    _drive(make(), store, look)


def test_blocks_before_are_quantized_and_the_own_is_float_while_recording(
    calibrated: Calibrated,
) -> None:
    """Cheap cross-block calibration equals running the whole partly quantized model."""
    make, store = calibrated
    model, method = make(), CLQ(weight_bits=3, activation_bits=3, **QUICK)
    seen = []

    class Watching(CLQ):
        @property
        def needs(self) -> Needs:
            return Needs(second_moment=True, tokens=128, probe_calls=1)

        def quantize_block(self, view: BlockView) -> dict[str, IntLinear]:
            seen.append(view.index)
            for name, statistics in view.statistics.items():
                assert type(model.get_submodule(name)) is nn.Linear
                exact = _moment(_recorded(model, store, name))
                assert statistics.second_moment is not None
                assert _error(statistics.second_moment.matrix, exact) < 1e-9
                float_one = _moment(_recorded(make(), store, name))
                assert (_error(float_one, exact) < 1e-9) == (view.index == 0)
            return super().quantize_block(view)

    quantize_post_training(model, Watching(method.config), store)
    assert seen == [0, 1]


def test_the_previous_block_alone_is_another_calibration(
    calibrated: Calibrated, output_of: Any
) -> None:
    make, store = calibrated
    outputs = []
    for blocks in ("all", "previous"):
        method = CLQ(weight_bits=3, activation_bits=3, previous_blocks=blocks, **QUICK)
        outputs.append(output_of(quantize_post_training(make(), method, store).model, store))
        assert method.prefix == blocks
    # With two blocks the one before is all there is.
    assert torch.equal(*outputs)


def test_the_exact_preset_clips_nothing_unless_asked() -> None:
    assert (CLQConfig().bounds, CLQConfig(preset="exact").bounds) == ("both", "none")
    assert CLQConfig(preset="exact", bounds="weights").bounds == "weights"


def test_bad_settings_are_refused_at_once(calibrated: Calibrated, make_dit: Any) -> None:
    for change, text in (
        ({"weight_bits": 5}, "bits=5"),
        ({"activation_bits": 1}, "bits=1"),
        ({"preset": "best"}, "preset='best'"),
        ({"previous_blocks": "none"}, "previous_blocks='none'"),
        ({"bounds": "left"}, "bounds='left'"),
        ({"permutations": ()}, "permutations="),
        ({"permutations": ("sort",)}, "permutations="),
        ({"values": 0}, "values=0"),
        ({"least": 0.0}, "least=0.0"),
    ):
        with pytest.raises(ValueError, match=text):
            CLQConfig(**change)
    with pytest.raises(ValueError, match="not both"):
        CLQ(CLQConfig(), weight_bits=8)
    make, store = calibrated
    model = make()
    model.blocks[1].mlp.fc2 = nn.Linear(254, 64)  # 2 * 127
    method = CLQ(weight_bits=4)
    store.model = ""
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2 has 254 inputs"):
        quantize_post_training(model, method, store)
    assert type(model.blocks[0].mlp.fc2) is nn.Linear
