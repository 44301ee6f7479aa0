"""What a run of post-training quantization is asked to do, apart from the method."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dit_qat.dit.ptq.subject import Dtype
from dit_qat.dit.ptq.target import PTQTarget, target_of
from dit_qat.dit.ptq.text_to_image import Layout, read_prompts

__all__ = ["Calibration", "Evaluation", "Patterns", "PipelineCall"]


@dataclass(frozen=True)
class Calibration:
    """What the model is calibrated on.

    Attributes:
        images: How many are drawn for it, of a class-conditional or unconditional DiT.
        classes: Their labels, dealt out in turn; by default all classes in turn.
        prompts: For a pipeline: a text file with one per line, GenEval's metadata (.jsonl), or a
            list of them.
        steps: Steps of the sampler that are kept: how many, evenly from the first to the last, or
            which; by default all.
        tokens: Of each call that enter a layer's second moment; by default all. Fewer save time on
            long sequences (32,000 tokens of a video).
        on_disk: Keep the calls beside --out, one file each, rather than in memory; a run that goes
            on after a kill then need not record them again.

    Raises:
        ValueError: for no images, an empty list, or prompts that are none.
    """

    images: int = 128
    classes: list[int] | None = None
    prompts: Path | list[str] | None = None
    steps: int | list[int] | None = None
    tokens: int | None = None
    on_disk: bool = False

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"calibration images={self.images}: must be at least 1")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"calibration tokens={self.tokens}: must be at least 1; null: all")
        for name in ("classes", "prompts", "steps"):
            if getattr(self, name) == []:
                raise ValueError(f"calibration {name} is an empty list; fill it, or leave it out")

    def read_prompts(self) -> list[str]:
        """The prompts.

        Raises:
            FileNotFoundError: if their file is not there.
            ValueError: if there are none, or the file holds none.
        """
        if self.prompts is None:
            raise ValueError(
                "a pipeline is calibrated on prompts and none are given; pass "
                "--calibration.prompts FILE.txt, one per line (128 of them are usual)"
            )
        if isinstance(self.prompts, Path):
            return [prompt.text for prompt in read_prompts(self.prompts)]
        empty = [i for i, text in enumerate(self.prompts) if not text.strip()]
        if empty:
            raise ValueError(f"calibration prompt {empty[0]} is empty; remove it")
        return list(self.prompts)


@dataclass(frozen=True)
class PipelineCall:
    """How a diffusers pipeline is called; DiTs of ours have a sampler instead.

    Attributes:
        steps: Of its scheduler.
        guidance: Its guidance_scale; by default the pipeline's own.
        height: Of images; by default the pipeline's own.
        width: Of images.
        frames: Of videos.
        batch_size: Prompts per call.
        dtype: What the pipeline is loaded in.
        more: What else it is called with, by name, such as max_sequence_length.

    Raises:
        ValueError: for numbers below 1.
    """

    steps: int = 50
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch_size: int = 1
    dtype: Dtype = "float32"
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "frames", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"pipeline {name}={value}: must be at least 1")

    @property
    def options(self) -> dict[str, Any]:
        """What the pipeline is called with, beside prompts and steps."""
        found = {
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
        }
        return {name: value for name, value in found.items() if value is not None} | self.more


@dataclass(frozen=True)
class Patterns:
    """Which layers are quantized, by globs over full names; by default those of the model's class.

    Attributes:
        blocks: The model's blocks.
        quantize: Linear layers.
        skip: Those that stay float all the same.
    """

    blocks: list[str] | None = None
    quantize: list[str] | None = None
    skip: list[str] | None = None

    def target(self, model: nn.Module) -> PTQTarget:
        """The layers of a model; errors of :func:`~dit_qat.dit.ptq.target.target_of`."""
        return target_of(model, blocks=self.blocks, quantize=self.quantize, skip=self.skip)


@dataclass(frozen=True)
class Evaluation:
    """What the quantized model is compared with the float one on.

    Attributes:
        images: That both draw, step by step: trajectory error and pictures. For a pipeline, of the
            first calibration prompts.
        samples: Images of the embedded digits model that FD-digits is scored on (1797 is the
            number of real ones); 0: none. Other models are not scored so.
        calls: Recorded calls, spread over the steps, for errors by layer and timestep.
        prompts: Also draw these prompts, by both models, into folders: GenEval's metadata
            (.jsonl) or one prompt per line (.txt).
        layout: Of those folders; by default geneval for .jsonl and vbench for .txt.
        per_prompt: Images or videos of each.

    Raises:
        ValueError: for numbers out of range.
    """

    images: int = 16
    samples: int = 1797
    calls: int = 64
    prompts: Path | None = None
    layout: Layout | None = None
    per_prompt: int = 4

    def __post_init__(self) -> None:
        for name in ("images", "calls", "per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation {name}={getattr(self, name)}: must be at least 1")
        if self.samples and self.samples < 4:
            raise ValueError(f"evaluation samples={self.samples}: score at least 4, or 0 for none")
