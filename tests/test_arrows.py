"""The import arrows of docs/architecture.md."""

import subprocess
import sys
from pathlib import Path

import pytest
from check_arrows import ALLOWED, ROOT, violations


def test_imports_follow_the_arrows() -> None:
    assert violations() == []


def test_every_room_is_known() -> None:
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(ALLOWED)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("primitives", "import numpy"),
        ("primitives", "from dit_qat.layers import QuantLinear"),
        ("layers", "def f():\n    from dit_qat.dit.models import DiT"),
        ("layers", "from dit_qat import quantize_"),
        ("dit", "import dit_qat.llm.data"),
        ("export", "import dit_qat.cli.main"),
        ("dit", "from ..layers import QuantLinear"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, room: str, line: str) -> None:
    (tmp_path / room).mkdir()
    (tmp_path / room / "wrong.py").write_text(line)
    assert len(violations(tmp_path)) == 1


def test_importing_the_package_does_not_import_torch() -> None:
    check = "import sys, dit_qat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
