"""A folder for features while they are needed, which every process sees."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit_qat.dit.processes import Processes

__all__ = ["scratch_folder"]

_NAME = ".features"


@contextmanager
def scratch_folder(out: Path | None, processes: Processes) -> Iterator[Path]:
    """Yield an empty folder that process zero makes and removes.

    Args:
        out: Where to make it; what a killed run left there goes. By default among the system's
            temporary files, which processes of another machine do not see.
        processes: All of those that call this together.

    Raises:
        OSError: It cannot be made, or not every process sees it.
    """

    def make() -> Path | None:
        if not processes.is_zero:
            return None
        if out is None:
            return Path(tempfile.mkdtemp(prefix="dit-qat-"))
        shutil.rmtree(out / _NAME, ignore_errors=True)
        (out / _NAME).mkdir(parents=True)
        return out / _NAME

    folder = processes.together(make)[0]
    assert folder is not None
    try:
        processes.together(lambda: _see(folder, processes.rank))
        yield folder
    finally:
        if processes.is_zero:
            shutil.rmtree(folder, ignore_errors=True)


def _see(folder: Path, rank: int) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}, made by process 0, is not there for process {rank}, which is on another "
            "machine: name a folder that all machines see, --out"
        )
