"""Rebuild the shipped digits assets: the float DiT and the digit classifier.

Both are bit for bit the same on the same machine and torch version (one thread, seeded draws).
The DiT is the EMA network of ``dit-qat fit --config configs/digits/float.yaml``.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from dit_qat.cli.training import run_training
from dit_qat.dit.evaluation import train_digit_classifier
from dit_qat.dit.models import save_dit
from dit_qat.dit.training import last_checkpoint
from dit_qat.dit.training.loading import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def build_classifier(out: Path) -> Path:
    path = out / "digits_classifier.safetensors"
    save_file(train_digit_classifier().state_dict(), path)
    path.chmod(0o644)  # safetensors makes files that only their owner reads
    return path


def build_dit(out: Path, run: Path) -> Path:
    config = ROOT / "configs" / "digits" / "float.yaml"
    code = run_training(
        ["fit", "--config", str(config), "--trainer.default_root_dir", str(run)]
        + (["--ckpt_path", "last"] if last_checkpoint(run).exists() else [])
    )
    if code:
        raise SystemExit(code)
    path = out / "digits_dit.safetensors"
    save_dit(load_checkpoint(last_checkpoint(run)).network, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dit_qat" / "dit" / "assets")
    parser.add_argument("--run", type=Path, default=Path("runs/digits_float"))
    parser.add_argument("--only", choices=["classifier", "dit"])
    arguments = parser.parse_args()
    # The order of floating-point sums depends on the number of threads.
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    built = []
    if arguments.only != "dit":
        built.append(build_classifier(arguments.out))
    if arguments.only != "classifier":
        built.append(build_dit(arguments.out, arguments.run))
    for path in built:
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}")


if __name__ == "__main__":
    main()
