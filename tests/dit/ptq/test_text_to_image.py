"""A pipeline of a tiny random transformer, whose prompts are hashed in place of encoded."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn

from dit_qat import load_quantized
from dit_qat.dit.evaluation import load_images
from dit_qat.dit.methods import RTN
from dit_qat.dit.methods.adatsq import AdaTSQ
from dit_qat.dit.ptq.execute import run_job
from dit_qat.dit.ptq.job import PTQJob, prepare
from dit_qat.dit.ptq.latent_path import LatentPath, PathSums
from dit_qat.dit.ptq.settings import Calibration, Evaluation, PipelineCall
from dit_qat.dit.ptq.similarity import PairScorer
from dit_qat.dit.ptq.subject import Subject
from dit_qat.dit.ptq.text_to_image import (
    Drawing,
    Prompt,
    draw_prompt,
    draw_prompts,
    read_prompts,
    using,
)
from dit_qat.dit.randomness import generator_for
from dit_qat.dit.sampling import SamplerConfig

MakeTransformer = Callable[..., nn.Module]
PROMPTS = [
    Prompt("a photo of a bench", {"tag": "single_object", "prompt": "a photo of a bench"}),
    Prompt("a red cat", {"tag": "colors", "prompt": "a red cat"}),
]
DRAWING = Drawing(steps=2, per_prompt=2)


class Tiny(DiffusionPipeline):
    """Images of 16 x 16, or videos of as many frames as asked for."""

    def __init__(self, transformer: nn.Module, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.calls = 0

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int = 2,
        generator: list[torch.Generator] | None = None,
        output_type: str = "np",
        num_frames: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> Any:
        assert generator is not None
        assert output_type in ("np", "latent")
        self.calls += 1
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator])
        text = torch.cat([torch.randn(1, 5, 12, generator=generator_for(0, p)) for p in prompt])
        for t in self.scheduler.timesteps:
            condition = {"resolution": None, "aspect_ratio": None}
            output = self.transformer(
                x,
                encoder_hidden_states=text,
                timestep=t.repeat(len(x)),
                added_cond_kwargs=condition,
            ).sample[:, :4]
            x = self.scheduler.step(output, t, x).prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(self, 0, t, {"latents": x})
        images = x[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2).permute(0, 2, 3, 1)
        pixels = (images / 4 + 0.5).numpy()
        if num_frames is None:
            return SimpleNamespace(images=pixels)
        return SimpleNamespace(frames=np.stack([pixels] * num_frames, axis=1))


@pytest.fixture
def pipeline(make_transformer: MakeTransformer) -> Tiny:
    return Tiny(make_transformer("PixArtTransformer2DModel"), DDIMScheduler())


@pytest.fixture
def other(make_transformer: MakeTransformer) -> nn.Module:
    """A transformer that is nearly the same."""
    model = make_transformer("PixArtTransformer2DModel")
    with torch.no_grad():
        model.get_submodule("proj_out").weight.mul_(1.05)
    return model


def both(pipeline: Tiny, other: nn.Module) -> dict[str, nn.Module]:
    return {"float": pipeline.transformer, "quantized": other}


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_geneval_finds_its_layout(pipeline: Tiny, other: nn.Module, tmp_path: Path) -> None:
    before = pipeline.transformer
    found = draw_prompts(pipeline, both(pipeline, other), PROMPTS, DRAWING, tmp_path, PairScorer())
    names = [f"{i:05d}/{n}" for i in range(2) for n in ("metadata.jsonl", "samples/0000.png")]
    names += [f"{i:05d}/samples/0001.png" for i in range(2)]
    wanted = [f"{model}/{name}" for model in ("float", "quantized") for name in names]
    assert files(tmp_path) == sorted([*wanted, "pairs.jsonl"])
    line = (tmp_path / "quantized/00001/metadata.jsonl").read_text()
    assert json.loads(line) == PROMPTS[1].metadata
    images = load_images(tmp_path / "float/00000/samples")
    assert images.shape == (2, 3, 16, 16)
    assert not torch.equal(images[0], images[1])
    assert pipeline.transformer is before
    assert found["samples"] == 4
    assert 20 < found["psnr"] < 100
    assert 0.5 < found["ssim"] < 1


def test_equal_models_are_equally_good(pipeline: Tiny, tmp_path: Path) -> None:
    models = {"a": pipeline.transformer, "b": pipeline.transformer}
    found = draw_prompts(pipeline, models, PROMPTS, DRAWING, tmp_path, PairScorer())
    assert found["psnr"] == 100
    assert found["ssim"] == pytest.approx(1)


def test_a_sample_is_a_function_of_prompt_and_number(pipeline: Tiny) -> None:
    one = draw_prompt(pipeline, "a red cat", DRAWING, 1, 0)
    assert one.shape == (1, 16, 16, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, draw_prompt(pipeline, "a red cat", DRAWING, 1, 0))
    assert not np.array_equal(one, draw_prompt(pipeline, "a red cat", DRAWING, 1, 1))
    assert not np.array_equal(one, draw_prompt(pipeline, "a red cat", DRAWING, 0, 0))


def test_a_killed_run_goes_on(
    pipeline: Tiny, other: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    wanted = draw_prompts(pipeline, both(pipeline, other), PROMPTS, DRAWING, whole, PairScorer())
    assert pipeline.calls == 8
    part = tmp_path / "part"
    models = both(pipeline, other)
    draw_prompts(pipeline, models, PROMPTS[:1], DRAWING, part, PairScorer())
    with (part / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": 1, "sam')  # the kill came here
    pipeline.calls = 0
    assert draw_prompts(pipeline, models, PROMPTS, DRAWING, part, PairScorer()) == wanted
    assert pipeline.calls == 4
    assert files(part) == files(whole)
    assert all((part / name).read_bytes() == (whole / name).read_bytes() for name in files(whole))


def test_vbench_names_files_by_prompts(
    pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = Drawing(steps=2, layout="vbench", per_prompt=1, options={"num_frames": 3})
    monkeypatch.setattr("dit_qat.dit.ptq.text_to_image.video_writer", lambda: None)
    draw_prompts(pipeline, {"float": pipeline.transformer}, PROMPTS, drawing, tmp_path)
    frames = [f"float/{p.text}-0/{i:04d}.png" for p in PROMPTS for i in range(3)]
    assert files(tmp_path) == sorted([*frames, "pairs.jsonl"])


def test_videos_are_written_by_what_diffusers_would_take(
    pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def export_to_video(frames: list[Any], path: str, fps: int) -> None:
        written.append((len(frames), frames[0].max() <= 1, fps))
        Path(path).write_bytes(b"video")

    monkeypatch.setattr("dit_qat.dit.ptq.text_to_image.video_writer", lambda: "imageio")
    monkeypatch.setattr("diffusers.utils.export_to_video", export_to_video)
    drawing = Drawing(steps=2, layout="vbench", per_prompt=2, options={"num_frames": 3})
    draw_prompts(pipeline, {"float": pipeline.transformer}, PROMPTS[:1], drawing, tmp_path)
    assert files(tmp_path) == [
        "float/a photo of a bench-0.mp4",
        "float/a photo of a bench-1.mp4",
        "pairs.jsonl",
    ]
    assert written == [(3, True, 16)] * 2


def test_images_in_vbenchs_layout_are_pngs(pipeline: Tiny, tmp_path: Path) -> None:
    drawing = Drawing(steps=1, layout="vbench", per_prompt=1)
    draw_prompts(pipeline, {"float": pipeline.transformer}, PROMPTS[1:], drawing, tmp_path)
    assert files(tmp_path) == ["float/a red cat-0.png", "pairs.jsonl"]


def test_geneval_takes_no_videos(pipeline: Tiny, tmp_path: Path) -> None:
    drawing = Drawing(steps=1, options={"num_frames": 3})
    with pytest.raises(ValueError, match="videos of 3 frames"):
        draw_prompts(pipeline, {"float": pipeline.transformer}, PROMPTS, drawing, tmp_path)


@pytest.mark.parametrize("text", ["either/or", "long " * 60])
def test_a_prompt_that_is_no_file_name_is_refused_before_drawing(
    pipeline: Tiny, tmp_path: Path, text: str
) -> None:
    drawing = Drawing(steps=1, layout="vbench")
    prompts = [*PROMPTS, Prompt(text)]
    with pytest.raises(ValueError, match="VBench names files by prompts"):
        draw_prompts(pipeline, {"float": pipeline.transformer}, prompts, drawing, tmp_path)
    assert pipeline.calls == 0


def test_the_pipelines_own_transformer_comes_back_after_an_error(
    pipeline: Tiny, other: nn.Module
) -> None:
    before = pipeline.transformer
    with pytest.raises(KeyError, match="True"), using(pipeline, other):
        raise KeyError(pipeline.transformer is other)
    assert pipeline.transformer is before


def test_images_that_are_not_finite_are_refused(pipeline: Tiny, other: nn.Module) -> None:
    with torch.no_grad():
        other.get_submodule("proj_out").weight[0, 0] = torch.nan
    with using(pipeline, other), pytest.raises(ValueError, match="not finite"):
        draw_prompt(pipeline, "a red cat", DRAWING, 0)


def test_prompts_are_read_from_text_and_from_genevals_file(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("a red cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(text) == [Prompt("a red cat"), Prompt("a dog")]
    lines = tmp_path / "evaluation_metadata.jsonl"
    lines.write_text("\n".join(json.dumps(p.metadata) for p in PROMPTS) + "\n", encoding="utf-8")
    assert read_prompts(lines) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"\xff\xfe", "no text in UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"pro', "line 2: not JSON"),
        ("a.jsonl", b'{"tag": "x"}', 'line 1: lacks a "prompt"'),
        ("a.jsonl", b"[1]", 'line 1: lacks a "prompt"'),
    ],
)
def test_bad_prompts_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_a_missing_file_of_prompts_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of prompts .*absent"):
        read_prompts(tmp_path / "absent.txt")


def test_a_whole_run_of_a_pipeline(
    pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated on prompts, quantized, packed, and drawn beside the float model."""
    lines = tmp_path / "evaluation_metadata.jsonl"
    lines.write_text(json.dumps(PROMPTS[1].metadata), encoding="utf-8")
    subject = Subject("tiny", pipeline.transformer, pipeline)
    monkeypatch.setattr("dit_qat.dit.ptq.job.open_subject", lambda *_: subject)
    job = PTQJob(
        "tiny",
        RTN(weight_bits=4, activation_bits=8),
        calibration=Calibration(prompts=["a photo of a bench", "a red cat"], steps=2),
        pipeline=PipelineCall(steps=3),
        evaluation=Evaluation(images=1, calls=2, prompts=lines, per_prompt=2),
    )
    said: list[str] = []
    metrics = run_job(prepare(job), tmp_path / "out", said.append, progress=False)
    assert said[0] == "calibrating on 2 prompts at 2 of 3 steps"
    assert 0 < metrics["output_error"] < 1
    assert metrics["timesteps"] == [666.0, 0.0]
    assert metrics["trajectory_timesteps"] == [666.0, 333.0, 0.0]
    by_step = metrics["trajectory_error_by_step"]
    assert 0 < metrics["trajectory_error"] < 1
    assert metrics["trajectory_error"] == pytest.approx(sum(by_step) / 3)
    assert (metrics["prompts"]["layout"], metrics["prompts"]["samples"]) == ("geneval", 2)
    assert metrics["similarity"]["psnr"] > 20
    assert (metrics["weight_bits"], metrics["activation_bits"]) == (4, 8)
    drawn = files(tmp_path / "out" / "images")
    assert "quantized/00000/samples/0001.png" in drawn
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Only the transformer is quantized" in page
    assert "in the layout of geneval" in page
    packed = load_quantized(tmp_path / "out")
    wanted = draw_prompt(pipeline, "a red cat", Drawing(3), 0)
    with using(pipeline, packed):
        assert np.array_equal(draw_prompt(pipeline, "a red cat", Drawing(3), 0), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": Calibration()}, "prompts and none are given"),
        ({"calibration": Calibration(prompts=["a", " "])}, "prompt 1 is empty"),
        ({"sampler": SamplerConfig(steps=3)}, "has its own scheduler"),
        ({"calibration": Calibration(classes=[1], prompts=["a"])}, "no classes"),
        ({"method": AdaTSQ()}, 'use mode="teacher_forced"'),
        ({"pipeline": PipelineCall(guidance=3.0)}, "Tiny takes no 'guidance_scale'"),
        ({"pipeline": PipelineCall(more={"output_type": "pil"})}, "'output_type': this command"),
        ({"vae": "somewhere"}, "leave --vae out"),
        ({"calibration": Calibration(prompts=["a"], steps=51)}, "the sampler makes 50"),
        (
            {
                "method": AdaTSQ(mode="teacher_forced"),
                "calibration": Calibration(prompts=["a"], steps=[0]),
            },
            "would not cover the schedule",
        ),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_anything_is_drawn(
    pipeline: Tiny, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    subject = Subject("tiny", pipeline.transformer, pipeline)
    monkeypatch.setattr("dit_qat.dit.ptq.job.open_subject", lambda *_: subject)
    job = PTQJob("tiny", RTN(), calibration=Calibration(prompts=["a"]))
    with pytest.raises(ValueError, match=message):
        prepare(replace(job, **changes))
    assert pipeline.calls == 0


@pytest.mark.parametrize(
    ("lines", "evaluation", "frames", "message"),
    [
        ("a red/cat", {"layout": "vbench"}, None, "has a slash"),
        ("a" * 300, {"layout": "vbench"}, None, "bytes"),
        ("a cat\na dog\na cat", {}, None, "'a cat' is there twice"),
        ("a cat", {"layout": "geneval"}, 5, "draws videos of 5 frames"),
    ],
)
def test_prompts_that_a_layout_has_no_place_for_are_refused_before_anything_is_drawn(
    pipeline: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    evaluation: dict[str, Any],
    frames: int | None,
    message: str,
) -> None:
    subject = Subject("tiny", pipeline.transformer, pipeline)
    monkeypatch.setattr("dit_qat.dit.ptq.job.open_subject", lambda *_: subject)
    (tmp_path / "prompts.txt").write_text(lines)
    job = PTQJob(
        "tiny",
        RTN(),
        calibration=Calibration(prompts=["a"]),
        pipeline=PipelineCall(frames=frames),
        evaluation=Evaluation(prompts=tmp_path / "prompts.txt", **evaluation),
    )
    with pytest.raises(ValueError, match=message):
        prepare(job)
    assert pipeline.calls == 0


def test_files_of_prompts_are_read_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_qat.dit.ptq.job.open_subject", pytest.fail)
    absent = tmp_path / "absent.txt"
    job = PTQJob("tiny", RTN(), calibration=Calibration(prompts=absent))
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        prepare(job)
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        prepare(replace(job, calibration=Calibration(), evaluation=Evaluation(prompts=absent)))


def test_a_pipeline_of_two_transformers_is_refused(
    pipeline: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.transformer_2 = pipeline.transformer
    subject = Subject("tiny", pipeline.transformer, pipeline)
    monkeypatch.setattr("dit_qat.dit.ptq.job.open_subject", lambda *_: subject)
    with pytest.raises(ValueError, match="has two transformers"):
        prepare(PTQJob("tiny", RTN(), calibration=Calibration(prompts=["a"])))


def test_errors_of_the_path_are_those_of_its_latents(pipeline: Tiny, other: nn.Module) -> None:
    sums, drawn = PathSums(), []
    for at in range(2):
        paths = []
        for model in (pipeline.transformer, other):
            path = LatentPath(pipeline, "timestep")
            with using(pipeline, model), path.listening(model):
                draw_prompt(pipeline, "a red cat", DRAWING, at, path=path)
            paths.append(path)
        sums.add(*paths)
        drawn.append([torch.stack(path.latents) for path in paths])
    found = sums.errors()
    assert found is not None
    assert [*found.timesteps] == [500.0, 0.0]
    float_x, other_x = (torch.stack(points, 1).double() for points in zip(*drawn, strict=True))
    for step in range(2):
        want = (other_x - float_x)[step].square().sum() / float_x[step].square().sum()
        assert found.by_step[step] == pytest.approx(float(want))
    assert found.reference.shape == (2, 4, 8, 8)


def test_a_pipeline_that_shows_no_latents_has_no_path() -> None:
    path = LatentPath(SimpleNamespace(__call__=lambda prompt: None), "timestep")
    assert path.options == {}
    sums = PathSums()
    sums.add(path, path)
    assert sums.errors() is None
