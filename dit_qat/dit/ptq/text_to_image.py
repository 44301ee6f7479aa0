"""Prompts drawn by a float and a quantized pipeline: folders as GenEval and VBench read them."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from dit_qat.dit.evaluation.images import save_png
from dit_qat.dit.ptq.latent_path import LatentPath
from dit_qat.dit.ptq.similarity import PairScorer
from dit_qat.dit.randomness import generator_for
from dit_qat.export.files import written_whole
from dit_qat.export.folders import written_folder

__all__ = [
    "Drawing",
    "Layout",
    "Prompt",
    "check_drawing",
    "draw_prompt",
    "draw_prompts",
    "read_prompts",
    "using",
    "video_writer",
]

Layout = Literal["geneval", "vbench"]

Frames = npt.NDArray[np.uint8]
"""(F, H, W, 3); an image is one frame."""

_LONGEST_NAME = 240  # bytes; file systems take 255
_VIDEO_RATE = 16


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: What is asked for.
        metadata: The whole line of GenEval's file, for its scorer; None elsewhere.
    """

    text: str
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Drawing:
    """How prompts are drawn.

    Attributes:
        steps: Of the pipeline's scheduler.
        options: What else the pipeline is called with.
        seed: Sample j of prompt i is a function of this, i and j.
        layout: Of the folders.
        per_prompt: Samples of each prompt.
    """

    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    layout: Layout = "geneval"
    per_prompt: int = 4

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} is unknown; use one of {get_args(Layout)}")
        if self.per_prompt < 1:
            raise ValueError(f"per_prompt={self.per_prompt}: must be at least 1")


def read_prompts(path: Path) -> list[Prompt]:
    """Read GenEval's ``evaluation_metadata.jsonl``, or a text file with one prompt per line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no prompts, naming the line that is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); save it as such") from error
    filled = [(at, line) for at, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ValueError(f"{path} holds no prompts; write one per line")
    if path.suffix != ".jsonl":
        return [Prompt(line.strip()) for _, line in filled]
    return [_geneval(line, f"{path}, line {at}") for at, line in filled]


def draw_prompts(
    pipeline: Any,
    models: Mapping[str, nn.Module],
    prompts: Sequence[Prompt],
    drawing: Drawing,
    folder: Path,
    scorer: PairScorer | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Draw prompts with one or two transformers, each into a folder of its own.

    GenEval's layout is ``NAME/00000/metadata.jsonl`` and ``NAME/00000/samples/0000.png``, VBench's
    ``NAME/PROMPT-0.mp4``, or ``NAME/PROMPT-0/0000.png`` by frame where nothing here writes videos.
    A run that was killed goes on behind the last pair in ``pairs.jsonl``.

    Args:
        pipeline: Of diffusers; its transformer is put back after.
        models: Transformers by the name of their folder; of two, the first is what the second is
            compared with.
        prompts: What to draw.
        drawing: How.
        folder: Of the folders; results of other prompts or settings must not be there.
        scorer: Compares two models' images; None: they are not compared.
        progress: Whether to show a bar over samples.

    Returns:
        Means of the scores, why others are missing, and how videos were written.

    Raises:
        ValueError: for a prompt that makes no file name in VBench's layout, or videos in GenEval's.
    """
    check_drawing(pipeline, prompts, drawing)
    pairs = _Pairs(folder / "pairs.jsonl")
    todo = [(at, j) for at in range(len(prompts)) for j in range(drawing.per_prompt)]
    todo = [key for key in todo if key not in pairs.scores]
    for at, sample in tqdm(todo, disable=not progress, unit="sample", desc="prompts"):
        drawn = []
        for name, model in models.items():
            with using(pipeline, model):
                frames = draw_prompt(pipeline, prompts[at].text, drawing, at, sample)
            _write(folder / name, prompts[at], drawing.layout, at, sample, frames)
            drawn.append(frames)
        scores = scorer(prompts[at].text, *drawn) if scorer and len(drawn) == 2 else {}
        pairs.append((at, sample), scores)
    missing = {} if scorer is None else dict(scorer.missing)
    return {**pairs.means(), "samples": len(pairs.scores), "missing": missing}


@contextmanager
def using(pipeline: Any, transformer: nn.Module) -> Iterator[None]:
    """Have a pipeline draw with another transformer of the same class."""
    own = pipeline.transformer
    pipeline.transformer = transformer
    try:
        yield
    finally:
        pipeline.transformer = own


def draw_prompt(
    pipeline: Any,
    prompt: str | int,
    drawing: Drawing,
    at: int,
    sample: int = 0,
    path: LatentPath | None = None,
) -> Frames:
    """Draw one sample of prompt number ``at``; ``path`` is told the latents on the way.

    Raises:
        ValueError: if the pipeline returns neither images nor videos, or values that are not
            finite.
    """
    generator = generator_for(drawing.seed, "prompt", at, "sample", sample)
    options = {**drawing.options, "num_inference_steps": drawing.steps}
    options |= {} if path is None else path.options
    known = inspect.signature(pipeline.__call__).parameters
    argument = "prompt" if "prompt" in known else "class_labels"
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        output = pipeline(
            **{argument: [prompt]}, generator=[generator], output_type="np", **options
        )
    values = getattr(output, "images", getattr(output, "frames", None))
    if values is None:
        raise ValueError(
            f"{type(pipeline).__name__} returned neither images nor frames, but "
            f"{type(output).__name__}"
        )
    pixels = np.asarray(values)
    if not np.isfinite(pixels).all():
        raise ValueError(
            f"prompt {prompt!r} gave images that are not finite; use more bits, or bfloat16 or "
            "float32 in place of float16"
        )
    frames: Frames = (pixels.reshape(-1, *pixels.shape[-3:]).clip(0, 1) * 255).round().astype("u1")
    return frames


def video_writer() -> str | None:
    """The package that ``diffusers.utils.export_to_video`` would write videos with, if any."""
    if find_spec("imageio") and find_spec("imageio_ffmpeg"):
        return "imageio"
    return "cv2" if find_spec("cv2") else None


class _Pairs:
    """Scores of what has been drawn, a line for each, so that a killed run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[tuple[int, int], dict[str, float]] = {}
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for line in lines[:-1]:
            entry = json.loads(line)
            self.scores[entry["prompt"], entry["sample"]] = entry["scores"]
        if lines[-1]:  # a line that a kill cut short; its pair is drawn again
            with written_whole(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))

    def append(self, key: tuple[int, int], scores: Mapping[str, float]) -> None:
        self.scores[key] = dict(scores)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"prompt": key[0], "sample": key[1], "scores": dict(scores)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def means(self) -> dict[str, float]:
        names = dict.fromkeys(name for scores in self.scores.values() for name in scores)
        return {
            name: fmean(scores[name] for scores in self.scores.values() if name in scores)
            for name in names
        }


def _write(
    folder: Path, prompt: Prompt, layout: Layout, at: int, sample: int, frames: Frames
) -> None:
    if layout == "geneval":
        if len(frames) > 1:
            raise ValueError(
                f"{prompt.text!r} gave a video of {len(frames)} frames, and GenEval scores images; "
                'use layout="vbench"'
            )
        place = folder / f"{at:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        metadata = prompt.metadata or {"prompt": prompt.text}
        with written_whole(place / "metadata.jsonl") as temporary:
            temporary.write_text(json.dumps(metadata) + "\n", encoding="utf-8")
        save_png(place / "samples" / f"{sample:04d}.png", frames[0])
        return
    name = f"{prompt.text}-{sample}"
    folder.mkdir(parents=True, exist_ok=True)
    if len(frames) == 1:
        save_png(folder / f"{name}.png", frames[0])
    elif video_writer() is None:
        with written_folder(folder / name) as place:
            for index, frame in enumerate(frames):
                save_png(place / f"{index:04d}.png", frame)
    else:
        from diffusers.utils import export_to_video

        partial = folder / f".{at}-{sample}.partial.mp4"
        export_to_video([frame / 255 for frame in frames], str(partial), fps=_VIDEO_RATE)
        partial.replace(folder / f"{name}.mp4")


def check_drawing(pipeline: Any, prompts: Sequence[Prompt], drawing: Drawing) -> None:
    """Refuse prompts that a layout has no place for.

    Raises:
        ValueError: for a prompt that makes no file name of its own in VBench's layout, or videos
            in GenEval's.
    """
    if drawing.layout == "geneval":
        given = inspect.signature(pipeline.__call__).parameters.get("num_frames")
        frames = drawing.options.get("num_frames", given.default if given else None)
        if isinstance(frames, int) and frames > 1:
            raise ValueError(
                f"{type(pipeline).__name__} draws videos of {frames} frames, and GenEval scores "
                'images; use layout="vbench"'
            )
        return
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.text in seen:
            raise ValueError(
                f"VBench names files by prompts, and {prompt.text[:60]!r} is there twice; remove "
                "one (per_prompt asks for several samples of each)"
            )
        seen.add(prompt.text)
        size = len(f"{prompt.text}-{drawing.per_prompt}.mp4".encode())
        if "/" in prompt.text or "\0" in prompt.text or size > _LONGEST_NAME:
            raise ValueError(
                f"VBench names files by prompts, and {prompt.text[:60]!r}... has a slash or "
                f'{size} bytes (at most {_LONGEST_NAME}); shorten it, or use layout="geneval"'
            )


def _geneval(line: str, where: str) -> Prompt:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    text = content.get("prompt") if isinstance(content, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: lacks a "prompt", which every line of GenEval\'s file has')
    return Prompt(text, content)
