import json

import torch

from dit_qat.cli.main import main
from dit_qat.dit.models import DiT, load_dit, save_dit
from dit_qat.dit.training.loading import load_checkpoint


def saved(path, **overrides):
    torch.manual_seed(0)
    sizes = {"input_size": 4, "in_channels": 2, "hidden_size": 64, "depth": 1, "num_heads": 1}
    model = DiT(**(sizes | {"num_classes": 3} | overrides))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_dit(model, path)
    return path


def run(source, out, format, *options):
    arguments = ["--source", source, "--out", out, "--format", format, *options]
    return main(["convert", *map(str, arguments)])


def test_a_file_with_a_record_beside_it(tmp_path, capsys):
    source, out = saved(tmp_path / "ours.safetensors"), tmp_path / "DiT.pt"
    assert run(source, out, "published") == 0
    printed = capsys.readouterr().out
    for part in (str(source), "format published", str(out), "relative difference", "written"):
        assert part in printed
    record = json.loads((tmp_path / "DiT.pt.json").read_text())
    assert record["format"] == "published"
    assert record["differences"]["written"]["overall"] <= 1e-5
    assert record["versions"].keys() >= {"dit-qat", "torch", "diffusers"}
    assert load_dit(out).config == load_dit(source).config


def test_across_conventions_with_the_flag_only(tmp_path, capsys, refused):
    source, out = saved(tmp_path / "ours.safetensors"), tmp_path / "transformer"
    options = ("--source", source, "--out", out, "--format", "diffusers")
    message = refused("convert", *options)
    assert "--across_conventions" in message
    assert not out.exists()
    assert run(source, out, "diffusers", "--across_conventions") == 0
    assert "conventions" in capsys.readouterr().out
    record = json.loads((out / "conversion.json").read_text())
    stated = record["differences"]["conventions"]["overall"]
    assert f"{stated:.2%}" in message
    assert "--overwrite" in refused("convert", *options, "--across_conventions")
    assert run(source, out, "diffusers", "--across_conventions", "--overwrite") == 0


def test_a_quantized_run_becomes_float_weights(tmp_path, quantized_run, capsys, refused):
    source, out = quantized_run / "checkpoints" / "last.ckpt", tmp_path / "float.safetensors"
    options = ("--source", source, "--out", out, "--format", "dit_qat")
    assert "--dequantize" in refused("convert", *options)
    assert main(["convert", *map(str, options), "--dequantize"]) == 0
    printed = capsys.readouterr().out
    assert "activations and attention no longer quantized" in printed
    assert load_dit(out).config == load_checkpoint(source).network.config


def test_user_errors_are_one_line(tmp_path, refused):
    source = saved(tmp_path / "ours.safetensors", num_classes=10, timestep_shift=1)
    out = ("--out", tmp_path / "out")
    assert "no such file" in refused(
        "convert", "--source", tmp_path / "gone.pt", *out, "--format", "diffusers"
    )
    assert "needs an autoencoder" in refused(
        "convert", "--source", source, *out, "--format", "pipeline"
    )
    assert "gguf" in refused("convert", "--source", source, *out, "--format", "gguf")
    assert not (tmp_path / "out").exists()
