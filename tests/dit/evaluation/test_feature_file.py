import shutil
from collections import namedtuple

import pytest
import torch

from dit_qat.dit.evaluation.feature_file import FeatureFile


def test_what_is_written_in_parts_is_read_by_slices_and_indices(tmp_path):
    values = torch.arange(60.0).view(20, 3)
    file = FeatureFile(tmp_path / "f", 20, 3)
    file.create()
    for first in (7, 0, 14):
        file.write(first, values[first : first + 7])
    assert (len(file), file.shape) == (20, (20, 3))
    assert torch.equal(file[3:11], values[3:11])
    assert torch.equal(file[18:40], values[18:])
    chosen = torch.tensor([19, 0, 0, 5])
    assert torch.equal(file[chosen], values[chosen])


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"the features of 20 images need .* --out"):
        FeatureFile(tmp_path / "f", 20, 3).create()
    assert not (tmp_path / "f").exists()


def test_a_file_that_was_cut_is_no_vectors_of_chance(tmp_path):
    file = FeatureFile(tmp_path / "f", 4, 3)
    file.create()
    (tmp_path / "f").write_bytes(b"\0" * 40)
    assert file[:3].shape == (3, 3)
    with pytest.raises(OSError, match="ends before vector 4"):
        file[:4]
    with pytest.raises(OSError, match="ends before vector 4"):
        file[torch.tensor([3])]
