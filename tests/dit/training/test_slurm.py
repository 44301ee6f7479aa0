"""Which results a job that was started again may take for its own."""

from pathlib import Path

import pytest

from dit_qat.dit.training.slurm import goes_on, sign

JOBS = [
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
]


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in JOBS:
        for name in names:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("identity", "count"), JOBS)
def test_a_job_owns_the_run_that_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, identity: str, count: str
) -> None:
    monkeypatch.setenv(identity, "17")
    sign(tmp_path)
    assert not goes_on(tmp_path)  # its first time
    monkeypatch.setenv(count, "1")
    assert goes_on(tmp_path)
    monkeypatch.setenv(identity, "18")
    assert not goes_on(tmp_path)


def test_a_job_does_not_own_results_that_it_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(tmp_path)  # outside of a job: nobody's
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not goes_on(tmp_path)


def test_a_name_that_every_torchrun_has_is_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    sign(tmp_path)
    assert not goes_on(tmp_path)
