from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import nn

from dit_qat.calibration import CallStore
from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import calibrate_dit, calibrate_pipeline, kept_steps
from dit_qat.dit.sampling import SamplerConfig

MakeDiT = Callable[..., DiT]
Build = Callable[..., DiTPipeline]


@pytest.fixture
def dit_pipeline(
    make_transformer: Callable[..., nn.Module], make_vae: Callable[..., AutoencoderKL]
) -> DiTPipeline:
    transformer = make_transformer(
        "DiTTransformer2DModel", num_embeds_ada_norm=1000, sample_size=4, out_channels=8
    )
    return DiTPipeline(transformer, make_vae(), DDIMScheduler())


def test_what_the_sampler_feeds_the_model_is_kept(make_dit: MakeDiT) -> None:
    model = make_dit()
    config = SamplerConfig(steps=5, batch_size=4, guidance=2.0, guided_channels=None)
    store = calibrate_dit(model, config, images=8, steps=3)
    assert store.steps == [0, 2, 4] * 2
    assert store.timesteps == {0: 999.0, 2: 500.0, 4: 0.0}
    assert store.rows == 6 * 8  # with guidance, a call has twice the images
    x, t, y = store[1].args
    assert x.shape == (8, 2, 4, 4)
    assert set(t.tolist()) == {500}
    assert y.tolist() == [0, 1, 2, 0] + [3] * 4


def test_calibration_noise_is_not_that_of_the_images_with_the_same_seed(make_dit: MakeDiT) -> None:
    model = make_dit()
    config = SamplerConfig(steps=2)
    one, other = (calibrate_dit(model, config, images=2, steps=[0]) for _ in range(2))
    assert torch.equal(one[0].args[0], other[0].args[0])
    generator = torch.Generator().manual_seed(0)
    from dit_qat.dit.randomness import generator_for

    generator = generator_for(config.seed, "image", 0)
    assert not torch.equal(one[0].args[0][:1], torch.randn(1, 2, 4, 4, generator=generator))


def test_labels_and_a_folder_are_passed_on(make_dit: MakeDiT, tmp_path: Path) -> None:
    model = make_dit()
    calibrate_dit(model, SamplerConfig(steps=2), [2, 2], images=2, folder=tmp_path)
    assert CallStore.open(tmp_path)[0].args[2].tolist() == [2, 2]
    with pytest.raises(ValueError, match="images=0"):
        calibrate_dit(model, SamplerConfig(steps=2), images=0)
    with pytest.raises(ValueError, match="1 labels for 2 indices"):
        calibrate_dit(model, SamplerConfig(steps=2), [2], images=2)
    with pytest.raises(ValueError, match="above the limit of 10"):
        calibrate_dit(model, SamplerConfig(steps=2), images=2, limit_bytes=10)


@pytest.mark.parametrize(
    ("total", "steps", "kept"),
    [
        (10, None, None),
        (10, 10, set(range(10))),
        (10, 1, {0}),
        (50, 2, {0, 49}),
        (10, [3, 3, 0], {0, 3}),
    ],
)
def test_kept_steps(total: int, steps: Any, kept: set[int] | None) -> None:
    assert kept_steps(total, steps) == kept


@pytest.mark.parametrize("steps", [0, 11, [10], [], [-1]])
def test_steps_that_are_not_made_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match="the sampler makes"):
        kept_steps(10, steps)


def test_a_class_conditional_pipeline_is_recorded(dit_pipeline: DiTPipeline) -> None:
    store = calibrate_pipeline(
        dit_pipeline, [7, 8, 9], num_inference_steps=4, steps=2, batch_size=2, guidance_scale=3.0
    )
    assert store.steps == [0, 3, 0, 3]
    assert [call.rows for call in store] == [4, 4, 2, 2]
    assert store[0].kwargs["class_labels"].tolist() == [7, 8, 1000, 1000]


def test_a_prompt_has_its_own_noise_whatever_the_batch(dit_pipeline: DiTPipeline) -> None:
    def noise(batch_size: int) -> torch.Tensor:
        options: dict[str, Any] = {"batch_size": batch_size, "guidance_scale": 1.0}
        store = calibrate_pipeline(
            dit_pipeline, [1, 2], num_inference_steps=1, steps=None, **options
        )
        return torch.cat([call.args[0] for call in store])

    assert torch.equal(noise(1), noise(2))


def test_pipelines_that_cannot_be_calibrated_are_refused(dit_pipeline: DiTPipeline) -> None:
    with pytest.raises(ValueError, match="no prompts to calibrate on"):
        calibrate_pipeline(dit_pipeline, [], num_inference_steps=4)
    with pytest.raises(ValueError, match="the sampler makes 4; keep 1 to 4"):
        calibrate_pipeline(dit_pipeline, [1], num_inference_steps=4, steps=5)
    unet = SimpleNamespace(components={"unet": None, "vae": None})
    with pytest.raises(ValueError, match=r"no transformer to quantize \(its parts: unet, vae\)"):
        calibrate_pipeline(unet, ["a"], num_inference_steps=4)

    class Odd:
        transformer = dit_pipeline.transformer

        def __call__(self, latents: object) -> None: ...

    with pytest.raises(ValueError, match=r"neither prompts nor class labels \(it takes latents\)"):
        calibrate_pipeline(Odd(), ["a"], num_inference_steps=4)
