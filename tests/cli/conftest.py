from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_qat.cli.main import main

_NETWORK = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}
_CONFIG = {
    "model": {
        "network": {"class_path": "dit_qat.dit.models.DiT", "init_args": _NETWORK},
        "optimizer": {"warmup_steps": 2, "lr_float": 1e-3},
    },
    "data": {"class_path": "dit_qat.dit.data.Digits", "init_args": {"batch_size": 16}},
    "checkpoints": {"every_n_steps": 2},
    "trainer": {
        "max_steps": 6,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    },
}
_ROBUQ = (
    *("--model.method", "dit_qat.dit.methods.RobuQ"),
    *("--model.method.init_args.rank", "4"),
    *("--model.method.init_args.activation_bits", "3"),
    *("--model.method.init_args.distillation", "0"),  # there is no teacher
)


@pytest.fixture
def network() -> dict[str, Any]:
    """Arguments of a tiny DiT for digits."""
    return dict(_NETWORK)


@pytest.fixture
def tiny() -> dict[str, Any]:
    """What the file ``config`` holds; a copy to change."""
    return deepcopy(_CONFIG)


@pytest.fixture
def robuq() -> tuple[str, ...]:
    """Options that quantize the tiny network by RobuQ."""
    return _ROBUQ


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file for a tiny float network."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(_CONFIG))
    return path


@pytest.fixture(scope="session")
def float_run(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """The folder of a finished float run; tests must not write into it."""
    root = tmp_path_factory.mktemp("runs") / "float"
    assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(root)]) == 0
    return root


@pytest.fixture(scope="session")
def quantized_run(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """The folder of a finished RobuQ run; tests must not write into it."""
    root = tmp_path_factory.mktemp("runs") / "robuq"
    arguments = ["fit", "--config", str(config), "--trainer.default_root_dir", str(root), *_ROBUQ]
    assert main(arguments) == 0
    return root


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with exit code 2 and one message; return the message."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        _, _, message = capsys.readouterr().err.rpartition(f"dit-qat {arguments[0]}: error: ")
        assert message
        assert "Traceback" not in message
        return message

    return run


@pytest.fixture
def contents() -> Callable[[Path], dict[Path, bytes]]:
    """What tells a folder that was written to from one that was not."""

    def read(root: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    return read
