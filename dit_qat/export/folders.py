"""Folders that are written whole or not at all, and what a full disk is called."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from dit_qat.export.files import locked

__all__ = ["check_place", "writing", "written_folder"]

_LOCK = ".lock"
_MARGIN = 1 << 20  # beside what is asked for: small files and the file system's own
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_place(target: Path, needed: int = 0) -> None:
    """Make sure that a folder can be made and filled, leaving nothing behind.

    Args:
        target: The folder, which need not exist.
        needed: Bytes that it will take.

    Raises:
        OSError: if nothing can be written there, it is a mount point, or there is no room.
    """
    target = target.resolve()
    _refuse_mount(target)
    existing = next(parent for parent in target.parents if parent.exists())
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            f"{target} cannot be written, for nothing can be made in {existing} ({error}); choose "
            "another folder"
        ) from error
    free = shutil.disk_usage(existing).free
    if free < needed + _MARGIN:
        raise OSError(
            f"{existing} has {free / 1e6:.0f} MB free, and {target.name} takes "
            f"{(needed + _MARGIN) / 1e6:.0f} MB; free space or choose another place"
        )


def _refuse_mount(target: Path) -> None:
    if target.is_mount():
        raise OSError(
            f"{target} is a mount point, which no finished folder can take the place of; choose a "
            "folder inside it"
        )


@contextmanager
def written_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; rename it when the block ends well.

    An existing ``target`` stays as it is until the new one is whole; whether it may be replaced is
    the caller's question. A link stays, and the folder that it leads to is replaced. What a killed
    process leaves (``.NAME.partial``, or the old folder as ``.NAME.old`` between two renames) the
    next one to write ``target`` clears, or puts back.

    Raises:
        BlockingIOError: If another process is writing ``target``.
        OSError: If ``target`` cannot be replaced, for it is a mount point, or cannot be written;
            of a disk that is full, with the target's name.
    """
    target = target.resolve()
    _refuse_mount(target)
    partial = target.with_name(f".{target.name}.partial")
    with locked(partial), _named_if_full(target):
        _put_back(target)
        _clear(partial)
        try:
            yield partial
            (partial / _LOCK).unlink(missing_ok=True)
            _flush(partial)
            _swap(partial, target)
        except BaseException:
            if partial.exists():
                shutil.rmtree(partial)
            raise


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Call what torch and safetensors raise on a full disk by its name.

    Raises:
        OSError: If the block cannot write.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(
            f"could not write {target} ({error}); free space or choose another place"
        ) from error


class _FullError(OSError):
    """There is no room for a folder."""

    def __init__(self, target: Path, reason: str) -> None:
        super().__init__(
            f"could not write {target} ({reason}), and nothing of it was kept; free space or "
            "choose another place"
        )
        self.reason = reason


@contextmanager
def _named_if_full(target: Path) -> Iterator[None]:
    """Say where a disk is full, by the outermost of nested targets: the system names none."""
    try:
        yield
    except _FullError as error:
        raise _FullError(target, error.reason) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _FullError(target, error.strerror or str(error)) from error


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _put_back(target: Path) -> None:
    """Undo a swap that was cut short."""
    if _old(target).is_dir():
        if target.exists():
            shutil.rmtree(_old(target))
        else:
            _old(target).rename(target)


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name == _LOCK:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(partial: Path) -> None:
    """Have every file on the disk before the folder gets its name, and readable by all."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)  # safetensors makes files that only their owner reads


def _swap(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    target.rename(_old(target))
    try:
        partial.rename(target)
    except OSError:
        _old(target).rename(target)
        raise
    shutil.rmtree(_old(target))
