import errno
import multiprocessing
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dit_qat.export.folders import writing, written_folder


def contents(root):
    return {
        str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()
    }


def write(target, text, error=None):
    with written_folder(target) as place:
        (place / "inner").mkdir()
        (place / "inner" / "a.txt").write_text(text)
        if error is not None:
            raise error


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path):
    target = tmp_path / "new" / "out"
    with written_folder(target) as place:
        assert not target.exists()
        (place / "a.txt").write_text("one")
        (place / "a.txt").chmod(0o600)
        assert not target.exists()
    assert contents(target.parent) == {"out/a.txt": "one"}
    assert (target / "a.txt").stat().st_mode & 0o777 == 0o644
    write(target, "two")
    assert contents(target.parent) == {"out/inner/a.txt": "two"}


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_what_was_there_and_no_debris(tmp_path, existing):
    if existing:
        write(tmp_path / "out", "old")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "half", KeyboardInterrupt())
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"out"} if existing else set())


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".out.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".out.partial" / "deep" / "b.txt").write_text("half")
    write(tmp_path / "out", "new")
    assert contents(tmp_path) == {"out/inner/a.txt": "new"}


def test_a_swap_that_was_cut_short_is_undone(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "out", "half", OSError("full"))
    assert contents(tmp_path) == {"out/inner/a.txt": "old"}
    write(tmp_path / ".out.old", "older")  # cut short after the second rename instead
    write(tmp_path / "out", "new")
    assert contents(tmp_path) == {"out/inner/a.txt": "new"}


def test_a_swap_that_fails_keeps_the_old_one(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    real = Path.rename

    def rename(self, target):
        if self.name == ".out.partial":
            raise OSError("no rename")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no rename"):
        write(tmp_path / "out", "new")
    assert contents(tmp_path) == {"out/inner/a.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_and_its_folder_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "run", "old")
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "run", target_is_directory=True)
    for text in ("new", "newer"):
        write(tmp_path / "latest", text)
        assert contents(tmp_path / "disk") == {"run/inner/a.txt": text}
    assert (tmp_path / "latest").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "latest"}


def test_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path(), "new")
    assert contents(tmp_path) == {"here/inner/a.txt": "new"}
    monkeypatch.chdir(tmp_path)


def test_a_mount_point_is_refused_first(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(OSError, match=r"out is a mount point.*a folder inside it"):
        write(tmp_path / "out", "new")
    assert contents(tmp_path) == {}


def hold(target, ready, done):
    with written_folder(target) as place:
        (place / "a.txt").write_text("first")
        ready.set()
        done.wait(30)


def test_two_writers_of_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out", ready, done))
    other.start()
    assert ready.wait(30)
    with pytest.raises(BlockingIOError, match=r"\.out\.partial"):
        write(tmp_path / "out", "second")
    done.set()
    other.join()
    assert contents(tmp_path) == {"out/a.txt": "first"}


def test_a_full_disk_is_named_by_the_outermost_target(tmp_path):
    with (
        pytest.raises(OSError, match=r"could not write \S*/out \(No space left.*free space"),
        written_folder(tmp_path / "out") as place,
        written_folder(place / "inner"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [SafetensorError, RuntimeError])
def test_a_full_disk_is_called_so(tmp_path, kind):
    with (
        pytest.raises(OSError, match=r"could not write out \(disk full\); free space"),
        writing("out"),
    ):
        raise kind("disk full")
