import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from dit_qat import load_quantized
from dit_qat.cli.main import main
from dit_qat.cli.ptq import METHODS, MethodName
from dit_qat.dit.evaluation import load_images
from dit_qat.dit.methods import RTN
from dit_qat.dit.models import DiT, save_dit

Refused = Callable[..., str]
Contents = Callable[[Path], dict[Path, bytes]]

QUICK = (
    *("--calibration.images", "4", "--sampler.steps", "4", "--sampler.batch_size", "4"),
    *("--evaluation.images", "2", "--device", "cpu"),
)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float DiT of digits, no weight of it zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(
            input_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_dit(model, path)
    return path


def command(weights: Path, out: Path, *more: str, method: str = "rtn") -> list[str]:
    return ["ptq", "--model", str(weights), "--method", method, "--out", str(out), *QUICK, *more]


@pytest.fixture(scope="session")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run: its folder, and what it printed."""
    out, printed = tmp_path_factory.mktemp("runs") / "rtn", io.StringIO()
    with redirect_stdout(printed):
        assert main(command(weights, out)) == 0
    return out, printed.getvalue()


@pytest.fixture
def finished(run: tuple[Path, str]) -> Path:
    """The folder; tests must not write into it."""
    return run[0]


@pytest.fixture
def said(run: tuple[Path, str]) -> str:
    """What was printed."""
    return run[1]


def test_the_folder_holds_model_metrics_report_and_pictures(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "config.json",
        "layers.png",
        "metrics.json",
        "model.safetensors",
        "report.html",
        "samples.png",
        "timesteps.png",
    ]
    assert [path.name for path in finished.parent.iterdir()] == ["rtn"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["method"] == {
        "name": "rtn",
        "weight_bits": 4,
        "activation_bits": 4,
        "weight_symmetric": True,
        "activation_symmetric": True,
    }
    assert metrics["trajectory_error"] > 0
    assert len(metrics["output_error_by_timestep"]) == len(metrics["timesteps"]) == 4
    assert len(metrics["layer_errors"]) == len(metrics["layers"]) == 8
    assert (metrics["weight_bits"], metrics["activation_bits"]) == (4, 4)
    assert metrics["effective_weight_bits"] > 4
    assert metrics["packed"]["bytes"] < metrics["packed"]["float_bytes"]


def test_what_is_written_draws(finished: Path, tmp_path: Path) -> None:
    model = load_quantized(finished)
    assert isinstance(model, DiT)
    out = tmp_path / "drawn"
    arguments = ["sample", "--weights", str(finished), "--out", str(out), "--num", "4"]
    assert main([*arguments, "--sampler.steps", "2", "--device", "cpu"]) == 0
    assert load_images(out / "images").shape == (4, 1, 8, 8)


def test_it_says_beforehand_what_it_will_do(said: str) -> None:
    assert "calibrating on 4 images at 4 of 4 steps" in said
    assert "8 linears" in said
    assert "4 calls of 16 rows in all, 256 tokens per layer" in said
    assert "at most (calls" in said  # peak memory
    order = [said.index(part) for part in ("8 linears", "at most", "packing", "trajectory error")]
    assert order == sorted(order)


def test_a_file_says_the_same_as_the_command_line(
    weights: Path, finished: Path, tmp_path: Path
) -> None:
    method = {"class_path": "dit_qat.dit.methods.RTN", "init_args": {"weight_bits": 4}}
    content = {
        "model": str(weights),
        "method": method,
        "calibration": {"images": 4},
        "sampler": {"steps": 4, "batch_size": 4},
        "evaluation": {"images": 2},
        "out": str(tmp_path / "out"),
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    assert main(["ptq", "--config", str(config), "--device", "cpu"]) == 0
    found = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert found == (finished / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_with_the_blocks_that_are_left(
    weights: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, blocks = tmp_path / "out", []
    inner = RTN.quantize_block

    def killed(self: RTN, view: Any) -> Any:
        blocks.append(view.name)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return inner(self, view)

    monkeypatch.setattr(RTN, "quantize_block", killed)
    arguments = command(weights, out, "--calibration.on_disk", "true")
    assert main(arguments) == 130
    assert not out.exists()
    assert main(arguments) == 0
    assert blocks == ["blocks.0", "blocks.1", "blocks.1"]
    assert "going on with 4 calls recorded before" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["resumed"]
    found, wanted = (load_quantized(folder).state_dict() for folder in (out, finished))
    assert all(torch.equal(v, wanted[k]) for k, v in found.items() if torch.is_tensor(v))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_run_left_half_done_is_not_gone_on_with(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    inner = RTN.quantize_block

    def killed(self: RTN, view: Any) -> Any:
        if view.index == 1:
            raise KeyboardInterrupt
        return inner(self, view)

    with monkeypatch.context() as patched:
        patched.setattr(RTN, "quantize_block", killed)
        assert main(command(weights, tmp_path / "out")) == 130
    other = command(weights, tmp_path / "out", "--seed", "1")
    assert "a run of other settings" in refused(*other)
    assert main([*other, "--overwrite", "true"]) == 0


def test_settings_may_change_while_nothing_is_finished(
    weights: Path, tmp_path: Path, refused: Refused
) -> None:
    arguments = command(weights, tmp_path / "out")
    assert "above the limit" in refused(*arguments, "--memory_gb", "1e-6")
    assert main([*arguments, "--evaluation.images", "1"]) == 0


def test_results_are_replaced_only_if_asked(
    weights: Path, finished: Path, refused: Refused, contents: Contents, tmp_path: Path
) -> None:
    before = contents(finished)
    assert "already holds results" in refused(*command(weights, finished))
    assert contents(finished) == before
    (tmp_path / "mine.txt").write_text("mine")
    assert "holds other files (mine.txt)" in refused(*command(weights, tmp_path))


def test_every_method_has_a_name() -> None:
    assert sorted(METHODS) == sorted(get_args(MethodName))
    for name, method in METHODS.items():
        assert method().name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "rnt"), "rtn"),
        (("--model", "nowhere.safetensors"), "no such file"),
        (("--calibration.images", "0"), "at least 1"),
        (("--calibration.classes", "[3,12]"), "class 12 for calibration: this DiT has classes 0"),
        (("--calibration.classes", "[]"), "empty list"),
        (("--calibration.prompts", "prompts.txt"), "there is no file of prompts"),
        (("--calibration.steps", "9"), "the sampler makes 4"),
        (("--calibration.steps", "[1,7]"), "the sampler makes steps 0 to 3"),
        (("--pipeline.steps", "3"), "not a pipeline"),
        (("--sampler.kind", "dpm_solver++"), "remembers earlier steps"),
        (("--sampler.seed", "3"), "give --seed"),
        (("--patterns.quantize", '["blocks.*.attn.qvk"]'), "near names: blocks.1.attn.qkv"),
        (("--patterns.skip", '["*"]'), "skip every linear layer"),
        (("--patterns.blocks", '["block.*"]'), "near names: blocks"),
        (("--memory_gb", "1e-6"), "above the limit"),
        (("--memory_gb", "-1"), "must be above 0"),
        (("--evaluation.prompts", "a.txt"), "there is no file of prompts"),
        (("--evaluation.samples", "2"), "at least 4"),
        (("--method", "RTN", "--method.weight_bits", "5"), "are not among (2, 3, 4, 8)"),
        (("--method", "AdaTSQ", "--method.average_bits", "2.5"), "3"),
        (
            ("--method", "AdaTSQ", "--method.mode", "teacher_forced", "--calibration.steps", "[0]"),
            "would not cover the schedule",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    weights: Path, tmp_path: Path, refused: Refused, options: tuple[str, ...], message: str
) -> None:
    assert message in refused(*command(weights, tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_a_class_conditional_model_takes_no_prompts(
    weights: Path, tmp_path: Path, refused: Refused
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat")
    arguments = command(weights, tmp_path / "out")
    assert "draws classes, not prompts" in refused(
        *arguments, "--calibration.prompts", str(prompts)
    )
    assert "--evaluation.prompts is for pipelines" in refused(
        *arguments, "--evaluation.prompts", str(prompts)
    )


def test_a_width_without_a_rotation_is_refused_before_the_run(
    tmp_path: Path, refused: Refused
) -> None:
    sizes = {"hidden_size": 44, "depth": 1, "num_heads": 1, "mlp_ratio": 2.25}
    model = DiT(8, in_channels=1, num_classes=10, **sizes)
    save_dit(model, tmp_path / "odd.safetensors")
    for method in ("quarot", "clq", "vidit_q"):
        said = refused(*command(tmp_path / "odd.safetensors", tmp_path / "out", method=method))
        assert "99 inputs" in said
        assert not list(tmp_path.glob(".out*"))


def test_a_pipeline_without_a_transformer_is_refused_by_its_index(
    tmp_path: Path, refused: Refused
) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "U"],
        "vae": ["d", "v"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    said = refused(*command(tmp_path, tmp_path / "out"))
    assert "StableDiffusionPipeline without a transformer (its parts: unet, vae)" in said


def test_a_transformer_of_texts_alone_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    said = refused(*command(tmp_path, tmp_path / "out"))
    assert "give the folder of its pipeline" in said


def test_a_checkpoint_gives_its_averaged_float_weights(
    float_run: Path, quantized_run: Path, tmp_path: Path, refused: Refused
) -> None:
    last = "checkpoints/last.ckpt"
    assert main(command(float_run / last, tmp_path / "out")) == 0
    assert "is quantized already" in refused(*command(quantized_run / last, tmp_path / "other"))


def test_a_policy_is_written_and_followed(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick = ["--method.search_images", "1", "--method.final_images", "1", "--method.beam", "1"]
    quick += ["--method.weights.grid_steps", "1", "--method.weights.iterations", "1"]
    average = ["--method.average_bits", "4.2"]
    assert main(command(weights, out, *quick, *average, method="AdaTSQ")) == 0
    policy = json.loads((out / "policy.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    assert policy["average_bits"] == pytest.approx(metrics["activation_bits"])
    assert metrics["activation_bits"] <= 4.2
    assert len(policy["bits"]) == 4
    assert (out / "policy.png").read_bytes().startswith(b"\x89PNG")
    arguments = ["sample", "--weights", str(out), "--out", str(tmp_path / "drawn"), "--num", "2"]
    assert main([*arguments, "--sampler.steps", "7", "--device", "cpu"]) == 0
