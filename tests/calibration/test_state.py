from pathlib import Path

import pytest
import torch
from torch import nn

from dit_qat.calibration import ResumeState, remove_state
from dit_qat.layers.input_transform import InputTransform, Permute, Rotate, Scale
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.step_bits import StepBits, timestep_scope
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest


def _int_linear(symmetric: bool, full: bool) -> IntLinear:
    torch.manual_seed(0)
    linear = nn.Linear(16, 6, bias=full)
    transform = branch = step_bits = None
    if full:
        steps = [Scale(torch.rand(16) + 0.5), Permute(torch.randperm(16)), Rotate(Rotation(16, 3))]
        transform = InputTransform(16, steps)
        branch, step_bits = (torch.randn(6, 2), torch.randn(2, 16)), StepBits((9.0, 1.0), (3, 4))
    grid = IntegerGrid(4, symmetric, group_size=8 if full else None)
    codes, scales = round_to_nearest(linear.weight.detach(), grid, "minmax")
    return IntLinear.build(
        linear,
        grid=grid,
        scales=scales,
        codes=codes,
        activation=TokenQuantizer(4, symmetric),
        transform=transform,
        branch=branch,
        step_bits=step_bits,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_integer_layers_come_back_bit_for_bit(tmp_path: Path, symmetric: bool, full: bool) -> None:
    layer = _int_linear(symmetric, full)
    state = ResumeState(tmp_path, "run")
    state.save(2, {"blocks.2.fc": layer})
    found = ResumeState(tmp_path, "run").load(2)
    assert found is not None
    twin, x = found["blocks.2.fc"], torch.randn(5, 16)
    assert isinstance(twin, IntLinear)
    assert twin.config == layer.config
    assert {k: v.dtype for k, v in twin.named_buffers()} == {
        k: v.dtype for k, v in layer.named_buffers()
    }
    with timestep_scope(9.0):
        assert torch.equal(twin(x), layer(x))


def test_linears_come_back_and_blocks_that_were_not_finished_are_absent(tmp_path: Path) -> None:
    state, linear = ResumeState(tmp_path, "run"), nn.Linear(3, 2, dtype=torch.bfloat16)
    state.save(0, {"a": linear})
    found = state.load(0)
    assert found is not None
    assert torch.equal(found["a"].weight, linear.weight)
    assert found["a"].weight.dtype == torch.bfloat16
    assert state.load(1) is None


def test_notes_of_all_blocks_are_kept(tmp_path: Path) -> None:
    state = ResumeState(tmp_path, "run")
    assert state.all_notes() == {}
    state.save_notes(0, {"a": {"error": 0.5}})
    state.save_notes(1, {"b": {"choice": "zigzag", "sizes": [1, 2]}})
    assert ResumeState(tmp_path, "run").all_notes() == {
        "a": {"error": 0.5},
        "b": {"choice": "zigzag", "sizes": [1, 2]},
    }


def test_blocks_of_another_run_are_refused(tmp_path: Path) -> None:
    ResumeState(tmp_path, "none").save_notes(0, {"a": {"error": 0.5}})
    state = ResumeState(tmp_path, "one")  # a run without a finished block is nothing to lose
    assert state.all_notes() == {}
    state.save(0, {"a": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"another run.*choose another folder, or remove"):
        ResumeState(tmp_path, "other")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        ResumeState(tmp_path, "one")


def test_modules_that_cannot_be_kept_are_named(tmp_path: Path) -> None:
    state = ResumeState(tmp_path, "run")
    with pytest.raises(ValueError, match=r"a is a GELU.*register a codec"):
        state.save(0, {"a": nn.GELU()})
    (tmp_path / "block_0000.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"block_0000\.safetensors is damaged"):
        state.load(0)


def test_files_of_others_are_neither_mixed_with_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"other files, such as mine\.txt"):
        ResumeState(tmp_path, "run")
    state = ResumeState(tmp_path / "state", "run")
    state.save_notes(0, {})
    state.save(0, {"a": nn.Linear(2, 2)})
    (tmp_path / "state/mine.txt").write_text("keep")
    remove_state(tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["mine.txt"]
    (tmp_path / "state/mine.txt").unlink()
    remove_state(tmp_path / "state")
    assert not (tmp_path / "state").exists()
