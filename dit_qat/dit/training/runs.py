"""The folder of a run: what is in it, when it may be written, and where a run resumes."""

import json
from pathlib import Path
from typing import Any

from dit_qat.dit.training.checkpoints import last_checkpoint
from dit_qat.export.files import check_folder, claim_folder

__all__ = ["RESULTS", "check_run", "claim_run", "read_metrics", "resume_path"]

RESULTS = (
    "checkpoints",
    "samples",
    "tensorboard",
    "config.yaml",
    "metrics.json",
    "bit_map.json",
    "bit_map.png",
    ".job",
)
"""What a training run leaves in its folder."""

_CURE = (
    "continue that run with --ckpt_path last, choose another --trainer.default_root_dir, or "
    "pass --overwrite true to replace them"
)
_VERBS = {"fit", "validate", "test"}


def check_run(root: Path, overwrite: bool) -> None:
    """Raise what :func:`claim_run` would, and change nothing."""
    check_folder(root, RESULTS, overwrite, _CURE)


def claim_run(root: Path, overwrite: bool) -> None:
    """Make sure that a fresh run does not write over another's results (see ``claim_folder``)."""
    claim_folder(root, RESULTS, overwrite, _CURE)


def read_metrics(path: Path) -> dict[str, Any]:
    """The entries of a run's ``metrics.json``, by verb; none if there is no such file.

    Raises:
        ValueError: if it is damaged, or not written by ``fit``, ``validate`` or ``test``.
    """
    if not path.is_file():
        return {}
    cure = "move it away, or choose another --trainer.default_root_dir"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {cure}") from error
    if not isinstance(content, dict) or not content.keys() <= _VERBS:
        raise ValueError(
            f"{path} was not written by {', '.join(sorted(_VERBS))}, whose entry would replace it; "
            f"{cure}"
        )
    return content


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
