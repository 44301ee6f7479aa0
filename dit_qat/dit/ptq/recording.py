"""The calls that a run is calibrated on: recorded, or found where an earlier process left them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_qat.calibration import CallStore, fingerprint
from dit_qat.dit.ptq.calibrate import calibrate_dit, calibrate_pipeline
from dit_qat.dit.ptq.job import Prepared, PTQJob
from dit_qat.export.files import write_json

__all__ = ["claim_state", "record", "state_folder"]

_JOB = "job.json"
_FINISHED = ("blocks/block_*", "calls/calls.json", "images/pairs.jsonl")  # worth going on from


def state_folder(out: Path) -> Path:
    """Where a run keeps what it goes on from: beside its folder of results."""
    return out.with_name(f".{out.name}.ptq")


def claim_state(state: Path, job: PTQJob, overwrite: bool = False) -> bool:
    """Take over what an earlier process of the same job had finished, or begin.

    Args:
        state: The folder, which this process has locked.
        job: What is asked for.
        overwrite: Remove what another job had finished, rather than refuse.

    Returns:
        Whether there was something to take over.

    Raises:
        ValueError: if it holds that of another job, or is damaged.
    """
    path, wanted = state / _JOB, job.plain()
    if path.is_file():
        if path.read_text(encoding="utf-8") == json.dumps(wanted, indent=2) + "\n":
            return True
        if not overwrite and any(any(state.glob(pattern)) for pattern in _FINISHED):
            raise ValueError(
                f"{state} holds what a run of other settings had finished; repeat that command, "
                "choose another --out, or pass --overwrite true to start over"
            )
        for old in state.glob("[!.]*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_json(path, wanted)
    return False


def record(
    prepared: Prepared, state: Path, say: Callable[[str], None], progress: bool
) -> CallStore:
    """Record calibration calls, or open those that are there."""
    job, subject = prepared.job, prepared.subject
    folder = state / "calls" if job.calibration.on_disk else None
    if folder is not None and (folder / "calls.json").is_file():
        store = CallStore.open(folder)
        if store.model == fingerprint(subject.model):
            say(f"going on with {len(store)} calls recorded before")
            return store
    common: dict[str, Any] = {
        "steps": job.calibration.steps,
        "limit_bytes": job.limit_bytes,
        "folder": folder,
        "progress": progress,
    }
    say(f"calibrating on {prepared.calibration_text}")
    if subject.pipeline is not None:
        return calibrate_pipeline(
            subject.pipeline,
            prepared.prompts,
            num_inference_steps=job.pipeline.steps,
            batch_size=job.pipeline.batch_size,
            seed=job.seed,
            timestep_argument=prepared.target.timestep_argument,
            **common,
            **job.pipeline.options,
        )
    classes = job.calibration.classes
    return calibrate_dit(
        subject.dit,
        prepared.sampler,
        None if classes is None else lambda index: classes[index % len(classes)],
        images=job.calibration.images,
        **common,
    )
