import json
from hashlib import sha256

import pytest
import torch
from diffusers import DiTPipeline

from dit_qat.allocation import BitMap
from dit_qat.cli.main import main
from dit_qat.dit.evaluation import load_images
from dit_qat.dit.methods import AMPN, RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.models.autoencoder import load_autoencoder
from dit_qat.dit.training import DiTTraining
from dit_qat.dit.training.specs import spec_of
from dit_qat.export import read_manifest
from dit_qat.export.files import write_json
from dit_qat.llm.models import shipped_model


@pytest.fixture
def checkpoint(quantized_run):
    return quantized_run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def packed(quantized_run, tmp_path_factory):
    """The packed folder of the quantized run; tests must not write into it."""
    out, path = tmp_path_factory.mktemp("packed") / "model", quantized_run / "checkpoints/last.ckpt"
    assert main(["export", "--checkpoint", str(path), "--out", str(out)]) == 0
    return out


@pytest.fixture
def bit_map(tmp_path, checkpoint):
    """Write a bit map for the checkpoint's block linears."""

    def write(bits, prefix="blocks.0."):
        names = [prefix + name for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        scores = ((1.0, 0.5, 0.2),) * 4
        content = BitMap(
            tuple(names), tuple(bits), (1,) * 4, (2, 3, 4), scores, "output", 3.0
        ).as_dict()
        path = tmp_path / "bit_map.json"
        write_json(path, content)
        return path

    return write


def test_the_folder_says_where_it_came_from(packed, checkpoint, quantized_run):
    found = read_manifest(packed).provenance
    digest = sha256(checkpoint.read_bytes()).hexdigest()
    assert found["checkpoint"] == {"file": "last.ckpt", "sha256": digest}
    assert (found["weights"], found["step"]) == ("ema", 6)
    assert found["config.yaml"] == (quantized_run / "config.yaml").read_text()
    assert found["metrics"] == json.loads((quantized_run / "metrics.json").read_text())
    assert found["training"]["method"]["init_args"]["activation_bits"] == 3
    assert str(quantized_run) not in json.dumps(found["checkpoint"])


def test_the_same_checkpoint_gives_the_same_bytes(packed, checkpoint, tmp_path, capsys):
    out = tmp_path / "again"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    for name in ("config.json", "model.safetensors", "metrics.json"):
        assert (out / name).read_bytes() == (packed / name).read_bytes()
    printed = capsys.readouterr().out
    assert "smaller than" in printed
    assert "packed against trained" in printed
    assert "rounded" not in printed


def test_samples_are_those_of_the_checkpoint(packed, checkpoint, tmp_path):
    sampler = ["--sampler.steps", "50", "--sampler.batch_size", "10", "--num", "10"]
    for name, source in (("a", ["--checkpoint", checkpoint]), ("b", ["--weights", packed])):
        options = [*map(str, source), "--out", str(tmp_path / name), *sampler]
        assert main(["sample", *options]) == 0
    trained, drawn = (load_images(tmp_path / name / "images") for name in ("a", "b"))
    assert (trained == drawn).double().mean() >= 0.999
    assert trained.double().std() > 10
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert (metrics["weights"], metrics["checkpoint_step"]) == ("packed", 6)


def test_weights_of_the_optimizer_and_16_bits(packed, checkpoint, tmp_path, capsys):
    options = ["--weights", "current", "--branch_dtype", "bfloat16", "--storage", "ternary_2"]
    command = ["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "m")]
    assert main([*command, *options]) == 0
    assert "rounded beyond what training did" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "m")
    assert manifest.provenance["weights"] == "current"
    assert manifest.layers["blocks.0.attn.qkv"].storage == "ternary_2"
    assert manifest.tensors["blocks.0.attn.qkv.low_rank_up"].dtype == "BF16"
    name = "final_layer.linear.weight"
    assert manifest.tensors[name].digest != read_manifest(packed).tensors[name].digest


def test_an_allocation_must_be_that_of_the_training(checkpoint, bit_map, tmp_path, refused):
    command = ("export", "--checkpoint", checkpoint, "--out", tmp_path / "m", "--bit_map")
    message = refused(*command, bit_map([3, 3, 2, 4]))
    assert "2 of 4 layers have other bits" in message
    assert "blocks.0.mlp.fc1 (3 trained, 2 in the map)" in message
    message = refused(*command, bit_map([3, 3, 3, 3], prefix="blocks.7."))
    assert "another model" in message
    assert "there is no bit map" in refused(*command, tmp_path / "none.json")
    assert not (tmp_path / "m").exists()
    assert main([*map(str, command), str(bit_map([3, 3, 3, 3]))]) == 0


def test_a_checkpoint_of_the_warm_up_has_no_allocation_yet(checkpoint, tmp_path, refused):
    content = torch.load(checkpoint, weights_only=True)
    settings = content["hyper_parameters"]["method"]["init_args"]
    method = AMPN(**settings, average_bits=2, warmup_steps=7)
    content["hyper_parameters"]["method"] = spec_of(method)
    early, out = tmp_path / "early.ckpt", tmp_path / "m"
    torch.save(content, early)
    message = refused("export", "--checkpoint", early, "--out", out)
    assert "still have 3 activation bits each" in message
    assert "of after step 7" in message
    assert not out.exists()
    bits = dict.fromkeys((f"blocks.0.{name}" for name in ("attn.qkv", "mlp.fc1")), 3)
    content["hyper_parameters"]["method"] = spec_of(method.with_bits(bits))
    torch.save(content, early)
    assert main(["export", "--checkpoint", str(early), "--out", str(out)]) == 0


def test_what_cannot_be_exported(checkpoint, float_run, packed, tmp_path, refused, contents):
    out = tmp_path / "m"
    float_checkpoint = float_run / "checkpoints" / "last.ckpt"
    assert "no quantized layers" in refused(
        "export", "--checkpoint", float_checkpoint, "--out", out
    )
    before = contents(packed)
    message = refused("export", "--checkpoint", checkpoint, "--out", packed)
    assert "--overwrite true" in message
    assert contents(packed) == before
    both = refused("export", "--checkpoint", checkpoint, "--out", out, "--pipeline", tmp_path / "p")
    assert "--vae" in both
    (tmp_path / "config.yaml").mkdir()
    assert "no checkpoint" in refused("export", "--checkpoint", tmp_path / "x.ckpt", "--out", out)
    assert not out.exists()


def test_folders_are_told_what_they_are(quantized_run, packed, tmp_path, refused):
    out = ("--out", tmp_path / "m")
    assert "is packed already" in refused("export", "--checkpoint", packed, *out)
    run = refused("export", "--checkpoint", quantized_run, *out)
    assert str(quantized_run / "checkpoints" / "last.ckpt") in run
    llm = refused("export", "--checkpoint", shipped_model(), *out)
    assert "dit-qat llm quantize" in llm
    assert not (tmp_path / "m").exists()


def test_a_pipeline_is_not_written_for_what_will_be_refused(
    checkpoint, bit_map, tmp_path, make_vae, refused
):
    make_vae(scaling_factor=0.2).save_pretrained(tmp_path / "vae")
    command = ["export", "--checkpoint", checkpoint, "--vae", tmp_path / "vae"]
    for out, pipeline in (("m", "m"), ("m", "m/p"), ("p/m", "p")):
        targets = ("--out", tmp_path / out, "--pipeline", tmp_path / pipeline)
        assert "one inside the other" in refused(*command, *targets)
    other = ("--out", tmp_path / "m", "--bit_map", bit_map([2, 3, 3, 3]))
    message = refused(*command, *other, "--pipeline", tmp_path / "p")
    assert "1 of 4 layers have other bits" in message
    assert not (tmp_path / "p").exists()


def test_metrics_that_are_damaged_are_named(quantized_run, tmp_path, refused):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.write_bytes((quantized_run / "checkpoints" / "last.ckpt").read_bytes())
    (tmp_path / "metrics.json").write_text("{")
    message = refused("export", "--checkpoint", path, "--out", tmp_path / "m")
    assert "metrics.json" in message
    (tmp_path / "metrics.json").write_text('{"loss": NaN}')
    assert main(["export", "--checkpoint", str(path), "--out", str(tmp_path / "m")]) == 0
    assert read_manifest(tmp_path / "m").provenance["metrics"] == {"loss": "NaN"}


def test_a_pipeline_is_written_beside_it(tmp_path, make_vae, refused, capsys):
    sizes = {"input_size": 4, "in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 1}
    vae = tmp_path / "vae"
    make_vae(scaling_factor=0.2).save_pretrained(vae)
    module = DiTTraining(DiT(**sizes, num_classes=1000), RobuQ(rank=2, distillation=0.0))
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    space = vars(load_autoencoder(str(vae)).space)
    content = {
        "global_step": 1,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "Latents": {"latent_space": space},
    }
    torch.save(content, tmp_path / "last.ckpt")
    command = ["export", "--checkpoint", tmp_path / "last.ckpt", "--out", tmp_path / "m"]
    command += ["--pipeline", tmp_path / "pipeline", "--vae", vae]
    assert "--across_conventions" in refused(*command)
    assert not (tmp_path / "m").exists()
    capsys.readouterr()
    assert main([*map(str, command), "--across_conventions"]) == 0
    assert "DiTPipeline of dequantized weights" in capsys.readouterr().out
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline", low_cpu_mem_usage=False)
    assert pipeline.transformer.config.sample_size == 4
    assert read_manifest(tmp_path / "m").provenance["latent_space"] == space
    options = ["--num", "2", "--sampler.steps", "1", "--sampler.batch_size", "2"]
    out = tmp_path / "drawn"
    assert main(["sample", "--weights", str(tmp_path / "m"), "--out", str(out), *options]) == 0
    assert load_images(out / "images").shape == (2, 3, 8, 8)


def test_a_damaged_packed_folder_is_no_source(packed, tmp_path, refused):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_bytes((packed / "config.json").read_bytes())
    sample = ("sample", "--out", tmp_path / "out", "--weights", folder)
    assert "model.safetensors" in refused(*sample)
    weights = (packed / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-5])
    assert "truncated" in refused(*sample)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{")
    assert "config.json is no JSON" in refused(*sample)
    (folder / "config.json").unlink()
    assert "there is no" in refused(*sample)
    assert "there is no" in refused(*sample[:-1], folder / "model.safetensors")
    assert not (tmp_path / "out").exists()
