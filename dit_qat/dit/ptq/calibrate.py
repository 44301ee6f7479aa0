"""Calibration over the trajectory: what a sampler or a pipeline feeds its transformer."""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_qat.calibration import CallStore, record_calls
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.ptq.target import target_of, transformer_of
from dit_qat.dit.randomness import derive_seed, generator_for
from dit_qat.dit.sampling.sampler import Labels, SamplerConfig, sample_images

__all__ = ["calibrate_dit", "calibrate_pipeline", "kept_steps"]


def calibrate_dit(
    model: DiT,
    sampler: SamplerConfig,
    labels: Labels | None = None,
    *,
    images: int = 128,
    steps: int | Collection[int] | None = None,
    limit_bytes: int | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> CallStore:
    """Sample images with a float DiT and keep (x_t, t, condition) of some steps.

    The noise is not that of the images with the sampler's seed, on which a model may be judged.

    Args:
        model: Float.
        sampler: As the model will be sampled; guidance included.
        labels: As for :func:`~dit_qat.dit.sampling.sample_images`.
        images: How many; whole batches are recorded, so that a few more may be.
        steps: Number of steps to keep, evenly from the first to the last, or which; None: all.
        limit_bytes: What the calls may take.
        folder: Where they go, one file each; None: memory.
        progress: Whether to show a bar over model calls.

    Raises:
        ValueError: for no images, steps that the sampler does not make, or as ``record_calls``.
    """
    if images < 1:
        raise ValueError(f"images={images}: calibration needs at least 1")
    keep = kept_steps(sampler.steps, steps)
    seed = derive_seed(sampler.seed, "calibration")
    sampler = replace(sampler, seed=seed, batch_size=min(sampler.batch_size, images))

    def run() -> None:
        for _ in sample_images(model, sampler, range(images), labels, progress):
            pass

    return record_calls(
        model,
        run,
        timestep_argument=target_of(model).timestep_argument,
        keep=keep,
        limit_bytes=limit_bytes,
        folder=folder,
    )


def calibrate_pipeline(
    pipeline: Any,
    prompts: Sequence[str] | Sequence[int],
    *,
    num_inference_steps: int,
    steps: int | Collection[int] | None = None,
    batch_size: int = 1,
    seed: int = 0,
    timestep_argument: str | None = None,
    limit_bytes: int | None = None,
    folder: Path | None = None,
    progress: bool = False,
    **options: Any,
) -> CallStore:
    """Run a diffusers pipeline and keep what it feeds its transformer at some steps.

    Prompt i has its own generator, whatever the batch. Images are not decoded where the pipeline
    can leave them latent.

    Args:
        pipeline: Any with a ``transformer``, float.
        prompts: One per image: text, or class numbers for a class-conditional pipeline.
        num_inference_steps: Of the sampler.
        steps: Number of steps to keep, evenly from the first to the last, or which; None: all.
        batch_size: Prompts per call of the pipeline.
        seed: Of the generators.
        timestep_argument: What the transformer's forward calls the timestep; None: the default of
            its class.
        limit_bytes: What the calls may take.
        folder: Where they go, one file each; None: memory.
        progress: Whether the pipeline shows its bar.
        options: What else the pipeline is called with: height, width, guidance_scale, ...

    Raises:
        ValueError: for no prompts, a pipeline without a transformer or of unknown inputs, steps
            that the sampler does not make, or as ``record_calls``.
    """
    transformer = transformer_of(pipeline)
    if not prompts:
        raise ValueError("there are no prompts to calibrate on; give at least one")
    if timestep_argument is None:
        timestep_argument = target_of(transformer).timestep_argument
    keep = kept_steps(num_inference_steps, steps)
    options = _options(pipeline, options) | {"num_inference_steps": num_inference_steps}
    argument = _prompt_argument(pipeline)
    pipeline.set_progress_bar_config(disable=not progress)

    def run() -> None:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            rows = range(first, first + len(batch))
            generators = [generator_for(seed, "calibration", "image", row) for row in rows]
            with torch.no_grad():
                pipeline(**{argument: batch}, generator=generators, **options)

    return record_calls(
        transformer,
        run,
        timestep_argument=timestep_argument,
        keep=keep,
        limit_bytes=limit_bytes,
        folder=folder,
    )


def kept_steps(total: int, steps: int | Collection[int] | None) -> set[int] | None:
    """Which of a sampler's steps are kept.

    Example:
        >>> sorted(kept_steps(50, 5))
        [0, 12, 24, 37, 49]

    Raises:
        ValueError: for steps that the sampler does not make.
    """
    if steps is None:
        return None
    if isinstance(steps, int):
        if not 1 <= steps <= total:
            raise ValueError(f"steps={steps}: the sampler makes {total}; keep 1 to {total} of them")
        return {round(i * (total - 1) / max(steps - 1, 1)) for i in range(steps)}
    outside = sorted(step for step in steps if not 0 <= step < total)
    if outside or not steps:
        raise ValueError(f"steps {outside} to keep: the sampler makes steps 0 to {total - 1}")
    return set(steps)


def _prompt_argument(pipeline: Any) -> str:
    known = inspect.signature(pipeline.__call__).parameters
    found = next((name for name in ("prompt", "class_labels") if name in known), None)
    if found is None:
        raise ValueError(
            f"{type(pipeline).__name__} takes neither prompts nor class labels (it takes "
            f"{', '.join(known)}); record it with record_calls"
        )
    return found


def _options(pipeline: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The caller's options, and no decoding where the pipeline can go without."""
    known = inspect.signature(pipeline.__call__).parameters
    return ({"output_type": "latent"} if "output_type" in known else {}) | options
