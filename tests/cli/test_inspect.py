import json
from math import log2

import pytest
from diffusers import DiTTransformer2DModel

from dit_qat import load_quantized
from dit_qat.cli.main import main
from dit_qat.dit.models import DiT
from dit_qat.dit.training.loading import load_checkpoint
from dit_qat.export import describe, write_packed
from dit_qat.layers import InputTransform, IntLinear, Rotate, StepBits, TokenQuantizer
from dit_qat.llm.models import shipped_model
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest


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


def test_a_source_needs_no_option(quantized_run, tmp_path, capsys, refused):
    out, printed = tmp_path / "inspect.json", []
    for source in (quantized_run, quantized_run / "checkpoints" / "last.ckpt"):
        assert main(["inspect", "--out", str(out), "--overwrite", "true", str(source)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "fake-quantized" in printed[0]
    assert main(["inspect", "digits"]) == 0
    assert "float" in capsys.readouterr().out
    assert "name one source" in refused("inspect", "digits", "--weights", "digits")
    assert "no checkpoint" in refused("inspect", tmp_path / "x.ckpt")


def test_a_float_language_model(tmp_path, capsys):
    out = tmp_path / "inspect.json"
    assert main(["inspect", str(shipped_model()), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "nothing is quantized" in printed
    assert "packed size" not in printed
    content = json.loads(out.read_text())
    files = sum(path.stat().st_size for path in shipped_model().glob("*.safetensors"))
    assert content["measured"]["disk_bytes"] == files
    assert content["weight_bits"] == 8 * content["measured"]["resident_bytes"] // sum(
        layer["numbers"] for layer in content["measured"]["layers"].values()
    )


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


def _rounded(linear, bits, **settings):
    codes, scales = round_to_nearest(linear.weight.detach(), IntegerGrid(bits))
    made = {"grid": IntegerGrid(bits), "codes": codes, "scales": scales, **settings}
    return IntLinear.build(linear, activation=TokenQuantizer(4), **made)


def test_integer_weights_with_bits_by_timestep(network, tmp_path, capsys):
    model, out = DiT(**network), tmp_path / "inspect.json"
    policy = StepBits((999.0, 500.0, 0.0), (8, 4, 3))
    model.blocks[0].mlp.fc1 = _rounded(model.blocks[0].mlp.fc1, 3, step_bits=policy)
    rotate = InputTransform(32, [Rotate(Rotation(32, 1))])
    model.blocks[0].attn.qkv = _rounded(model.blocks[0].attn.qkv, 4, transform=rotate)
    write_packed(model, tmp_path / "m")
    assert main(["inspect", "--weights", str(tmp_path / "m"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for part in ("5.00 by step", "32 signs", "3-bit codes", "4-bit codes", "in 1 of them"):
        assert part in printed
    content = json.loads(out.read_text())
    assert content["mean_activation_bits"] == 4.5
    # 32 x 128 multiply-adds by the policy, 32 x 96 at 4 bits.
    assert content["average_activation_bits"] == pytest.approx((5 * 128 + 4 * 96) / 224)
    assert content["weight_bits"] == pytest.approx((3 * 128 + 4 * 96) / 224)
    scales = 16 * (128 + 96) / (32 * 224)
    measured = content["measured"]["effective_weight_bits_disk"]
    assert measured == pytest.approx(content["weight_bits"] + scales)


def test_a_transformer_of_diffusers(tmp_path, capsys):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1}
    model = DiTTransformer2DModel(**sizes, sample_size=8, num_embeds_ada_norm=10)
    feed = model.transformer_blocks[0].ff.net
    feed[2] = _rounded(feed[2], 4)
    write_packed(model, tmp_path / "m")
    assert main(["inspect", "--weights", str(tmp_path / "m")]) == 0
    printed = capsys.readouterr().out
    assert "transformer_blocks.0.ff.net.2" in printed
    assert "packed weights" in printed
