import json
from math import log2

import pytest

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
