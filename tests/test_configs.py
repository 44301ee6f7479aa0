"""Every YAML in configs/ starts the run that it is for."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from dit_qat.cli.training import TrainingCLI, run_training
from dit_qat.dit.data import Latents
from dit_qat.dit.experiment import Recipe
from dit_qat.dit.methods import AMPN
from dit_qat.dit.models.variants import VARIANT_SIZES
from dit_qat.layers import QuantLinear, quantize_

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS = sorted((CONFIGS / "digits").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "digits").glob("*_a[234].yaml"))
LATENTS = sorted([*CONFIGS.glob("imagenet/*.yaml"), *CONFIGS.glob("ffhq/*.yaml")])

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


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_every_config_is_tested() -> None:
    assert sorted([*DIGITS, *LATENTS]) == sorted(CONFIGS.rglob("*.yaml"))
    assert len(RECIPES) >= 5
    assert len(LATENTS) >= 11


@pytest.mark.parametrize("path", DIGITS, ids=name_of)
def test_config_starts(path: Path, start: Callable[[Path], Started]) -> None:
    trainer, model, data = start(path)
    assert isinstance(data, pl.LightningDataModule)
    assert trainer.max_steps > 0
    quantized = [m for m in model.network.modules() if isinstance(m, QuantLinear)]
    content = yaml.safe_load(path.read_text())
    assert bool(quantized) == bool(content["model"].get("method"))
    if path in RECIPES:
        recipe = Recipe()
        assert trainer.max_steps == recipe.steps
        assert data.batch_size == recipe.batch_size
        assert model.optimizer_config == recipe.optimizer
        assert content["ema"]["decay"] == recipe.ema_decay


@pytest.mark.parametrize("path", LATENTS, ids=name_of)
def test_config_on_latents_starts(
    path: Path, start: Callable[[Path], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the meta device, and without the weights: a DiT-XL/2 has 2.7 GB.
    monkeypatch.setattr("dit_qat.dit.training.module.load_weights_", lambda model, source: None)
    monkeypatch.setattr(
        "dit_qat.dit.training.module.quantize_", partial(quantize_, initialize=False)
    )
    with torch.device("meta"):
        trainer, model, data = start(path)
    content = yaml.safe_load(path.read_text())
    assert trainer.default_root_dir != content["trainer"]["default_root_dir"]
    assert trainer.max_steps == content["trainer"]["max_steps"]
    assert isinstance(data, Latents)
    assert data.batch_size % 8 == 0  # eight GPUs
    size = re.match("dit_(xl|b|s)2_", path.name)
    assert size
    widths = VARIANT_SIZES[size[1].upper()]
    assert {name: model.network.config[name] for name in widths} == widths
    assert model.network.num_classes == (0 if path.parent.name == "ffhq" else 1000)
    bits = re.search(r"_a(\d)\.yaml", path.name)
    quantized = [m for n, m in model.network.named_modules() if n.endswith("attn.qkv")]
    wanted = int(bits[1]) if bits else None
    if isinstance(model.method, AMPN):
        assert model.method.config.average_bits == wanted
        wanted = model.method.config.activation_bits  # of its warm-up
    assert {getattr(m, "config", None) and m.config.activation.bits for m in quantized} == {wanted}


@pytest.mark.parametrize("path", LATENTS, ids=name_of)
def test_config_says_what_it_costs_and_where_that_comes_from(path: Path) -> None:
    head = path.read_text().partition("seed_everything")[0]
    assert re.search(r"# Expects about \d+ GiB of GPU memory and \d+ h on one GPU", head)
    assert "tools/estimate_cost.py" in head
