"""Every YAML in configs/ starts the run that it is for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml

from dit_qat.cli.training import TrainingCLI, run_training
from dit_qat.dit.experiment import Recipe
from dit_qat.layers import QuantLinear

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
DIGITS = sorted((CONFIGS / "digits").glob("*_a[234].yaml"))

Started = tuple[pl.Trainer, Any, Any]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], Started]:
    """Let ``dit-qat fit`` build everything, and stop where training would begin."""

    def run(path: Path) -> Started:
        started: list[Started] = []

        def record(cli: TrainingCLI, subcommand: str) -> None:
            assert subcommand == "fit"
            started.append((cli.trainer, cli.model, cli.datamodule))

        monkeypatch.setattr(TrainingCLI, "_run_subcommand", record)
        root = str(tmp_path / "run")
        assert run_training(["fit", "--config", str(path), "--trainer.default_root_dir", root]) == 0
        return started[0]

    return run


def test_there_are_configs() -> None:
    assert len(FILES) >= 5
    assert len(DIGITS) >= 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_starts(path: Path, start: Callable[[Path], Started]) -> None:
    trainer, model, data = start(path)
    assert isinstance(data, pl.LightningDataModule)
    assert trainer.max_steps > 0
    quantized = [m for m in model.network.modules() if isinstance(m, QuantLinear)]
    content = yaml.safe_load(path.read_text())
    assert bool(quantized) == bool(content["model"].get("method"))
    if path in DIGITS:
        recipe = Recipe()
        assert trainer.max_steps == recipe.steps
        assert data.batch_size == recipe.batch_size
        assert model.optimizer_config == recipe.optimizer
        assert content["ema"]["decay"] == recipe.ema_decay
