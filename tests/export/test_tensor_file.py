"""The safetensors container: what is written is read, and headers are not believed."""

import gc
import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from dit_qat.export.tensor_file import DTYPES, TensorWriter, open_tensors

TENSORS: dict[str, Tensor] = {
    "b": torch.arange(5, dtype=torch.uint8),
    "a": torch.arange(3, dtype=torch.uint8),
    "half": torch.randn(3, 1).half(),
    "brain": torch.randn(2).bfloat16(),
    "count": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "größe": torch.randn(2, 3).T,
}


def written(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, TensorWriter]:
    file = BytesIO()
    sizes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    writer = TensorWriter(file, sizes, {key: "x" * len(value) for key, value in metadata.items()})
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.finish(metadata)
    return file.getvalue(), writer


def test_the_package_and_we_read_alike(tmp_path: Path) -> None:
    content, writer = written(TENSORS, {"k": "value"})
    assert len(content) == writer.total_bytes
    reference = load(content)
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with open_tensors(path) as file:
        assert file.metadata == {"k": "value"}
        assert list(file.places) == ["count", "empty", "größe", "brain", "half", "a", "b"]
        for name, own in file.read_run([*file.places]).items():
            tensor = TENSORS[name]
            assert torch.equal(own, tensor)
            assert own.data_ptr() % 64 == 0 or not own.numel()
            assert torch.equal(reference[name], tensor)
            assert own.dtype == tensor.dtype


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(save({n: t.contiguous() for n, t in TENSORS.items()}))
    with open_tensors(path) as file:
        assert file.metadata == {}
        for begin in range(len(TENSORS)):
            for name, own in file.read_run([*file.places][begin:]).items():
                assert torch.equal(own, TENSORS[name])


def test_a_tensor_read_into_given_memory(tmp_path: Path) -> None:
    path, room = tmp_path / "t.safetensors", torch.full((99,), 7, dtype=torch.uint8)
    path.write_bytes(written(TENSORS, {})[0])
    with open_tensors(path) as file, file.fetched_meanwhile():
        for name in ("größe", "b", "empty"):
            tensor = file.read(name, room)
            assert torch.equal(tensor, TENSORS[name])
            assert not tensor.numel() or tensor.data_ptr() == room.data_ptr()
            assert (room[tensor.nbytes :] == 7).all()
            room.fill_(7)


ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": ENTRY}, b"12", ""),
        ({"a": ENTRY, "b": ENTRY | {"shape": [0], "data_offsets": [0, 0]}}, b"12", ""),
        ({"a": ENTRY | {"shape": [2] + [1] * 63}}, b"12", ""),
        ({"a": ENTRY | {"shape": [2] + [1] * 64}}, b"12", "damaged shape or offsets"),
        ({"a": ENTRY}, b"1", "holds 1 bytes of tensors where its header has 2"),
        ({"a": ENTRY}, b"123", "holds 3 bytes of tensors where its header has 2"),
        ({"a": ENTRY, "b": ENTRY}, b"12", "b overlaps or leaves a gap"),
        ({"a": ENTRY | {"data_offsets": [1, 3]}}, b"123", "a overlaps or leaves a gap"),
        ({"a": ENTRY | {"data_offsets": [0, 1]}}, b"1", "gives it 1 bytes, but U8 of"),
        ({"a": ENTRY | {"data_offsets": [2, 0]}}, b"12", "gives it -2 bytes"),
        ({"a": ENTRY | {"data_offsets": [0, 2.0]}}, b"12", "damaged shape or offsets"),
        ({"a": ENTRY | {"shape": [-1, -2]}}, b"12", "damaged shape or offsets"),
        ({"a": ENTRY | {"shape": [1 << 40, 1 << 40]}}, b"12", "gives it 2 bytes"),
        ({"a": ENTRY | {"shape": [True, 2]}}, b"12", "damaged shape or offsets"),
        ({"a": ENTRY | {"dtype": "F8"}}, b"12", "dtype 'F8', not one of"),
        ({"a": ENTRY | {"dtype": []}}, b"12", "dtype"),
        ({"a": ENTRY | {"more": 1}}, b"12", "has no dtype, shape and data_offsets"),
        ({"a": [1]}, b"12", "has no dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, b"", "metadata in its header is no text"),
        ([], b"", "its header is no JSON object"),
    ],
)
def test_headers_are_checked(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path, text = tmp_path / "t.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    if not message:
        with open_tensors(path) as file:
            assert file.read_run(["a"])["a"].flatten().tolist() == list(data)
        return
    with pytest.raises(ValueError, match=message), open_tensors(path):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 30, b"\x04" + 7 * b"\0" + b"nope", b"[" * 99999]
)
def test_what_is_no_such_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with (
        pytest.raises(ValueError, match=r"truncated or no safetensors|is no JSON"),
        open_tensors(path),
    ):
        pass


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    path, text = tmp_path / "t.safetensors", b"[" * 10**6
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="is no JSON"), open_tensors(path):
        pass


def test_a_file_cut_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(written(TENSORS, {})[0])
    with open_tensors(path) as file:
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(ValueError, match="ends within its tensors"):
            file.read("b", torch.empty(5, dtype=torch.uint8))
        with pytest.raises(ValueError, match="ends within its tensors"):
            file.read_run([*file.places])


def test_dtypes_are_one_to_one() -> None:
    assert len(set(DTYPES.values())) == len(DTYPES)
    with pytest.raises(ValueError, match=r"torch\.complex64 has no place"):
        written({"a": torch.zeros(1, dtype=torch.complex64)}, {})


@pytest.mark.parametrize("at_once", [1, 2, 3, 1000])
def test_runs_are_read_however_little_comes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Systems may return fewer bytes than were asked for, and take so many places at a time."""
    whole, path = os.preadv, tmp_path / "t.safetensors"

    def short(descriptor: int, views: list[memoryview], position: int) -> int:
        assert len(views) <= 2
        return whole(descriptor, [views[0][:at_once]], position)

    monkeypatch.setattr("dit_qat.export.tensor_file._MOST_VIEWS", 2)
    monkeypatch.setattr(os, "preadv", short)
    path.write_bytes(written(TENSORS, {})[0])
    with open_tensors(path) as file:
        for name, own in file.read_run([*file.places]).items():
            assert torch.equal(own, TENSORS[name])


def test_systems_without_such_requests_read_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    path = tmp_path / "t.safetensors"
    path.write_bytes(written(TENSORS, {})[0])
    with open_tensors(path) as file:
        for name, own in file.read_run([*file.places]).items():
            assert torch.equal(own, TENSORS[name])


def test_memory_of_a_run_lives_as_long_as_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(written(TENSORS, {})[0])
    with open_tensors(path) as file:
        last = file.read_run([*file.places])["b"]
    gc.collect()
    torch.full((10_000,), 7.0)
    assert torch.equal(last, TENSORS["b"])
    assert last.untyped_storage().nbytes() == last.nbytes
