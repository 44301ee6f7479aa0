from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dit_qat.calibration import Call, CallStore
from dit_qat.calibration.trees import tensors_of

MakeStore = Callable[..., CallStore]
MakeToy = Callable[..., nn.Module]


def test_a_folder_holds_what_memory_holds(
    make_toy: MakeToy, make_store: MakeStore, tmp_path: Path
) -> None:
    memory = make_store(make_toy())
    make_store(make_toy(), folder=tmp_path)
    disk = CallStore.open(tmp_path)
    assert (disk.model, disk.steps, disk.timesteps) == (
        memory.model,
        memory.steps,
        memory.timesteps,
    )
    assert disk.rows == memory.rows == 6
    for a, b in zip(memory, disk, strict=True):
        assert (a.step, a.timestep, a.rows, list(a.kwargs)) == (
            b.step,
            b.timestep,
            b.rows,
            list(b.kwargs),
        )
        pairs = zip(tensors_of([a.args, a.kwargs]), tensors_of([b.args, b.kwargs]), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_a_tensor_that_every_call_gets_is_kept_once() -> None:
    text, store = torch.randn(100), CallStore()
    for step in range(3):
        store.append(Call((torch.full((10,), float(step)), text.clone()), {}, step))
    assert store.bytes == 4 * (100 + 3 * 10)
    assert store[0].args[1] is store[2].args[1]


@pytest.mark.parametrize("on_disk", [False, True])
def test_texts_that_take_turns_are_kept_once(tmp_path: Path, on_disk: bool) -> None:
    """Guidance in two passes: with and without the prompt, at every step."""
    texts = [torch.randn(5000).bfloat16() for _ in range(2)]
    store = CallStore(folder=tmp_path if on_disk else None)
    for step in range(4):
        for text in texts:
            x = torch.full((10,), float(step))
            store.append(Call((x, [text.clone()]), {"scale": 2.0, "same": x}, step))
    store.finish()
    assert store.bytes == 2 * 2 * 5000 + 4 * 2 * 40  # of equal ones in one call, both are kept
    if on_disk:
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1.6 * store.bytes
        store = CallStore.open(tmp_path)
    for index, call in enumerate(store):
        assert call.args[0].tolist() == call.kwargs["same"].tolist() == [index // 2] * 10
        assert torch.equal(call.args[1][0], texts[index % 2])
        assert call.kwargs["scale"] == 2.0


def test_equal_bytes_of_another_shape_or_dtype_are_another_tensor() -> None:
    store = CallStore()
    for tensor in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32)):
        store.append(Call((tensor,), {}))
    assert [(c.args[0].shape, c.args[0].dtype) for c in store] == [
        ((4,), torch.float32),
        ((2, 2), torch.float32),
        ((4,), torch.int32),
    ]


def test_a_new_recording_leaves_no_files_of_the_last(tmp_path: Path) -> None:
    store = CallStore(folder=tmp_path)
    for value in range(3):
        store.append(Call((torch.full((2,), value),), {}))
    store = CallStore(folder=tmp_path)
    store.append(Call((torch.zeros(2),), {}))
    assert [path.name for path in tmp_path.iterdir()] == ["call_000000.safetensors"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_limit_is_held_and_the_cure_named(tmp_path: Path, on_disk: bool) -> None:
    store = CallStore(limit_bytes=90, folder=tmp_path if on_disk else None)
    store.append(Call((torch.zeros(20),), {}))
    cure = f"{tmp_path}.*fewer steps" if on_disk else "in memory.*fewer steps.*a folder, on disk"
    with pytest.raises(ValueError, match=cure):
        store.append(Call((torch.ones(20),), {}))
    assert len(store) == 1


def test_an_unfinished_recording_is_no_recording(tmp_path: Path) -> None:
    store = CallStore(folder=tmp_path)
    store.append(Call((torch.zeros(2),), {}))
    with pytest.raises(FileNotFoundError, match="record it again"):
        CallStore.open(tmp_path)
    store.finish()
    assert len(CallStore.open(tmp_path)) == 1
    CallStore(folder=tmp_path)  # a new recording into the same folder
    with pytest.raises(FileNotFoundError, match="record it again"):
        CallStore.open(tmp_path)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "calls.json").write_text("{}")
    with pytest.raises(ValueError, match=r"calls\.json is damaged"):
        CallStore.open(tmp_path)
