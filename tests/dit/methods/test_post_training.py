from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_qat.calibration import Call, CallStore
from dit_qat.dit.methods import (
    CLQ,
    GPTQ,
    RTN,
    AdaTSQ,
    DuQuant,
    PTQ4DiT,
    QDiT,
    QuaRot,
    SmoothQuant,
    SVDQuant,
    ViDiTQ,
)
from dit_qat.dit.methods.evolution import Evolution
from dit_qat.dit.methods.mixed_precision import MixedPrecision
from dit_qat.dit.methods.reconstruction import Reconstruction
from dit_qat.dit.ptq import PTQMethod, quantize_post_training, target_of
from dit_qat.layers import IntLinear
from dit_qat.layers.rounding import ClipSearch, GPTQSettings

SHORT = Evolution(epochs=1, population=4, crossover=2, mutation=2)

METHODS: dict[str, Callable[..., PTQMethod]] = {
    "rtn": RTN,
    "rtn_asymmetric": lambda **bits: RTN(
        weight_symmetric=False, activation_symmetric=False, **bits
    ),
    "smoothquant": SmoothQuant,
    "quarot": lambda **bits: QuaRot(clip=ClipSearch(10), **bits),
    "quarot_nearest": lambda **bits: QuaRot(clip=ClipSearch(10), rounding="nearest", **bits),
    "gptq": GPTQ,
    "gptq_groups": lambda **bits: GPTQ(group_size=32, weight_symmetric=False, **bits),
    "svdquant": lambda **bits: SVDQuant(rank=4, grid_steps=2, **bits),
    "svdquant_gptq": lambda **bits: SVDQuant(rank=4, grid_steps=1, rounding="gptq", **bits),
    "duquant": lambda **bits: DuQuant(block_size=16, **bits),
    "vidit_q": ViDiTQ,
    "vidit_q_early": lambda **bits: ViDiTQ(balance="channel", **bits),
    "ptq4dit": lambda **bits: PTQ4DiT(
        clip=ClipSearch(10), reconstruction=Reconstruction(steps=4), **bits
    ),
    "q_dit": lambda **bits: QDiT(sizes=(32, 64, 256), least_mean=64, search=SHORT, **bits),
}


@pytest.mark.parametrize("name", METHODS)
def test_quantizes_a_dit_end_to_end_and_better_at_8_bits_than_at_4(
    name: str, calibrated: tuple[Any, CallStore], output_of: Callable[..., torch.Tensor]
) -> None:
    make, store = calibrated
    reference = output_of(make(), store)
    errors = {}
    for bits in (8, 4):
        method = METHODS[name](weight_bits=bits, activation_bits=bits)
        result = quantize_post_training(make(), method, store)
        layers = [m for m in result.model.modules() if isinstance(m, IntLinear)]
        assert len(layers) == 8
        assert result.averages["weight_bits"] == bits
        assert result.averages["activation_bits"] == bits
        found = output_of(result.model, store)
        assert found.isfinite().all()
        errors[bits] = float((found - reference).square().sum() / reference.square().sum())
    assert 0 < errors[8] < errors[4] / 10
    assert errors[4] < 1


@pytest.mark.parametrize("name", [*METHODS, "clq", "adatsq"])
def test_a_model_in_bfloat16_is_quantized_in_it(name: str, toy: tuple[Any, CallStore]) -> None:
    model, store = toy[0].bfloat16(), CallStore()
    for call in toy[1]:
        x, t = call.args
        store.append(Call((x.bfloat16(), t), {}, call.step, call.timestep, call.rows))
    made = {"clq": CLQ(values=3, tokens=64), "adatsq": AdaTSQ(mode="teacher_forced")}
    method = made[name] if name in made else METHODS[name](weight_bits=8, activation_bits=8)
    target = target_of(model, blocks=["blocks.*"], quantize=["blocks.*"], timestep_argument="t")
    result = quantize_post_training(model, method, store, target=target)
    assert len(result.table) == 12
    assert max(row.error for row in result.table) < (0.2 if name in made else 0.005)


def test_a_second_run_of_the_same_method_gives_the_same_bytes(
    calibrated: tuple[Any, CallStore], output_of: Callable[..., torch.Tensor]
) -> None:
    make, store = calibrated
    method = QDiT(sizes=(32, 64, 256), least_mean=64, search=SHORT)
    first, second = (quantize_post_training(make(), method, store).model for _ in range(2))
    assert torch.equal(output_of(first, store), output_of(second, store))


@pytest.mark.parametrize("name", ["rtn", "gptq", "smoothquant", "vidit_q"])
def test_activations_may_stay_float(
    name: str, calibrated: tuple[Any, CallStore], output_of: Callable[..., torch.Tensor]
) -> None:
    make, store = calibrated
    method = METHODS[name](weight_bits=4, activation_bits=None)
    model = quantize_post_training(make(), method, store).model
    floated = make()
    for layer_name, layer in model.named_modules():
        if isinstance(layer, IntLinear):
            floated.set_submodule(layer_name, layer.to_float())
    torch.testing.assert_close(
        output_of(model, store), output_of(floated, store), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RTN(weight_bits=5), "weight bits=5"),
        (lambda: GPTQ(activation_bits=1), "activation bits=1"),
        (lambda: SmoothQuant(alpha=1.5), "alpha=1.5"),
        (lambda: SVDQuant(rank=-1), "rank=-1"),
        (lambda: QuaRot(activation_clip=0.0), "clip"),
        (lambda: ViDiTQ(balance="both"), "balance='both'"),
        (lambda: ViDiTQ(mixed=MixedPrecision(weight_budget=9)), "weight_budget=9"),
        (lambda: ViDiTQ(mixed=MixedPrecision()), "budget"),
        (lambda: Reconstruction(steps=0), "None for no reconstruction"),
        (lambda: Evolution(population=0), "population"),
        (lambda: QDiT(sizes=(0, 32)), "group_size=0"),
        (lambda: DuQuant(tokens=0), "tokens=0"),
        (lambda: GPTQSettings(damping=-1.0), "damping=-1.0"),
        (lambda: GPTQSettings(block_size=0), "block_size=0"),
        (lambda: SVDQuant(probe_calls=0), "probe_calls=0"),
        (lambda: PTQ4DiT(probe_calls=0), "probe_calls=0"),
        (lambda: MixedPrecision(weight_budget=5, weight_choices=(4, 6, 8)), "bits=6"),
        (lambda: MixedPrecision(activation_budget=9, activation_choices=(4, 9)), "bits=9"),
        (lambda: MixedPrecision(weight_budget=5, weight_choices=()), "weight_choices are empty"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_method_takes_a_config_or_its_fields() -> None:
    config = RTN(weight_bits=8).config
    assert RTN(config).config is config
    with pytest.raises(ValueError, match="either a config or fields"):
        RTN(config, weight_bits=4)
