"""The folder of a run: what is in it, when it may be written, and where a run resumes."""

import shutil
from pathlib import Path

from dit_qat.dit.training.checkpoints import last_checkpoint

__all__ = ["RESULTS", "claim_folder", "resume_path"]

RESULTS = ("checkpoints", "samples", "tensorboard", "config.yaml")
"""What a training run leaves in its folder."""


def claim_folder(root: Path, overwrite: bool) -> None:
    """Make sure that a fresh run does not write over another's results.

    Args:
        root: The run's folder; made if it does not exist.
        overwrite: Remove the results of an earlier run (nothing else in the folder).

    Raises:
        FileExistsError: if there are results and ``overwrite`` is False.
        NotADirectoryError: if ``root`` is a file.
    """
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; choose another trainer.default_root_dir")
    found = [root / name for name in RESULTS if (root / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"{root} already holds results ({', '.join(path.name for path in found)}); continue "
            "that run with --ckpt_path last, choose another --trainer.default_root_dir, or pass "
            "--overwrite true to replace them"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    root.mkdir(parents=True, exist_ok=True)


def resume_path(ckpt_path: str, root: Path) -> Path:
    """The checkpoint to resume from; ``last`` is the latest of the run in ``root``.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = last_checkpoint(root) if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}; start afresh without --ckpt_path, or give the "
            "trainer.default_root_dir of the run to continue"
        )
    return path
