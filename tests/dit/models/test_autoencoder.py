import hashlib
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from dit_qat.dit.models import autoencoder as module
from dit_qat.dit.models.autoencoder import Autoencoder, LatentSpace, load_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_vae):
    path = tmp_path_factory.mktemp("vae")
    make_vae(scaling_factor=0.5, shift_factor=0.25).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_autoencoder(folder)


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "vae")


def images(count=3, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_space_is_what_the_configuration_says(loaded, folder):
    space = loaded.space
    assert (space.scaling_factor, space.shift_factor) == (0.5, 0.25)
    assert (space.channels, space.downscale) == (4, 2)
    assert space.source == str(folder)
    assert space.side(8) == 4
    with pytest.raises(ValueError, match="image size 9 is no multiple of 2"):
        space.side(9)


def test_scaling_and_unscaling_are_inverses(loaded):
    latents = torch.randn(2, 4, 4, 4)
    scaled = loaded.space.scale_(latents.clone())
    assert torch.allclose(scaled, (latents - 0.25) * 0.5)
    assert torch.allclose(loaded.space.unscale(scaled), latents)


def test_encoding_gives_the_moments_of_diffusers(loaded, folder):
    expected = AutoencoderKL.from_pretrained(folder).encode(images()).latent_dist
    mean, log_variance = loaded.encode(images())
    assert mean.shape == log_variance.shape == (3, 4, 4, 4)
    assert torch.allclose(mean, expected.mean, atol=1e-6)
    assert torch.allclose(log_variance, expected.logvar, atol=1e-6)
    assert not mean.requires_grad


def test_the_published_weights_have_older_names(folder, loaded, damaged):
    """The attention of stabilityai/sd-vae-ft-ema and -mse is named as in diffusers 0.4."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, damaged / WEIGHTS)
    assert load_autoencoder(damaged).space.sha256 == loaded.space.sha256


def test_log_variances_are_clamped(make_vae):
    network = make_vae()
    torch.nn.init.constant_(network.quant_conv.bias, 100.0)
    _, log_variance = Autoencoder(network, "test").encode(images())
    assert (log_variance == 20).all()


def test_decoding_inverts_the_scaling(loaded, folder):
    latents = torch.randn(2, 4, 4, 4)
    expected = AutoencoderKL.from_pretrained(folder).decode(latents / 0.5 + 0.25).sample
    assert torch.allclose(loaded.decode(latents, batch_size=2), expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 5, 7])
def test_decoded_bytes_do_not_depend_on_how_many_are_asked_for(loaded, count):
    latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    whole = loaded.decode(latents, batch_size=4)
    assert torch.equal(loaded.decode(latents[:count], batch_size=4), whole[:count])


def test_no_latents_are_no_images(loaded):
    assert loaded.decode(torch.empty(0, 4, 4, 4)).shape == (0, 3, 8, 8)


def test_autocast_does_not_reach_the_autoencoder(loaded):
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = loaded.encode(images().bfloat16())
        decoded = loaded.decode(mean.bfloat16())
    assert mean.dtype == decoded.dtype == torch.float32
    assert torch.equal(mean, loaded.encode(images().bfloat16())[0])


@pytest.mark.parametrize(
    ("shape", "batch_size", "message"),
    [((1, 3, 4, 4), 8, r"decodes \(N, 4, h, w\)"), ((1, 4, 4, 4), 0, "at least 1")],
)
def test_what_cannot_be_decoded_is_refused(loaded, shape, batch_size, message):
    with pytest.raises(ValueError, match=message):
        loaded.decode(torch.zeros(shape), batch_size)


def test_the_hash_is_of_the_weights_and_not_of_their_storage(loaded, folder, tmp_path):
    network = AutoencoderKL.from_pretrained(folder)
    network.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    network.save_pretrained(tmp_path / "pipeline" / "vae")
    for source in (tmp_path / "pickled", tmp_path / "pipeline"):
        space = load_autoencoder(source).space
        assert space == LatentSpace(**{**vars(loaded.space), "source": str(source)})
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert loaded.space.sha256 == digest.hexdigest()
    torch.nn.init.ones_(network.decoder.conv_out.bias)
    assert Autoencoder(network, "other").space.sha256 != loaded.space.sha256


def test_weights_cut_short_are_refused(damaged):
    path = damaged / WEIGHTS
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="copy or download them again"):
        load_autoencoder(damaged)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"neither {WEIGHTS}"):
        load_autoencoder(damaged)


def test_weights_of_another_model_are_refused(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(ValueError, match="belong to different models"):
        load_autoencoder(damaged)
    (damaged / "config.json").write_text(json.dumps(config | {"_class_name": "DiT"}))
    with pytest.raises(ValueError, match="describes DiT, not AutoencoderKL"):
        load_autoencoder(damaged)
    (damaged / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_autoencoder(damaged)


def test_weights_that_are_not_finite_are_refused(tmp_path, make_vae):
    network = make_vae()
    torch.nn.init.constant_(network.encoder.conv_in.bias, float("nan"))
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.bias holds NaN"):
        load_autoencoder(tmp_path)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json there or in vae/"):
        load_autoencoder(tmp_path)


class Hub:
    """Stands for the hub: serves a local folder, or nothing at all."""

    def __init__(self, root, online=True):
        self.root, self.online, self.asked = root, online, []

    def __call__(self, repo, name, local_files_only=False):
        self.asked.append((name, local_files_only))
        if not self.online:
            raise LocalEntryNotFoundError("offline")
        if not (self.root / name).is_file():
            raise EntryNotFoundError("no such file")
        return str(self.root / name)


@pytest.mark.parametrize("prefix", ["", "vae/"])
@pytest.mark.parametrize("safe", [True, False])
def test_hub_ids_of_autoencoders_and_of_pipelines_load(
    monkeypatch, tmp_path, folder, loaded, prefix, safe
):
    network = AutoencoderKL.from_pretrained(folder)
    network.save_pretrained(tmp_path / prefix, safe_serialization=safe)
    monkeypatch.setattr(module, "hf_hub_download", Hub(tmp_path))
    space = load_autoencoder("someone/something").space
    assert space.source == "someone/something"
    assert space.sha256 == loaded.space.sha256


def test_without_a_connection_the_hub_is_asked_once(monkeypatch):
    hub = Hub(None, online=False)
    monkeypatch.setattr(module, "hf_hub_download", hub)
    with pytest.raises(FileNotFoundError, match="check the name and the connection"):
        load_autoencoder("someone/something")
    assert hub.asked == [("config.json", False), ("vae/config.json", True)]
