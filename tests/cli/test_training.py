import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.strategies import FSDPStrategy

from dit_qat import LayerConfig, Rule, quantize_
from dit_qat.cli.checkpoint import check_goes_on
from dit_qat.cli.main import main
from dit_qat.dit.data import Digits
from dit_qat.dit.models import DiT, save_dit
from dit_qat.dit.training.loading import load_checkpoint


def fit(config: Path, root: Path, *more: object, verb: str = "fit") -> int:
    arguments = [verb, "--config", config, "--trainer.default_root_dir", root, *more]
    return main([str(argument) for argument in arguments])


def validation_loss(path: Path, weights: str) -> float:
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    module = load_checkpoint(path, weights)
    return trainer.validate(module, Digits(), verbose=False)[0]["val/loss"]


def wait_for(path: Path, seconds: float = 600) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


class TestRuns:
    def test_what_a_run_leaves(self, float_run):
        assert (float_run / "checkpoints" / "last.ckpt").is_file()
        metrics = json.loads((float_run / "metrics.json").read_text())
        assert metrics["fit"]["step"] == 6
        assert metrics["fit"]["metrics"]["train/loss"] > 0
        saved = yaml.safe_load((float_run / "config.yaml").read_text())
        assert saved["model"]["network"]["init_args"]["hidden_size"] == 32

    def test_saved_configuration_repeats_the_run(self, float_run, tmp_path):
        assert fit(float_run / "config.yaml", tmp_path / "again") == 0
        first, second = (
            load_checkpoint(root / "checkpoints" / "last.ckpt").state_dict()
            for root in (float_run, tmp_path / "again")
        )
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_last_continues(self, config, tmp_path):
        short, whole = tmp_path / "short", tmp_path / "whole"
        # The learning rate's course depends on max_steps, so both runs must name the same.
        assert fit(config, whole, "--trainer.max_steps", 4) == 0
        assert fit(config, short, "--trainer.max_steps", 4, *_stop_after(2)) == 0
        assert fit(config, short, "--trainer.max_steps", 4, "--ckpt_path", "last") == 0
        first, second = (
            load_checkpoint(root / "checkpoints" / "last.ckpt").state_dict()
            for root in (whole, short)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_overwrite_starts_anew(self, config, tmp_path):
        stale = tmp_path / "samples" / "step_0000001.png"
        stale.parent.mkdir()
        stale.write_bytes(b"old")
        assert fit(config, tmp_path, "--trainer.max_steps", 1, "--overwrite") == 0
        assert not stale.exists()

    def test_ema_can_be_left_out(self, config, tmp_path):
        options = ("--trainer.max_steps", 1, "--ema.enabled", "false")
        assert fit(config, tmp_path, *options) == 0
        content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert "current_model_state" not in content

    @pytest.mark.parametrize(("given", "seed"), [("true", 0), ("false", 0), ("7", 7)])
    def test_seed(self, config, tmp_path, given, seed):
        assert fit(config, tmp_path, "--trainer.max_steps", 1, "--seed_everything", given) == 0
        assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt").seed == seed


class TestScores:
    @pytest.mark.parametrize("verb", ["validate", "test"])
    def test_ema_weights_are_scored(self, verb, float_run, tmp_path, capsys):
        path = float_run / "checkpoints" / "last.ckpt"
        config = float_run / "config.yaml"
        assert fit(config, tmp_path, "--ckpt_path", path, verb=verb) == 0
        stage = {"validate": "val", "test": "test"}[verb]
        assert f"{stage}/loss" in capsys.readouterr().out
        entry = json.loads((tmp_path / "metrics.json").read_text())[verb]
        assert (entry["checkpoint"], entry["step"]) == (str(path), 6)
        if verb == "validate":
            loss = entry["metrics"]["val/loss"]
            assert loss == pytest.approx(validation_loss(path, "ema"), rel=1e-6)
            assert loss != pytest.approx(validation_loss(path, "current"), rel=1e-4)

    def test_verbs_share_the_file(self, float_run, tmp_path):
        path, config = float_run / "checkpoints" / "last.ckpt", float_run / "config.yaml"
        for verb in ("validate", "test"):
            assert fit(config, tmp_path, "--ckpt_path", path, verb=verb) == 0
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert set(metrics) == {"validate", "test"}

    @pytest.mark.parametrize("content", ["{", '{"fd_digits": 1.0}'])
    def test_metrics_of_others_are_refused_before_the_work(
        self, content, float_run, tmp_path, refused, contents
    ):
        (tmp_path / "metrics.json").write_text(content)
        before = contents(tmp_path)
        options = ["--trainer.default_root_dir", tmp_path]
        options += ["--ckpt_path", float_run / "checkpoints" / "last.ckpt"]
        message = refused("test", "--config", float_run / "config.yaml", *options)
        assert "metrics.json" in message
        assert "move it away" in message
        assert contents(tmp_path) == before

    def test_another_seed_scores_on_other_noise(self, float_run, tmp_path):
        path, config = float_run / "checkpoints" / "last.ckpt", float_run / "config.yaml"
        options = ["--ckpt_path", path, "--seed_everything", 3]
        assert fit(config, tmp_path, *options, verb="validate") == 0
        own = json.loads((tmp_path / "metrics.json").read_text())["validate"]["metrics"]
        assert own["val/loss"] != pytest.approx(validation_loss(path, "ema"), rel=1e-6)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_leave_a_checkpoint_to_continue_from(self, number, config, tmp_path, capsys):
        path = tmp_path / "checkpoints" / "last.ckpt"
        before = signal.getsignal(number)

        def send() -> None:
            # Only while the run listens, so that a failing run does not end the tests as well.
            if wait_for(path) and signal.getsignal(number) is not before:
                os.kill(os.getpid(), number)

        sender = threading.Thread(target=send)
        sender.start()
        code = fit(config, tmp_path, "--trainer.max_steps", 100_000)
        sender.join()
        assert code == 128 + number
        said = capsys.readouterr().out
        assert f"stopped by {number.name}" in said
        assert "--ckpt_path last" in said
        step = torch.load(path, weights_only=True)["global_step"]
        assert f"at step {step};" in said
        assert fit(config, tmp_path, "--trainer.max_steps", step + 2, "--ckpt_path", "last") == 0
        assert torch.load(path, weights_only=True)["global_step"] == step + 2

    def test_killing_leaves_the_previous_checkpoint_whole(self, config, tmp_path):
        path = tmp_path / "checkpoints" / "last.ckpt"
        code = "import sys; from dit_qat.cli.main import main; sys.exit(main())"
        arguments = ["fit", "--config", config, "--trainer.default_root_dir", tmp_path]
        arguments += ["--trainer.max_steps", 100_000, "--checkpoints.every_n_steps", 1]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert wait_for(path)
            time.sleep(0.2)  # somewhere in the middle of a step, or of a checkpoint
        finally:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        step = torch.load(path, weights_only=True)["global_step"]
        assert step > 0
        assert fit(config, tmp_path, "--trainer.max_steps", step + 1, "--ckpt_path", "last") == 0


class TestRefusals:
    """Exit code 2 and a message that names value and cure; the folder stays as it is."""

    @pytest.fixture
    def full(self, tmp_path):
        """A folder that holds an earlier run's results."""
        for name in ("config.yaml", "checkpoints/last.ckpt"):
            path = tmp_path / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("precious")
        return tmp_path / "run"

    @pytest.fixture
    def refused_fit(self, refused, contents, config, full):
        def run(*more: object, config: Path = config, overwrite: bool = True) -> str:
            before = contents(full)
            options = ["--config", config, "--trainer.default_root_dir", full, *more]
            options += ["--overwrite", "true"] if overwrite else []
            message = refused("fit", *options)
            assert contents(full) == before
            return message

        return run

    def test_folder_with_results(self, refused_fit, full):
        message = refused_fit(overwrite=False)
        for part in (str(full), "config.yaml", "--ckpt_path last", "--overwrite true"):
            assert part in message

    @pytest.mark.parametrize(
        ("section", "key"), [("trainer", "max_stps"), ("model", "metod"), ("data", "batch_sizes")]
    )
    def test_wrong_key(self, refused_fit, tiny, tmp_path, section, key):
        target = tiny["data"]["init_args"] if section == "data" else tiny[section]
        target[key] = 3
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump(tiny))
        assert key in refused_fit(config=path)

    def test_missing_key(self, refused_fit, tiny, tmp_path):
        del tiny["data"]
        path = tmp_path / "incomplete.yaml"
        path.write_text(yaml.safe_dump(tiny))
        assert "data" in refused_fit(config=path)

    def test_missing_file(self, refused_fit, tmp_path):
        assert "nothing.yaml" in refused_fit(config=tmp_path / "nothing.yaml")

    def test_bits_that_do_not_exist(self, refused_fit, robuq):
        message = refused_fit(*robuq, "--model.method.init_args.activation_bits", 9)
        assert message.startswith("bits=9 is outside 1..8")

    def test_width_without_a_hadamard_order(self, refused_fit, robuq):
        message = refused_fit(*robuq, "--model.network.init_args.hidden_size", 92)
        for part in ("blocks.0.attn.qkv", "width=92", "88 and 96", "block_size=4"):
            assert part in message

    def test_unknown_layer_pattern(self, network):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qvk.*near names: blocks\.0\.attn"):
            quantize_(DiT(**network), [Rule("blocks.0.attn.qvk", LayerConfig())])

    def test_seed_out_of_range(self, refused_fit):
        assert "seed_everything=-3 is outside 0..4294967295" in refused_fit("--seed_everything=-3")

    def test_epochs_instead_of_steps(self, refused_fit):
        assert "trainer.max_steps" in refused_fit("--trainer.max_steps", -1)

    def test_no_checkpoint_to_continue(self, refused, config, tmp_path):
        options = ["--config", config, "--trainer.default_root_dir", tmp_path / "empty"]
        message = refused("fit", *options, "--ckpt_path", "last")
        assert "there is no checkpoint" in message
        assert str(tmp_path / "empty") in message
        assert not (tmp_path / "empty").exists()

    def test_checkpoint_of_another_size(self, refused_fit, float_run):
        path = float_run / "checkpoints" / "last.ckpt"
        before = path.read_bytes()
        options = ("--ckpt_path", path, "--model.network.init_args.hidden_size", 64)
        message = refused_fit(*options)
        assert "hidden_size=32 saved, 64 configured" in message
        assert "config.yaml" in message
        assert path.read_bytes() == before

    def test_checkpoint_of_another_method(self, refused_fit, quantized_run):
        message = refused_fit("--ckpt_path", quantized_run / "checkpoints" / "last.ckpt")
        assert "RobuQ saved, none configured" in message

    def test_checkpoint_of_another_seed(self, refused_fit, float_run):
        path = float_run / "checkpoints" / "last.ckpt"
        message = refused_fit("--ckpt_path", path, "--seed_everything", 5)
        assert "another seed than" in message
        assert "seed=0 saved, 5 configured" in message

    def test_checkpoint_of_other_float_layers(self, refused_fit, quantized_run, robuq):
        path = quantized_run / "checkpoints" / "last.ckpt"
        options = (*robuq, "--model.float_layers", '["blocks.0.*"]')
        message = refused_fit("--ckpt_path", path, *options)
        assert "float_layers=[] saved, ['blocks.0.*'] configured" in message

    def test_other_optimizer_settings_are_a_warning(self, config, float_run, tmp_path):
        path = float_run / "checkpoints" / "last.ckpt"
        options = ["--ckpt_path", path, "--trainer.max_steps", 7]
        with pytest.warns(UserWarning, match=r"lr_float=0\.001 saved, 0\.5 conf.*go on as saved"):
            assert fit(config, tmp_path, *options, "--model.optimizer.lr_float", 0.5) == 0

    def test_averaged_weights_without_their_callback(self, refused_fit, float_run):
        path = float_run / "checkpoints" / "last.ckpt"
        message = refused_fit("--ckpt_path", path, "--ema.enabled", "false")
        assert "holds averaged weights" in message
        assert "leave EMA enabled" in message

    def test_whole_optimizer_state_for_sharded_weights(self, config, tmp_path):
        options = ("--trainer.max_steps", 1, "--ema.enabled", "false")
        assert fit(config, tmp_path, *options) == 0

        class Trainer:
            strategy = FSDPStrategy.__new__(FSDPStrategy)
            callbacks = ()

        path = tmp_path / "checkpoints" / "last.ckpt"
        with pytest.raises(ValueError, match=r"did not shard its weights.*strategy=ddp"):
            check_goes_on(path, Trainer())
        content = torch.load(path, weights_only=True)
        state = content["optimizer_states"][0]["state"]
        content["optimizer_states"][0]["state"] = {n + 1: value for n, value in state.items()}
        torch.save(content, path)
        check_goes_on(path, Trainer())

    def test_foreign_checkpoint(self, refused_fit, tmp_path):
        path = tmp_path / "other.ckpt"
        content = {"global_step": 3, "state_dict": {}, "hyper_parameters": {"lr": 0.1}}
        torch.save(content, path)
        assert "is not a checkpoint of dit-qat fit" in refused_fit("--ckpt_path", path)

    def test_somebodys_metrics(self, refused, config, contents, tmp_path):
        (tmp_path / "metrics.json").write_text("precious")
        before = contents(tmp_path)
        message = refused("fit", "--config", config, "--trainer.default_root_dir", tmp_path)
        assert "already holds results (metrics.json)" in message
        assert contents(tmp_path) == before

    def test_damaged_checkpoint(self, refused_fit, float_run, tmp_path):
        path = tmp_path / "cut.ckpt"
        path.write_bytes((float_run / "checkpoints" / "last.ckpt").read_bytes()[:5000])
        message = refused_fit("--ckpt_path", path)
        assert str(path) in message
        assert "truncated" in message

    def test_checkpoint_of_another_run_does_not_open_a_full_folder(self, refused_fit, float_run):
        path = float_run / "checkpoints" / "last.ckpt"
        assert "already holds results" in refused_fit("--ckpt_path", path, overwrite=False)

    def test_weights_of_another_architecture(self, refused_fit, network, tmp_path):
        path = tmp_path / "deep.safetensors"
        save_dit(DiT(**{**network, "depth": 2}), path)
        message = refused_fit("--model.float_weights", path)
        assert "depth=2 in the file, 1 here" in message
        assert "set the network's arguments" in message

    def test_truncated_weights(self, refused_fit, network, tmp_path):
        path = tmp_path / "cut.safetensors"
        save_dit(DiT(**network), path)
        path.write_bytes(path.read_bytes()[:-1000])
        message = refused_fit("--model.float_weights", path)
        assert str(path) in message
        assert "truncated" in message

    def test_tampered_weights(self, refused_fit, network, tmp_path):
        path = tmp_path / "tampered.safetensors"
        save_dit(DiT(**network), path)
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        nan = b"\x00\x00\xc0\x7f"
        path.write_bytes(content[:header] + nan + content[header + 4 :])
        assert "sha256" in refused_fit("--model.float_weights", path)

    def test_diverging_loss(self, refused, config, tmp_path):
        options = ["--model.optimizer.lr_float", 1e30, "--model.optimizer.warmup_steps", 0]
        root = ["--trainer.default_root_dir", tmp_path / "run"]
        message = refused("fit", "--config", config, *root, *options)
        assert "the loss is" in message
        assert "learning rates" in message


def _stop_after(steps: int) -> tuple[object, ...]:
    """Options that end a run early without changing its schedule."""
    return ("--trainer.limit_train_batches", steps, "--trainer.max_epochs", 1)
