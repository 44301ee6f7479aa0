"""Every YAML in configs/ starts the run that it is for."""

import re
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import diffusers
import pytest
import pytorch_lightning as pl
import torch
import yaml

from dit_qat.cli import llm
from dit_qat.cli.llm_methods import method_of
from dit_qat.cli.ptq import METHODS, ptq
from dit_qat.cli.training import TrainingCLI, run_training
from dit_qat.cli.verbs import run_function
from dit_qat.dit.data import Latents
from dit_qat.dit.experiment import Recipe
from dit_qat.dit.methods import AMPN
from dit_qat.dit.models import dit_variant, load_dit
from dit_qat.dit.models.variants import VARIANT_SIZES
from dit_qat.dit.ptq.checks import check_method
from dit_qat.dit.ptq.job import PTQJob
from dit_qat.dit.ptq.settings import Patterns
from dit_qat.dit.ptq.subject import Subject
from dit_qat.layers import QuantLinear, quantize_

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS = sorted((CONFIGS / "digits").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "digits").glob("*_a[234].yaml"))
LATENTS = sorted([*CONFIGS.glob("imagenet/*.yaml"), *CONFIGS.glob("ffhq/*.yaml")])
PTQ = sorted((CONFIGS / "ptq").glob("*.yaml"))
LLM = sorted((CONFIGS / "llm").glob("*.yaml"))
PTQ_MODELS = {
    "digits": "DiT",
    "dit_xl2": "DiT",
    "pixart": "PixArtTransformer2DModel",
    "flux_dev": "FluxTransformer2DModel",
    "flux_schnell": "FluxTransformer2DModel",
    "z_image": "ZImageTransformer2DModel",
    "wan": "WanTransformer3DModel",
}

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
    assert sorted([*DIGITS, *LATENTS, *PTQ, *LLM]) == sorted(CONFIGS.rglob("*.yaml"))
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
        # Layers are scored once training at the full rates has had its say.
        assert model.optimizer_config.warmup_steps <= model.method.config.warmup_steps
        wanted = model.method.config.activation_bits  # of its warm-up
    assert {getattr(m, "config", None) and m.config.activation.bits for m in quantized} == {wanted}


@pytest.mark.parametrize("path", LATENTS, ids=name_of)
def test_config_says_what_it_costs_and_where_that_comes_from(path: Path) -> None:
    head = path.read_text().partition("seed_everything")[0]
    assert re.search(r"# Expects about \d+ GiB of GPU memory and \d+ h on one GPU", head)
    assert "tools/estimate_cost.py" in head


class _ParsedError(Exception):
    """Stops the command where it would load weights."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], PTQJob]:
    """Let ``dit-qat ptq`` read a file, and stop before it loads weights."""

    def run(path: Path) -> PTQJob:
        jobs: list[PTQJob] = []

        def record(job: PTQJob) -> None:
            jobs.append(job)
            raise _ParsedError

        monkeypatch.setattr("dit_qat.cli.ptq.prepare", record)
        arguments = ["--config", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]
        with pytest.raises(_ParsedError):
            run_function(ptq, "dit-qat ptq", arguments)
        return jobs[0]

    return run


@pytest.mark.parametrize("path", PTQ, ids=name_of)
def test_config_of_post_training_is_read(path: Path, parse: Callable[[Path], PTQJob]) -> None:
    job, content = parse(path), yaml.safe_load(path.read_text())
    method = next(name for name in METHODS if path.stem.startswith(f"{name}_"))
    assert job.method.name == method
    model = path.stem.removeprefix(f"{method}_")
    assert model in PTQ_MODELS
    # What the file says is what the class was given: no option of it was dropped.
    given = content["method"]["init_args"]
    assert {name: getattr(job.method.config, name) for name in given if name != "weights"} == {
        name: _as_config(value, getattr(job.method.config, name))
        for name, value in given.items()
        if name != "weights"
    }
    assert Path(content["out"]).name == path.stem
    is_pipeline = PTQ_MODELS[model] != "DiT"
    assert ("pipeline" in content) == is_pipeline == (job.calibration.prompts is not None)
    assert ("sampler" in content) != is_pipeline
    if is_pipeline and method == "adatsq":
        assert job.method.config.mode == "teacher_forced"


@pytest.mark.parametrize("path", PTQ, ids=name_of)
def test_config_of_post_training_fits_its_model(
    path: Path, parse: Callable[[Path], PTQJob]
) -> None:
    """On the meta device; diffusers' defaults are the published sizes."""
    job = parse(path)
    name = next(name for name in PTQ_MODELS if path.stem.endswith(f"_{name}"))
    with torch.device("meta"):
        if name == "digits":
            model: torch.nn.Module = load_dit("digits")
        elif name == "dit_xl2":
            model = dit_variant("DiT-XL/2", input_size=32)
        else:
            published = {"caption_channels": 4096} if name == "pixart" else {}
            model = getattr(diffusers, PTQ_MODELS[name])(**published)
    target = job.patterns.target(model)
    linears = target.linears()
    assert len(linears) >= 16
    assert not [n for n in linears if "embed" in n or "adaLN" in n or n.startswith("proj_out")]
    # Whatever the file skips, the defaults of the class skip as well.
    assert linears.keys() == Patterns().target(model).linears().keys()
    subject = Subject(job.model, model, None if job.calibration.prompts is None else object())
    steps = job.sampler.steps if subject.pipeline is None else job.pipeline.steps
    schedule = [float(step) for step in range(steps)]
    check_method(job.method, target, subject, schedule, job.calibration.steps)


@pytest.mark.parametrize("path", PTQ, ids=name_of)
def test_config_of_post_training_says_what_is_measured(path: Path) -> None:
    head = path.read_text().partition("model:")[0]
    measured = re.search(r"# Measured: trajectory error [\d.e-]+", head)
    assert bool(measured) == path.stem.endswith("_digits")
    said = " ".join(line.removeprefix("# ") for line in head.splitlines())
    assert bool(measured) != ("Nothing in this file is measured." in said)


def _as_config(value: Any, like: Any) -> Any:
    """A plain value as a configuration holds it."""
    if isinstance(like, tuple):
        return tuple(value)
    return type(like)(**value) if isinstance(value, dict) else value


@pytest.mark.parametrize("path", LLM, ids=name_of)
def test_config_of_a_language_model_is_read(path: Path) -> None:
    given: dict[str, Any] = {}

    @wraps(llm.quantize)
    def record(**options: Any) -> None:
        given.update(options)

    run_function(record, "dit-qat llm quantize", ["--config", str(path)])
    method = method_of(given["method"], given["settings"])
    assert path.stem.startswith(given["method"])
    assert given["windows"] == 128
    assert given["length"] in (None, 2048)
    assert Path(given["out"]) == Path("runs/llm") / path.stem
    for name, value in given["settings"].items():
        assert getattr(method.config, name) == value
