"""Two processes deal the layers out, and end with one map."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from dit_qat.dit.evaluation.sensitivity import quantized_linears
from dit_qat.dit.training import last_checkpoint
from dit_qat.dit.training.bit_maps import read_bit_map
from dit_qat.dit.training.loading import load_checkpoint, read_checkpoint

NETWORK = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}
AMPN = {"rank": 2, "warmup_steps": 2, "score_images": 4, "score_timesteps": 2, "distillation": 0}
CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "model": {
        "network": {"class_path": "dit_qat.dit.models.DiT", "init_args": NETWORK},
        "method": {"class_path": "dit_qat.dit.methods.AMPN", "init_args": AMPN},
        "optimizer": {"warmup_steps": 2},
    },
    "data": {"class_path": "dit_qat.dit.data.Digits", "init_args": {"batch_size": 16}},
    "trainer": {
        "max_steps": 4,
        "accelerator": "cpu",
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    },
}


FAILING = """
import os
from dit_qat.dit.models import DiT

class Failing(DiT):
    def forward(self, x, t, y=None):
        if not self.training and os.environ.get("LOCAL_RANK") == os.environ["RANK_THAT_FAILS"]:
            raise ValueError("no room")
        return super().forward(x, t, y)
"""


def fit(config: dict[str, Any], folder: Path, **environment: str) -> Any:
    """Train on two processes, in ``folder / "run"``."""
    given = folder / "given.yaml"
    given.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dit_qat", "fit", "--config", str(given)]
    command += [f"--trainer.default_root_dir={folder / 'run'}", "--trainer.devices=2"]
    return subprocess.run(
        [*command, "--trainer.strategy=ddp"],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_what_one_process_fails_at_all_of_them_report(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    config = deepcopy(CONFIG)
    config["model"]["network"]["class_path"] = "failing.Failing"
    done = fit(config, tmp_path, PYTHONPATH=str(tmp_path), RANK_THAT_FAILS="1")
    assert done.returncode == 2
    assert "error: process 1 failed: no room" in done.stderr
    root = tmp_path / "run"
    assert not (root / "bit_map.json").exists()
    assert read_checkpoint(last_checkpoint(root))["global_step"] == 2  # the warm-up is not lost
    done = fit(
        config | {"ckpt_path": "last"}, tmp_path, PYTHONPATH=str(tmp_path), RANK_THAT_FAILS="none"
    )
    assert done.returncode == 0, done.stderr
    assert read_bit_map(root / "bit_map.json").step == 2


def test_two_processes_deal_the_layers_out_and_end_with_one_map(tmp_path: Path) -> None:
    root = tmp_path / "run"
    done = fit(CONFIG, tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_bit_map(root / "bit_map.json")
    assert found.average_bits <= 2
    assert all(one > four for one, _, _, four in found.scores)  # none left out, none made up
    assert not list(root.glob(".scores.*"))
    network = load_checkpoint(last_checkpoint(root)).network
    bits = {n: m.config.activation for n, m in quantized_linears(network).items()}
    assert {n: q.bits for n, q in bits.items() if q is not None} == found.by_layer
