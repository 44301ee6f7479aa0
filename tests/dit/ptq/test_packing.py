"""Transformers of diffusers, quantized after training, as packed folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat import load_quantized
from dit_qat.calibration import Call
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.dit.pipelines import packed_transformer
from dit_qat.dit.ptq import target_of
from dit_qat.dit.ptq.packing import pack_quantized
from dit_qat.export import describe, read_manifest
from dit_qat.export.registry import architecture_of
from dit_qat.layers import IntLinear, StepBits, TokenQuantizer, follow_timesteps_
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest

MakeTransformer = Callable[..., nn.Module]
Inputs = Callable[[str, float], dict[str, Any]]
NAMES = [
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
]
IN_UNITS = ("FluxTransformer2DModel", "ZImageTransformer2DModel")  # of 0 .. 1


def _quantized(name: str, make: MakeTransformer) -> nn.Module:
    """Every second layer by a policy."""
    model = make(name)
    target, unit = target_of(model), 1e-3 if name in IN_UNITS else 1.0
    policy = StepBits((1000 * unit, 500 * unit, 0.0), (8, 4, 2))
    for i, (linear_name, linear) in enumerate(target.linears().items()):
        grid = IntegerGrid((4, 3)[i % 2])
        codes, scales = round_to_nearest(linear.weight.detach(), grid)
        layer = IntLinear.build(
            linear,
            grid=grid,
            scales=scales,
            codes=codes,
            activation=TokenQuantizer(4),
            step_bits=policy if i % 2 else None,
        )
        model.set_submodule(linear_name, layer)
    follow_timesteps_(model, target.timestep_argument)
    return model


def _call(name: str, inputs: Inputs, timestep: float, dtype: torch.dtype = torch.float32) -> Call:
    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return Call((), map_tensors(cast, inputs(name, timestep)), timestep=timestep)


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_transformer_gives_the_same_bits(
    name: str, make_transformer: MakeTransformer, transformer_inputs: Inputs, tmp_path: Path
) -> None:
    model = _quantized(name, make_transformer)
    calls = [_call(name, transformer_inputs, t) for t in (950.0, 520.0, 30.0)]
    packed = pack_quantized(model, tmp_path / "m", calls, provenance={"method": "rtn"})
    assert packed.agreement.output == packed.agreement.worst_layer[1] == 0
    assert packed.agreement.layers.keys() == packed.manifest.layers.keys()
    assert packed.bytes == sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
    manifest = read_manifest(tmp_path / "m")
    assert (manifest.version, manifest.architecture) == (4, "diffusers")
    loaded = load_quantized(tmp_path / "m")
    assert type(loaded) is type(model)
    assert architecture_of(loaded).describe(loaded) == manifest.arguments
    for call in calls:
        with torch.no_grad():
            expected, found = (tensors_of(m(**call.kwargs)) for m in (model, loaded))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert describe(loaded).mean_activation_bits == describe(model).mean_activation_bits < 5


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "WanTransformer3DModel"])
def test_sixteen_bits_stay_sixteen_bits(
    name: str, make_transformer: MakeTransformer, transformer_inputs: Inputs, tmp_path: Path
) -> None:
    """As a pipeline that was loaded with torch_dtype has it: parameters alone are cast."""
    model = _quantized(name, make_transformer)
    for module_name, module in model.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            kept = model._keep_in_fp32_modules or ()
            if not any(part in f"{module_name}.{leaf}" for part in kept):
                value.data = value.data.bfloat16()
    call = _call(name, transformer_inputs, 500.0, torch.bfloat16)
    assert pack_quantized(model, tmp_path / "m", [call]).agreement.output == 0
    loaded = packed_transformer(tmp_path / "m")
    own = {name: value.dtype for name, value in model.named_parameters()}
    assert {name: value.dtype for name, value in loaded.named_parameters()} == own
    assert torch.bfloat16 in own.values()
    tables = {name: value.dtype for name, value in model.named_buffers()}
    assert {name: value.dtype for name, value in loaded.named_buffers()} == tables
    with torch.no_grad():
        expected, found = (tensors_of(m(**call.kwargs)) for m in (model, loaded))
    assert torch.equal(expected[0], found[0])
    assert next(load_quantized(tmp_path / "m").parameters()).dtype == torch.float32


def test_changed_tables_are_refused_before_anything_is_written(
    make_transformer: MakeTransformer, transformer_inputs: Inputs, tmp_path: Path
) -> None:
    name = "WanTransformer3DModel"
    model = _quantized(name, make_transformer)
    model.get_buffer("rope.freqs_cos").mul_(1.01)
    call = _call(name, transformer_inputs, 500.0)
    with pytest.raises(ValueError, match=r"rope\.freqs_cos: a state dict does not hold them"):
        pack_quantized(model, tmp_path / "m", [call])
    assert not list(tmp_path.iterdir())


def test_a_model_that_differs_is_refused_and_nothing_stays(
    make_transformer: MakeTransformer,
    transformer_inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "DiTTransformer2DModel"
    model = _quantized(name, make_transformer)
    layer = "transformer_blocks.1.ff.net.2"

    def damaged(folder: Path, device: Any) -> nn.Module:
        loaded = load_quantized(folder, device)
        loaded.get_buffer(f"{layer}.scale").mul_(1.01)
        return loaded

    monkeypatch.setattr("dit_qat.dit.ptq.packing.load_quantized", damaged)
    call = _call(name, transformer_inputs, 500.0)
    with pytest.raises(ValueError, match=rf"'{layer}' differs .*; nothing was written"):
        pack_quantized(model, tmp_path / "m", [call])
    assert not list(tmp_path.iterdir())


def test_folders_in_use_and_no_calls_are_refused(
    make_transformer: MakeTransformer, transformer_inputs: Inputs, tmp_path: Path
) -> None:
    name = "DiTTransformer2DModel"
    model = _quantized(name, make_transformer)
    call = _call(name, transformer_inputs, 500.0)
    with pytest.raises(ValueError, match="no calls to compare"):
        pack_quantized(model, tmp_path / "m", [])
    pack_quantized(model, tmp_path / "m", [call])
    with pytest.raises(FileExistsError, match="already holds a packed model"):
        pack_quantized(model, tmp_path / "m", [call])
    pack_quantized(model, tmp_path / "m", [call], overwrite=True)
    (tmp_path / "m" / "cat.png").write_text("meow")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(FileExistsError, match="holds other files"):
        pack_quantized(model, tmp_path / "m", [call], overwrite=True)
