"""Where a conversion may be written."""

from collections.abc import Sequence
from pathlib import Path

from dit_qat.dit.convert.formats import FORMATS, Format

__all__ = ["RECORD", "check_place", "sidecar"]

RECORD = "conversion.json"
"""In a folder, what says that a conversion wrote it."""


def sidecar(target: Path) -> Path:
    """Where the record of a file goes."""
    return target.with_name(f"{target.name}.json")


def check_place(
    target: Path, chosen: Format, sources: Sequence[str | None], overwrite: bool
) -> None:
    """Make sure that a target may be written, without touching it.

    Args:
        target: File or folder.
        chosen: What it is going to hold.
        sources: Paths (or names) of what is read, which must not be replaced.
        overwrite: Whether an earlier conversion may go.

    Raises:
        FileExistsError: If something is there, and may not go.
        IsADirectoryError: If a file's name is a folder's.
        NotADirectoryError: If a folder's name is a file's.
        ValueError: For a name that does not tell what it is, or that holds a source.
    """
    for source in sources:
        path = None if source is None else Path(source).resolve()
        if path is not None and path.exists() and target.resolve() in (path, *path.parents):
            raise ValueError(f"{target} is, or holds, the source {source}; choose another target")
    if chosen.is_folder:
        _check_folder(target, overwrite)
    else:
        _check_file(target, chosen, overwrite)


def _check_file(target: Path, chosen: Format, overwrite: bool) -> None:
    if target.suffix not in chosen.suffixes:
        raise ValueError(
            f"{target}: this format is a file named *{' or *'.join(chosen.suffixes)}; choose such "
            "a name, for it tells readers what the file is"
        )
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file in it")
    taken = [str(path) for path in (target, sidecar(target)) if path.exists()]
    if taken and not overwrite:
        raise FileExistsError(
            f"{' and '.join(taken)}: there already; choose another target, or pass --overwrite "
            "(overwrite=True) to replace it"
        )


def _check_folder(target: Path, overwrite: bool) -> None:
    if target.suffix in {suffix for known in FORMATS.values() for suffix in known.suffixes}:
        raise ValueError(f"{target}: this format is a folder; choose a name without suffix")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; choose another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target}: there already; choose another target, or pass --overwrite "
            "(overwrite=True) to replace it"
        )
    if not (target / RECORD).is_file():
        raise FileExistsError(
            f"{target} holds files and no {RECORD}, so no conversion wrote it and none replaces "
            "it; choose another folder"
        )
