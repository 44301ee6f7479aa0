import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dit_qat import load_quantized, quantize_
from dit_qat.dit.convert import convert_checkpoint
from dit_qat.dit.exporting import export_network
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import load_dit, save_dit
from dit_qat.dit.models.autoencoder import load_autoencoder
from dit_qat.dit.pipelines import packed_pipeline, packed_transformer, pipeline_scheduler
from dit_qat.dit.randomness import generator_for
from dit_qat.dit.sampling import SamplerConfig, sample_images
from dit_qat.dit.training import DiTTraining
from dit_qat.export import write_packed
from dit_qat.layers import (
    IntLinear,
    PackedLinear,
    StepBits,
    TokenQuantizer,
    follow_timesteps_,
)
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest


@pytest.fixture
def save_vae(tmp_path, make_vae):
    """Write a small random autoencoder; return its folder."""

    def save(name="vae", **overrides):
        make_vae(**({"scaling_factor": 0.2} | overrides)).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def network(make_dit):
    return make_dit(timestep_shift=1, in_channels=4, hidden_size=32, num_classes=1000)


@pytest.fixture
def convert(tmp_path, network, save_vae):
    """Convert the network, and load what diffusers makes of it."""

    def run(source=None, name="pipeline", vae=None, **options):
        if source is None:
            source = tmp_path / "ours.safetensors"
            save_dit(network, source)
        vae = save_vae() if vae is None else vae
        report = convert_checkpoint(source, tmp_path / name, "pipeline", vae, **options)
        pipeline = DiTPipeline.from_pretrained(tmp_path / name, low_cpu_mem_usage=False)
        pipeline.set_progress_bar_config(disable=True)
        return report, pipeline

    return run


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("steps", [5, 10])
def test_diffusers_draws_our_images(convert, network, tmp_path, guidance, steps):
    _, pipeline = convert()
    labels = [3, 207, 999]
    drawn = pipeline(
        labels,
        guidance_scale=guidance,
        generator=[generator_for(7, "image", i) for i in range(3)],
        num_inference_steps=steps,
        output_type="pt",
    ).images
    config = SamplerConfig(
        steps=steps,
        guidance=guidance,
        guided_channels=None,
        spacing="leading",
        batch_size=3,
        seed=7,
    )
    [(_, latents)] = sample_images(network, config, range(3), labels)
    images = load_autoencoder(str(tmp_path / "vae")).decode(latents)
    expected = (images / 2 + 0.5).clamp(0, 1)
    assert drawn.shape == (3, 3, 8, 8)
    assert expected.std() > 0.01
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    # Another spacing draws other images, so that the comparison can fail.
    [(_, other)] = sample_images(
        network, SamplerConfig(steps=steps, batch_size=3, seed=7), range(3), labels
    )
    assert (other - latents).norm() > 1e-2 * latents.norm()


def test_the_folder_is_whole(convert, network, tmp_path, same_state):
    report, pipeline = convert()
    folder = tmp_path / "pipeline"
    assert {path.name for path in folder.iterdir()} == {
        "conversion.json",
        "model_index.json",
        "scheduler",
        "transformer",
        "vae",
    }
    assert type(pipeline.transformer) is DiTTransformer2DModel
    assert same_state(load_dit(folder), network)
    vae = load_autoencoder(folder)
    assert vae.space.sha256 == load_autoencoder(str(tmp_path / "vae")).space.sha256
    assert report.autoencoder["sha256"] == vae.space.sha256
    assert vae.space.scaling_factor == 0.2
    assert report.differences["written"].overall <= 1e-6
    assert pipeline.get_label_ids(["207"]) == [207]


def test_names_of_classes_pass_through(convert, tmp_path):
    convert()
    index = tmp_path / "pipeline" / "model_index.json"
    names = {str(i): f"thing {i}, alias {i}" for i in range(1000)}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
    _, pipeline = convert(source=tmp_path / "pipeline", name="again", vae=str(tmp_path / "vae"))
    assert pipeline.get_label_ids(["alias 207", "thing 3"]) == [207, 3]
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"model_index\.json: no JSON object"):
        convert(source=tmp_path / "pipeline", name="third", vae=str(tmp_path / "vae"))


def test_its_steps_are_those_of_the_training_schedule():
    scheduler = pipeline_scheduler()
    assert type(scheduler) is DDIMScheduler
    scheduler.set_timesteps(250)
    assert scheduler.timesteps.tolist() == list(range(996, -1, -4))
    assert scheduler.betas[0] == pytest.approx(1e-4)
    assert scheduler.betas[-1] == pytest.approx(0.02)
    assert float(scheduler.final_alpha_cumprod) == 1.0


@pytest.mark.parametrize(
    ("overrides", "vae", "message"),
    [
        ({"num_classes": 10}, {}, "num_classes=10: .*hard-codes 1000 as the null class"),
        ({"num_classes": 0}, {}, "num_classes=0: .*no unconditional"),
        ({"in_channels": 3}, {}, "latents have 4 channels, and the DiT has in_channels=3"),
        ({}, {"shift_factor": 0.1}, r"shift_factor=0\.1, which DiTPipeline ignores"),
    ],
)
def test_what_the_pipeline_cannot_draw_with_is_refused(
    tmp_path, make_dit, save_vae, overrides, vae, message
):
    sizes = {"timestep_shift": 1, "in_channels": 4, "hidden_size": 32, "num_classes": 1000}
    save_dit(make_dit(**(sizes | overrides)), tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(
            tmp_path / "ours.safetensors", tmp_path / "out", "pipeline", save_vae(**vae)
        )
    assert not (tmp_path / "out").exists()


def test_the_autoencoder_must_be_that_of_the_training(tmp_path, network, convert, save_vae):
    module = DiTTraining(network)
    content = {
        "global_step": 1,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "Latents": {"latent_space": {"source": "sd-vae-ft-ema", "sha256": "ab" * 32}},
    }
    path, vae = tmp_path / "last.ckpt", save_vae()
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"not those of .* sd-vae-ft-ema \(sha256 abab.*give that"):
        convert(source=path, vae=vae)
    content["Latents"]["latent_space"]["sha256"] = load_autoencoder(vae).space.sha256
    torch.save(content, path)
    convert(source=path, vae=vae)


def test_an_autoencoder_that_is_not_there_is_named(convert, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(vae=str(tmp_path / "nowhere"))
    assert not (tmp_path / "pipeline").exists()


@pytest.fixture
def packed(tmp_path, make_dit):
    """A packed folder of a latent DiT of 1,000 classes, in the original's convention."""
    network = make_dit(in_channels=4, hidden_size=32, num_classes=1000, timestep_shift=0)
    method = RobuQ(activation_bits=4, rank=2)
    export_network(quantize_(network, method.quant_config()), tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_pipeline_draws_our_images_from_packed_weights(packed, save_vae, guidance):
    vae = save_vae()
    pipeline = packed_pipeline(packed, vae)
    pipeline.set_progress_bar_config(disable=True)
    labels = [3, 207, 999]
    drawn = pipeline(
        labels,
        guidance_scale=guidance,
        generator=[generator_for(7, "image", i) for i in range(3)],
        num_inference_steps=5,
        output_type="pt",
    ).images
    network = load_quantized(packed)
    config = SamplerConfig(
        steps=5, guidance=guidance, guided_channels=None, spacing="leading", batch_size=3, seed=7
    )
    [(_, latents)] = sample_images(network, config, range(3), labels)
    expected = (load_autoencoder(vae).decode(latents) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert any(isinstance(m, PackedLinear) for m in pipeline.transformer.modules())


def test_a_packed_pipeline_takes_the_names_of_classes_along(packed, convert, tmp_path):
    convert()
    pipeline = packed_pipeline(packed, str(tmp_path / "pipeline"))
    assert pipeline.get_label_ids(["207"]) == [207]


def test_a_packed_pipeline_needs_the_autoencoder_of_the_training(tmp_path, make_dit, save_vae):
    network = make_dit(in_channels=4, hidden_size=32, num_classes=1000)
    quantize_(network, RobuQ(activation_bits=4, rank=2).quant_config())
    space = {"source": "sd-vae-ft-ema", "sha256": "ab" * 32}
    export_network(network, tmp_path / "packed", provenance={"latent_space": space})
    with pytest.raises(ValueError, match=r"trained with, sd-vae-ft-ema .*abab.*give that one"):
        packed_pipeline(tmp_path / "packed", save_vae())


def test_a_packed_pipeline_needs_a_thousand_classes(tmp_path, make_dit, save_vae):
    network = make_dit(in_channels=4, hidden_size=32, num_classes=10)
    quantize_(network, RobuQ(activation_bits=4, rank=2).quant_config())
    export_network(network, tmp_path / "packed")
    with pytest.raises(ValueError, match=r"num_classes=10: .*hard-codes 1000"):
        packed_pipeline(tmp_path / "packed", save_vae())


def test_a_packed_transformer_stands_in_any_pipeline_of_its_kind(packed, save_vae):
    parts = {"vae": load_autoencoder(save_vae()).network, "scheduler": pipeline_scheduler()}
    pipeline = DiTPipeline(transformer=packed_transformer(packed), **parts)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 2.0}
    drawn = pipeline([3, 207], generator=torch.manual_seed(0), **options).images
    other = packed_pipeline(packed, save_vae())
    other.set_progress_bar_config(disable=True)
    expected = other([3, 207], generator=torch.manual_seed(0), **options).images
    assert (drawn == expected).all()


def test_a_transformer_of_diffusers_comes_back_as_its_own_class(tmp_path, save_vae):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1}
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**sizes, out_channels=8, sample_size=8).eval()
    parts = {"vae": load_autoencoder(save_vae()).network, "scheduler": pipeline_scheduler()}
    drawn = []
    feed = model.transformer_blocks[0].ff.net
    codes, scales = round_to_nearest(feed[2].weight.detach(), IntegerGrid(3))
    made = {"grid": IntegerGrid(3), "codes": codes, "scales": scales}
    policy = StepBits((0.0, 500.0, 999.0), (2, 4, 8))
    feed[2] = IntLinear.build(feed[2], activation=TokenQuantizer(4), step_bits=policy, **made)
    follow_timesteps_(model, "timestep")
    write_packed(model, tmp_path / "m")
    for transformer in (model, packed_transformer(tmp_path / "m")):
        assert type(transformer) is DiTTransformer2DModel
        pipeline = DiTPipeline(transformer=transformer, **parts)
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 1.0}
        drawn.append(pipeline([3, 207], generator=torch.manual_seed(0), **options).images)
    assert (drawn[0] == drawn[1]).all()
    assert drawn[0].std() > 0
    with pytest.raises(ValueError, match=r"holds a 'diffusers', not a DiT; .*packed_transformer"):
        packed_pipeline(tmp_path / "m", save_vae())
