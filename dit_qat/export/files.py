"""Files that are written whole or not at all, and folders that are nobody's yet."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["claim_folder", "write_json", "written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; flush and rename it when the block ends well.

    Whatever happens, ``path`` is its old content or its new one, and no temporary file stays.
    Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, for a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write plain values, indented."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def claim_folder(folder: Path, names: Sequence[str], overwrite: bool, cure: str) -> None:
    """Make a folder for results, or make sure that it holds none.

    Args:
        folder: Where the results will go; made if it does not exist.
        names: Files and folders that are going to be written there.
        overwrite: Remove those of an earlier run (and nothing else).
        cure: What the user can do, for the message.

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
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
