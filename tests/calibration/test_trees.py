from pathlib import Path

import pytest
import torch

from dit_qat.calibration.trees import load_tree, map_tensors, replacing, save_tree, tensors_of


def test_a_tree_comes_back_from_disk_with_its_containers_dtypes_and_values(tmp_path: Path) -> None:
    tree = {
        "args": (torch.randn(2, 3), [None, True, 2, 1.5, "text"]),
        "b": {"bf16": torch.ones(2, dtype=torch.bfloat16), "flag": torch.tensor(True)},
        "view": torch.arange(6.0).view(2, 3)[:, 1],
        "empty": ((), [], {}),
    }
    save_tree(tmp_path / "tree.safetensors", tree)
    found = load_tree(tmp_path / "tree.safetensors")
    assert map_tensors(lambda _: 0, found) == map_tensors(lambda _: 0, tree)
    for before, after in zip(tensors_of(tree), tensors_of(found), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_two_names_of_one_tensor_are_no_trouble(tmp_path: Path) -> None:
    x = torch.randn(3)
    save_tree(tmp_path / "tree", [x, x, x[:2]])
    assert [len(t) for t in load_tree(tmp_path / "tree")] == [3, 3, 2]


def test_what_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"type object.*keep the calls in memory"):
        save_tree(tmp_path / "tree", [object()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tree"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tree is damaged"):
        load_tree(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replacing(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
