from pathlib import Path

import pytest

from dit_qat.llm.models import room
from dit_qat.llm.models.room import free_bytes

MEMINFO = "MemTotal:       1000 kB\nMemFree:         10 kB\nMemAvailable:    600 kB\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 600 kB available, in whose folder a group may be made."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(room, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_GROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "used", "idle", "free"),
    [
        ("max", 1, 0, 600 << 10),
        (500 << 10, 100 << 10, 0, 400 << 10),
        (500 << 10, 100 << 10, 50 << 10, 450 << 10),
        (5000 << 10, 0, 0, 600 << 10),
        (10, 20, 0, 0),
    ],
)
def test_the_least_of_system_and_group(
    system: Path, limit: object, used: int, idle: int, free: int
) -> None:
    (system / "memory.max").write_text(f"{limit}\n")
    (system / "memory.current").write_text(f"{used}\n")
    (system / "memory.stat").write_text(f"anon 1\ninactive_file {idle}\n")
    assert free_bytes("cpu") == free


def test_without_a_group_or_an_answer(system: Path) -> None:
    assert free_bytes("cpu") == 600 << 10
    assert free_bytes("meta") is None
    (system / "meminfo").unlink()
    assert free_bytes("cpu") is None
