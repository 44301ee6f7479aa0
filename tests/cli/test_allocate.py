"""``dit-qat allocate``: bit maps of checkpoints, what takes them, and what is refused."""

import json
from pathlib import Path

import pytest

from dit_qat.cli.allocate import RESULTS
from dit_qat.cli.main import main
from dit_qat.dit.training.bit_maps import read_bit_map

SHORT = ("--images", "4", "--timesteps", "2")


@pytest.fixture
def checkpoint(quantized_run: Path) -> Path:
    return quantized_run / "checkpoints" / "last.ckpt"


def test_a_map_is_written_printed_and_taken_by_a_training_run(
    tmp_path: Path, checkpoint: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "map"
    bounds = '{"*.attn.proj": 4, "*.mlp.fc1": [1, 2]}'
    given = ["--average_bits", "2.2", "--choices", "1", "2", "4", "--bounds", bounds, *SHORT]
    assert main(["allocate", "--checkpoint", str(checkpoint), "--out", str(out), *given]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir() if path.name != ".lock"} == set(RESULTS)
    found = read_bit_map(out / "bit_map.json")
    assert found.average_bits <= found.average_asked == 2.2
    assert found.by_layer["blocks.0.attn.proj"] == 4
    assert found.by_layer["blocks.0.mlp.fc1"] <= 2
    assert set(found.bits) <= {1, 2, 4}
    assert found.step == 6
    assert "4 layers at 3 bit-widths: " in printed
    for kind in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"):
        assert f"{kind}" in printed
    assert f"{found.average_bits:.4f} bits on average" in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["average_bits"] == found.average_bits
    assert metrics["mean_by_type"] == found.mean_by_type
    root = tmp_path / "run"
    method = {"rank": 4, "average_bits": 2.2, "distillation": 0, "bit_map": f"{out}/bit_map.json"}
    options = ["--config", str(config), "--trainer.default_root_dir", str(root)]
    options += ["--trainer.max_steps", "2", "--model.method", "dit_qat.dit.methods.AMPN"]
    for name, value in method.items():
        options += [f"--model.method.init_args.{name}", str(value)]
    assert main(["fit", *options]) == 0
    (out / "bit_map.json").unlink()  # the path is read on a fresh start only
    options += ["--trainer.max_steps", "3", "--ckpt_path", "last"]
    assert main(["fit", *options]) == 0
    capsys.readouterr()
    assert main(["inspect", "--checkpoint", str(root / "checkpoints" / "last.ckpt")]) == 0
    assert f"{found.average_bits:.3f} (by multiply-adds" in capsys.readouterr().out


def test_the_same_checkpoint_gives_the_same_map(tmp_path: Path, checkpoint: Path) -> None:
    maps = []
    for name in ("one", "two"):
        given = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / name), *SHORT]
        assert main(["allocate", *given, "--score", "local_gradient"]) == 0
        maps.append((tmp_path / name / "bit_map.json").read_bytes())
    assert maps[0] == maps[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--average_bits", 0.5), "average_bits=0.5 is outside 1..4"),
        (("--average_bits", 1.2, "--bounds", '{"*": 2}'), "averages from 2 to 2"),
        (("--bounds", '{"*.atn.*": 2}'), "'*.atn.*' matches no layer; near names: blocks.0.attn"),
        (("--choices", 1, 12), "choices=(1, 12)"),
        (("--timesteps", 0), "score_timesteps=0 must be a whole number, at least 1"),
        (("--timesteps", 1001), "score_timesteps=1001 is beyond"),
        (("--bounds", '{"*": [5, 8]}'), "'*' asks for 5 to 8 bits, but the choices are 1, 2, 3, 4"),
        (("--reference", "digits", "--data", "nowhere"), "nowhere"),
        (("--data", "nowhere"), "nowhere"),
        (("--device", "gpu"), "gpu is no device"),
        (("--score", "hessian"), "hessian"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    tmp_path: Path, checkpoint: Path, refused, options, named: str
) -> None:
    out = tmp_path / "map"
    assert named in refused("allocate", "--checkpoint", checkpoint, "--out", out, *options)
    assert not out.exists()


def test_a_float_checkpoint_has_no_bits_to_allocate(
    tmp_path: Path, float_run: Path, refused
) -> None:
    checkpoint = float_run / "checkpoints" / "last.ckpt"
    message = refused("allocate", "--checkpoint", checkpoint, "--out", tmp_path / "map")
    assert "matches no quantized linear layer" in message


def test_results_are_not_overwritten(tmp_path: Path, checkpoint: Path, refused, contents) -> None:
    out = tmp_path / "map"
    given = ["--checkpoint", str(checkpoint), "--out", str(out), *SHORT]
    assert main(["allocate", *given]) == 0
    before = contents(out)
    assert "--overwrite" in refused("allocate", *given)
    assert contents(out) == before
    assert main(["allocate", *given, "--overwrite", "--score", "local_gradient"]) == 0
    assert read_bit_map(out / "bit_map.json").score == "local_gradient"
