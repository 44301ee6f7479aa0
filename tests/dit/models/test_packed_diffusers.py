"""Transformers of diffusers in the registry of architectures."""

import json
import threading
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from dit_qat.export.meta import parameters_on_meta
from dit_qat.export.registry import architecture_named, architecture_of, timestep_argument
from dit_qat.export.skeleton import build_skeleton

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def build(name: str, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return architecture_named("diffusers").build({"class": name, "config": config})


def test_a_transformer_is_described_and_built_again() -> None:
    model = diffusers.WanTransformer3DModel(**SIZES, patch_size=(1, 2, 2))
    entry = architecture_of(model)
    assert entry is architecture_named("diffusers")
    assert timestep_argument(entry, model) == "timestep"
    described = json.loads(json.dumps(entry.describe(model)))
    assert described == entry.describe(model)
    assert described["class"] == "WanTransformer3DModel"
    assert described["config"]["patch_size"] == [1, 2, 2]
    twin = build(described["class"], described["config"])
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in twin.state_dict().items()} == shapes
    assert all(parameter.is_meta for parameter in twin.parameters())
    tables = dict(twin.named_buffers())
    assert tables.keys() >= {"rope.freqs_cos", "rope.freqs_sin"}
    for name, value in model.named_buffers():
        assert torch.equal(tables[name], value)
        assert tables[name].dtype == value.dtype
    assert entry.describe(twin) == described


def test_the_timestep_is_found_by_its_name() -> None:
    entry = architecture_named("diffusers")
    assert entry.timestep is not None
    with torch.device("meta"):
        sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        model = diffusers.ZImageTransformer2DModel(**sizes, axes_dims=[4, 4, 8])
        decoder = diffusers.AutoencoderTiny()
    assert entry.timestep(model) == "t"
    with pytest.raises(ValueError, match="no argument timestep or t or timesteps"):
        entry.timestep(decoder)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("WanTransformer4DModel", {}, "'WanTransformer4DModel' is no model class"),
        ("DDIMScheduler", {}, "is no model class"),
        ("ModelMixin", {}, "is no model class"),
        ("FluxPipeline", {}, "is no model class"),
        ("__doc__", {}, "is no model class"),
        ("utils.logging", {}, "is no model class"),
        (7, {}, "is no model class"),
        ("WanTransformer3DModel", [], "config is no JSON object"),
        ("WanTransformer3DModel", {"depth_of_field": 1}, "has no setting depth_of_field"),
        ("WanTransformer3DModel", {"_name_or_path": "x"}, "has no setting _name_or_path"),
        ("WanTransformer3DModel", {"self": 1}, "has no setting self"),
        ("WanTransformer3DModel", {"num_layers": 10**9}, "num_layers=1000000000 is beyond"),
        ("WanTransformer3DModel", {"patch_size": [1, 2**40, 2]}, "patch_size=.* is beyond"),
        ("WanTransformer3DModel", {"ffn_dim": float("nan")}, "ffn_dim=nan is beyond"),
    ],
)
def test_other_classes_and_settings_are_refused(name: Any, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, config)


@pytest.mark.parametrize(
    ("name", "config", "error"),
    [
        ("WanTransformer3DModel", {"attention_head_dim": 3}, "AssertionError"),
        ("DiTTransformer2DModel", {"activation_fn": "other"}, "UnboundLocalError"),
    ],
)
def test_what_a_constructor_stumbles_over_is_a_damaged_folder(
    name: str, config: Any, error: str
) -> None:
    arguments = {"class": name, "config": config}
    with pytest.raises(ValueError, match=rf"build no 'diffusers' \({error}: .*damaged"):
        build_skeleton("diffusers", arguments, {}, {})


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="it has the keys"):
        architecture_named("diffusers").build({"class": "WanTransformer3DModel"})


def test_classes_of_others_are_not_ours() -> None:
    class Own(diffusers.WanTransformer3DModel):
        """Of no module of diffusers, so that a reader could not build it."""

    with torch.device("meta"), pytest.raises(ValueError, match="a Own has no entry"):
        architecture_of(Own(**SIZES))


def test_settings_that_json_does_not_hold_are_named() -> None:
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**SIZES)
    model.register_to_config(eps=torch.float32)
    with pytest.raises(ValueError, match=r"with eps=torch\.float32, which JSON does not hold"):
        architecture_named("diffusers").describe(model)


def test_only_parameters_of_this_thread_lose_their_memory() -> None:
    elsewhere: list[nn.Module] = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: elsewhere.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        own = nn.BatchNorm1d(3)
    assert all(parameter.is_meta for parameter in own.parameters())
    assert not any(buffer.is_meta for buffer in own.buffers())
    assert not any(parameter.is_meta for parameter in elsewhere[0].parameters())
    assert not nn.Linear(2, 2).weight.is_meta


def test_building_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    build("WanTransformer3DModel", SIZES)
    assert torch.equal(torch.get_rng_state(), before)
