"""Files written whole, folders claimed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from dit_qat.export.files import (
    check_folder,
    claim_folder,
    locked,
    write_json,
    written_whole,
)


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def fail() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_success_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    with written_whole(path) as temporary:
        assert json.loads(path.read_text())["a"]
        temporary.write_text("{}")
    assert path.read_text() == "{}"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="asks for processes by signal 0")
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    code = "import os; print(os.getpid())"
    gone = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    names = {
        "killed": f".a.json.{gone}.tmp",
        "another target": f".b.json.{gone}.tmp",
        "still writing": f".a.json.{os.getppid()}.tmp",
        "not ours": ".a.json.swap.tmp",
    }
    for name in names.values():
        (tmp_path / name).write_text("half")
    write_json(tmp_path / "a.json", {})
    del names["killed"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *names.values()}


def test_checking_a_folder_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_text("x")
    with pytest.raises(FileExistsError, match=r"grid\.png\); do something"):
        check_folder(tmp_path, ["grid.png"], False, "do something")
    assert check_folder(tmp_path, ["grid.png", "b"], True, "") == [tmp_path / "grid.png"]
    assert check_folder(tmp_path / "new", ["grid.png"], False, "") == []
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_only_named_results_are_refused_and_removed(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_text("x")
    (tmp_path / "images").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"grid\.png, images\); do something else"):
        claim_folder(tmp_path, ["grid.png", "images"], False, "do something else")
    claim_folder(tmp_path, ["grid.png", "images"], True, "")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    claim_folder(tmp_path / "a" / "b", ["x"], False, "")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file"):
        claim_folder(tmp_path / "notes.txt", ["x"], True, "")


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with locked(folder):
        message = f"another run is writing to {folder}"
        with pytest.raises(BlockingIOError, match=message), locked(folder):
            pytest.fail("two writers")
    with locked(folder):  # free again
        pass


def test_a_killed_writer_leaves_no_lock(tmp_path):
    code = (
        "import os, sys, pathlib; from dit_qat.export.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def acquire(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    message = r"\.lock cannot be locked .*No locks available.*NFS"
    with pytest.raises(OSError, match=message), locked(tmp_path):
        pytest.fail("nobody is kept out")
