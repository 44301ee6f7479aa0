import json
from math import log2

import pytest

from dit_qat import load_quantized
from dit_qat.cli.main import main
from dit_qat.dit.training.loading import load_checkpoint
from dit_qat.export import describe


def test_quantized_checkpoint(quantized_run, tmp_path, capsys):
    path, out = quantized_run / "checkpoints" / "last.ckpt", tmp_path / "inspect.json"
    assert main(["inspect", "--checkpoint", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for part in ("blocks.0.attn.qkv", "32 signs", "float32 latents", "simulated", "fake-quantized"):
        assert part in printed
    content = json.loads(out.read_text())
    expected = describe(load_checkpoint(path, "ema").network)
    assert content["effective_weight_bits"] == pytest.approx(expected.effective_weight_bits)
    assert f"{expected.effective_weight_bits:.3f}" in printed
    assert content["average_activation_bits"] == 3.0
    assert content["per_image_activation_bits"] == 4.0
    assert content["attention_bits"] == {"blocks.0.attn": 8}
    by_name = {layer["name"]: layer for layer in content["layers"]}
    qkv = by_name["blocks.0.attn.qkv"]
    # 96 x 32 codes, 96 scales and a branch of rank 4.
    assert qkv["effective_weight_bits"] == pytest.approx(log2(3) + 32 * (96 + 4 * 128) / 3072)
    assert by_name["final_layer.linear"]["kind"] == "Linear"


def test_float_weights(capsys):
    assert main(["inspect", "--weights", "digits"]) == 0
    printed = capsys.readouterr().out
    assert "nothing is quantized" in printed
    assert "simulated" not in printed


def test_existing_files_stay(refused, tmp_path):
    out = tmp_path / "inspect.json"
    out.write_text("precious")
    message = refused("inspect", "--weights", "digits", "--out", out)
    assert str(out) in message
    assert "--overwrite true" in message
    assert out.read_text() == "precious"
    assert "is a folder" in refused("inspect", "--weights", "digits", "--out", tmp_path)
    assert main(["inspect", "--weights", "digits", "--out", str(out), "--overwrite"]) == 0
    assert json.loads(out.read_text())["weight_bits"] == 32


def test_packed_folder(quantized_run, tmp_path, capsys):
    checkpoint = str(quantized_run / "checkpoints" / "last.ckpt")
    folder, out = tmp_path / "packed", tmp_path / "inspect.json"
    assert main(["export", "--checkpoint", checkpoint, "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["inspect", "--weights", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for part in ("ternary codes", "low-rank branches (adaLN)", "float: x_embedder", "config.json"):
        assert part in printed
    assert "packed weights" in printed
    assert "simulated" not in printed
    content = json.loads(out.read_text())
    measured = content["measured"]
    files = [folder / name for name in ("config.json", "model.safetensors")]
    assert measured["disk_bytes"] == sum(path.stat().st_size for path in files)
    model = load_quantized(folder)
    loaded = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    sums = measured["parts"]["sums over rows of codes"]
    adaln = measured["parts"]["sums over rows of codes (adaLN)"]
    assert measured["resident_bytes"] == loaded + sums["resident"] + adaln["resident"]
    # 96 rows of 32 codes in 7 bytes, 96 scales and a branch of rank 4; in memory 8 bytes.
    qkv = measured["layers"]["blocks.0.attn.qkv"]
    assert qkv["disk"] == 96 * 7 + 4 * (96 + 4 * 128 + 96)
    assert qkv["resident"] == 96 * 8 + 4 * (96 + 4 * 128 + 96 + 96)
    assert measured["effective_weight_bits_disk"] < measured["effective_weight_bits_resident"]
    assert content["weight_bits"] == pytest.approx(log2(3))
    assert content["attention_bits"] == {"blocks.0.attn": 8}


def test_the_file_of_a_checkpoint_is_measured(quantized_run, tmp_path):
    path, out = quantized_run / "checkpoints" / "last.ckpt", tmp_path / "inspect.json"
    assert main(["inspect", "--checkpoint", str(path), "--out", str(out)]) == 0
    measured = json.loads(out.read_text())["measured"]
    assert measured["disk_bytes"] == path.stat().st_size
    network = load_checkpoint(path, "ema").network
    stored = sum(p.nbytes for p in network.parameters())
    assert measured["resident_bytes"] == stored
    assert sum(part["disk"] for part in measured["parts"].values()) == stored
