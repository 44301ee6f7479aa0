"""Files that are written whole or not at all, and folders that are nobody's yet."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["check_folder", "claim_folder", "locked", "write_json", "written_whole"]

_LOCK = ".lock"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; flush and rename it when the block ends well.

    Whatever happens, ``path`` is its old content or its new one. An error leaves no temporary
    file; a process that is killed leaves its ``.NAME.PID.tmp``, which the next process to write
    ``path`` removes, unless a process of that number runs then. Missing folders are made. Only
    processes of one machine may write the same ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for orphan in _orphans(path.parent.absolute()).get(path.name, ()):
        orphan.unlink(missing_ok=True)
    # In the same folder, for a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache  # a listing per process and folder: per file, thousands of images would take hours
def _orphans(folder: Path) -> dict[str, list[Path]]:
    """Temporary files of processes that are gone, by the name they were to get."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", path.name)
        if match and not _runs(int(match[2])):
            found.setdefault(match[1], []).append(path)
    return found


def _runs(pid: int) -> bool:
    """Whether there is such a process; where that cannot be asked, yes."""
    if os.name != "posix":  # elsewhere, the question would be a signal
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write plain values, indented."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_folder(folder: Path, names: Sequence[str], overwrite: bool, cure: str) -> list[Path]:
    """Make sure that a folder may be claimed, without touching it.

    Args:
        folder: Where the results will go.
        names: Files and folders that are going to be written there.
        overwrite: Whether those of an earlier run may go.
        cure: What the user can do, for the message.

    Returns:
        Those of an earlier run.

    Raises:
        FileExistsError: if there are some and ``overwrite`` is False.
        NotADirectoryError: if the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose another folder")
    found = [folder / name for name in names if (folder / name).exists()]
    if found and not overwrite:
        listed = ", ".join(path.name for path in found)
        raise FileExistsError(f"{folder} already holds results ({listed}); {cure}")
    return found


def claim_folder(folder: Path, names: Sequence[str], overwrite: bool, cure: str) -> None:
    """Make a folder for results; with ``overwrite``, remove those of an earlier run from it.

    Nothing but ``names`` is removed; arguments and errors as in :func:`check_folder`.
    """
    for path in check_folder(folder, names, overwrite, cure):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one writer at a time, until the block or the process ends.

    The lock is the operating system's, on ``<folder>/.lock``: one that a killed process held is
    free again, and the file that stays behind means nothing.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if the file system cannot lock files, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"another run is writing to {folder} (it holds {folder / _LOCK}); wait for it to end, "
            "or choose another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise OSError(
            f"{folder / _LOCK} cannot be locked ({error}), so that two runs could write there at "
            "once; choose a folder that you may write to, on a file system with locks (for NFS: "
            "mounted with them; for Lustre: with -o flock)"
        ) from error
    try:
        yield
    finally:
        lock.release()
