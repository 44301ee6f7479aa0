"""The methods as settings: presets, baselines, and what they refuse."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_qat import quantize_
from dit_qat.dit.methods import AMPN, BitNetV2, Method, MinMax, RobuQ, RobuQConfig
from dit_qat.dit.models import DiT, load_dit
from dit_qat.layers import (
    AbsMeanQuantizer,
    LayerConfig,
    LowRank,
    MinMaxQuantizer,
    QuantAttention,
    QuantLinear,
    RobustQuantizer,
)


def layers(method: Method, hidden_size: int = 32) -> dict[str, LayerConfig]:
    network = DiT(8, 4, 1, hidden_size, 2, 2, num_classes=10)
    quantize_(network, method.quant_config())
    return {n: m.config for n, m in network.named_modules() if isinstance(m, QuantLinear)}


def test_robuq_gives_every_layer_rotation_branch_and_gaussian_grid() -> None:
    found = layers(RobuQ(activation_bits=2, rank=3))
    assert len(found) == 10
    for name, config in found.items():
        assert isinstance(config.activation, RobustQuantizer)
        assert config.activation.bits == (4 if "adaLN" in name else 2)
        assert config.rotation is not None
        assert config.low_rank is not None
        assert config.low_rank.rank == 3


@pytest.mark.parametrize("method", [RobuQ, AMPN])
def test_a_16_bit_branch_is_trained_as_it_is_packed(method: type[RobuQ]) -> None:
    for config in layers(method(rank=3, branch_dtype="bfloat16")).values():
        assert config.low_rank == LowRank(3, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        method(branch_dtype="int8")  # type: ignore[arg-type]


def test_presets_differ_where_the_docs_say() -> None:
    paper, exact = RobuQConfig(preset="paper"), RobuQConfig(preset="exact")
    assert (paper.signs, paper.fit, paper.branch_start) == (False, "absmean", "svd")
    assert paper.straight_through == "identity"
    assert paper.distillation == 0
    assert exact.signs is True
    assert paper != exact
    assert RobuQConfig(preset="paper", signs=True).signs is True


def test_bitnet_v2_rotates_proj_and_fc2_only() -> None:
    for name, config in layers(BitNetV2(activation_bits=3)).items():
        rotated = name.endswith(("attn.proj", "mlp.fc2"))
        assert (config.rotation is not None) == rotated, name
        assert config.low_rank is None
        assert isinstance(config.activation, MinMaxQuantizer)


def test_bitnet_v2_absmean_exists_at_four_bits_only() -> None:
    found = layers(BitNetV2(activation_bits=4, grid="absmean"))
    assert {type(config.activation) for config in found.values()} == {AbsMeanQuantizer}
    with pytest.raises(ValueError, match="bits=3 has no absmean form"):
        BitNetV2(activation_bits=3, grid="absmean")


def test_minmax_is_robuq_with_another_grid() -> None:
    ours, theirs = layers(RobuQ(preset="paper", rank=2)), layers(MinMax(rank=2))
    for name, config in theirs.items():
        assert isinstance(config.activation, MinMaxQuantizer)
        assert config.rotation == ours[name].rotation
        assert config.low_rank == ours[name].low_rank
        assert config.weight == ours[name].weight


@pytest.mark.parametrize("method", [RobuQ(rank=2), MinMax(rank=2), BitNetV2()])
def test_attention_products_are_eight_bit(method: Method) -> None:
    network = quantize_(DiT(8, 4, 1, 32, 2, 2, num_classes=10), method.quant_config())
    bits = [m.config.bits for m in network.modules() if isinstance(m, QuantAttention)]
    assert bits == [8, 8]


def test_ampn_is_robuq_until_it_has_a_bit_map() -> None:
    shared = {"preset": "paper", "rank": 2}
    ampn = AMPN(average_bits=2.5, activation_bits=4, **shared)
    assert layers(ampn) == layers(RobuQ(activation_bits=4, **shared))
    bits = {name: 1 + i % 4 for i, name in enumerate(layers(ampn)) if "adaLN" not in name}
    allocated = layers(ampn.with_bits(bits))
    for name, config in layers(ampn).items():
        found = allocated[name].activation
        assert found is not None
        assert found.bits == bits.get(name, 4)
        assert replace(allocated[name], activation=config.activation) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"average_bits": 0.5}, r"average_bits=0\.5 is outside 1\.\.4"),
        ({"choices": (1, 9)}, r"choices=\(1, 9\) must be whole"),
        ({"choices": (2, 2)}, "each once"),
        ({"score": "hessian"}, "score='hessian' is unknown"),
        ({"score_timesteps": 1001}, "score_timesteps=1001 is beyond the 1000"),
        ({"choices": ()}, "must be whole"),
        ({"warmup_steps": 0}, "warmup_steps=0 must be a whole number, at least 1"),
        ({"score_images": 2.5}, r"score_images=2\.5 must be a whole number"),
        ({"activation_bits": 9}, "bits=9 is outside"),
    ],
)
def test_ampn_refuses_what_could_not_be_allocated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AMPN(**settings)


def test_the_bits_of_a_file_are_not_left_out_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "bit_map.json"
    ampn = AMPN(rank=2, bit_map=path)
    assert ampn.config.bit_map == str(path)  # plain, for checkpoints
    with pytest.raises(ValueError, match=r"bit_map\.json' names a file.*with_bits"):
        ampn.quant_config()
    assert ampn.without_file().quant_config() == AMPN(rank=2).quant_config()
    with pytest.raises(ValueError, match="bits=9 is outside"):
        AMPN(activation_bits=9, bit_map=str(path))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range_are_refused_at_once(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits={bits} is outside 1\.\.8"):
        RobuQ(activation_bits=bits)


def test_widths_without_a_hadamard_order_are_named() -> None:
    network = DiT(8, 4, 1, 92, 1, 2, num_classes=10)
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.\S+': width=92 has no Hadamard"):
        quantize_(network, RobuQ(rank=2).quant_config())
    assert not any(isinstance(m, QuantLinear) for m in network.modules())


def test_configs_are_frozen_and_presets_known() -> None:
    with pytest.raises(FrozenInstanceError):
        RobuQ().config.rank = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="preset 'best' is unknown"):
        RobuQConfig(preset="best")  # type: ignore[arg-type]


def test_more_bits_are_closer_to_the_float_model() -> None:
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.full((64,), 400), torch.arange(64) % 10
    network = load_dit("digits").eval()
    with torch.no_grad():
        reference = network(x, t, y)
        errors = []
        for bits in (1, 2, 3, 4):
            student = quantize_(
                load_dit("digits").eval(), RobuQ(activation_bits=bits, rank=64).quant_config()
            )
            errors.append(float((student(x, t, y) - reference).norm() / reference.norm()))
    assert errors == sorted(errors, reverse=True)
