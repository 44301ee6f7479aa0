"""Whole pipelines of diffusers from small random parts; they need the package transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from dit_qat.dit.ptq import PTQMethod, calibrate_pipeline, quantize_post_training, target_of
from dit_qat.dit.ptq.latent_path import LatentPath
from dit_qat.dit.ptq.subject import open_subject

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MakeTransformer = Callable[..., nn.Module]
MakeVae = Callable[..., AutoencoderKL]
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "and", "dog", "user", "assistant"]
PROMPTS = ["a red cat", "a dog and a cat"]


def _tokenizer(length: int) -> Any:
    """One token per word."""
    words = {word: i for i, word in enumerate(WORDS)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def _t5(kind: str, width: int) -> Any:
    sizes = {"d_model": width, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(WORDS), **sizes)
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def _clip(width: int, projected: bool) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(transformers, kind)(config).eval()


def _pixart(make: MakeTransformer, vae: MakeVae) -> tuple[Any, dict[str, Any]]:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(
        tokenizer=_tokenizer(8),
        text_encoder=_t5("T5", 12),
        vae=vae(),
        transformer=make("PixArtTransformer2DModel"),
        scheduler=DPMSolverMultistepScheduler(),
    ), {"use_resolution_binning": False, "max_sequence_length": 8, "height": 16, "width": 16}


def _sd3(make: MakeTransformer, vae: MakeVae) -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=make("SD3Transformer2DModel", joint_attention_dim=20),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=_clip(4, True),
        tokenizer=_tokenizer(8),
        text_encoder_2=_clip(6, True),
        tokenizer_2=_tokenizer(8),
        text_encoder_3=_t5("T5", 20),
        tokenizer_3=_tokenizer(8),
    ), {"height": 16, "width": 16, "max_sequence_length": 8}


def _flux(make: MakeTransformer, vae: MakeVae) -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(latent_channels=4, shift_factor=0.1),
        text_encoder=_clip(10, False),
        tokenizer=_tokenizer(8),
        text_encoder_2=_t5("T5", 12),
        tokenizer_2=_tokenizer(8),
        transformer=make("FluxTransformer2DModel", in_channels=16),
    ), {"height": 16, "width": 16, "max_sequence_length": 8}


def _z_image(make: MakeTransformer, vae: MakeVae) -> tuple[Any, dict[str, Any]]:
    from diffusers import ZImagePipeline

    config = transformers.Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    tokenizer = _tokenizer(8)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}{% endfor %}"
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=transformers.Qwen3Model(config).eval(),
        tokenizer=tokenizer,
        transformer=make("ZImageTransformer2DModel"),
    ), {"height": 32, "width": 32, "max_sequence_length": 8}


def _wan(make: MakeTransformer, vae: MakeVae) -> tuple[Any, dict[str, Any]]:
    from diffusers import WanPipeline

    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanPipeline(
        tokenizer=_tokenizer(8),
        text_encoder=_t5("UMT5", 10),
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=make("WanTransformer3DModel"),
    ), {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8}


# Builder, passes of the transformer per step under guidance (two calls or one of twice the rows).
PIPELINES = {"pixart": _pixart, "sd3": _sd3, "flux": _flux, "z_image": _z_image, "wan": _wan}
CALLS_PER_STEP = {"pixart": 1, "sd3": 1, "flux": 1, "z_image": 1, "wan": 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_a_pipeline_is_recorded_quantized_and_draws_nearly_the_same(
    name: str,
    make_transformer: MakeTransformer,
    make_vae: MakeVae,
    make_round: Callable[..., PTQMethod],
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline, options = PIPELINES[name](make_transformer, make_vae)
    store = calibrate_pipeline(pipeline, PROMPTS, num_inference_steps=4, steps=2, **options)
    assert store.steps == [0] * CALLS_PER_STEP[name] + [3] * CALLS_PER_STEP[name] + (
        [0] * CALLS_PER_STEP[name] + [3] * CALLS_PER_STEP[name]
    )

    argument = target_of(pipeline.transformer).timestep_argument

    def latents() -> torch.Tensor:
        path = LatentPath(pipeline, argument)
        with path.listening(pipeline.transformer):
            drawn = pipeline(
                prompt=PROMPTS[0],
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(1),
                output_type="latent",
                return_dict=False,
                **options,
                **path.options,
            )[0]
        assert len(path.latents) == len(set(path.timesteps)) == 2
        assert path.timesteps[0] == pytest.approx(store[0].timestep)
        assert torch.equal(path.latents[-1].flatten(), drawn.flatten())
        return drawn.float()

    exact = latents()
    result = quantize_post_training(pipeline.transformer, make_round(8), store)
    assert pipeline.transformer is result.model
    error = (latents() - exact).square().sum() / exact.square().sum()
    assert 0 < error < 0.05


@pytest.mark.filterwarnings("ignore")
def test_a_saved_video_pipeline_is_opened(
    make_transformer: MakeTransformer, make_vae: MakeVae, tmp_path: Path
) -> None:
    """Wan insists on the package accelerate."""
    pytest.importorskip("accelerate")
    pipeline, _ = _wan(make_transformer, make_vae)
    pipeline.save_pretrained(tmp_path)
    opened = open_subject(str(tmp_path))
    weights = pipeline.transformer.state_dict()
    found = opened.model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.filterwarnings("ignore")
def test_a_published_pixart_is_opened_though_it_names_an_older_class(
    make_transformer: MakeTransformer, make_vae: MakeVae, tmp_path: Path
) -> None:
    """Its folders say Transformer2DModel, as those of the class-conditional DiTs do."""
    pipeline, _ = _pixart(make_transformer, make_vae)
    pipeline.save_pretrained(tmp_path)
    for name, key, value in (
        ("model_index.json", "transformer", ["diffusers", "Transformer2DModel"]),
        ("transformer/config.json", "_class_name", "Transformer2DModel"),
    ):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    subject = open_subject(str(tmp_path))
    assert type(subject.model).__name__ == "PixArtTransformer2DModel"
    assert subject.pipeline is not None
