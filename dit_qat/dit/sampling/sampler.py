"""Drawing images by a sampler of diffusers, each a function of its index and the seed alone."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from dit_qat.dit.diffusion import NoiseSchedule
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.randomness import generator_for

__all__ = [
    "SamplerConfig",
    "build_scheduler",
    "label_lookup",
    "predict",
    "sample_images",
    "start_noise",
    "step_options",
    "to_uint8",
]

Labels = Sequence[int] | Callable[[int], int]
SamplerKind = Literal["ddpm", "ddim", "dpm_solver++"]
Spacing = Literal["linspace", "leading", "trailing"]
Precision = Literal["fp32", "bf16"]

_TRAINING = NoiseSchedule()


@dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn.

    Attributes:
        kind: "ddpm" (uses the learned variance, if there is one), "ddim" or "dpm_solver++".
        steps: Number of model calls, evenly spaced over the 1000 training timesteps.
        guidance: Classifier-free guidance scale; 1 is plain conditional sampling.
        guided_channels: How many noise channels are guided, None for all.
        eta: Share of fresh noise in DDIM; 0 is deterministic.
        clip_sample: Whether each predicted clean image is clipped to [-1, 1]; for pixel models.
        batch_size: Images per model call; part of what fixes an image's bytes.
        seed: Seed of every image's own generator.
        precision: "bf16" runs the model under autocast; the sampler itself stays in float32.
        spacing: Which timesteps, by diffusers' rules: "linspace" has both ends, as DiT's own code;
            "leading" has 0 and keeps a distance of 1000 // steps; "trailing" has 999.

    Raises:
        ValueError: If a value is outside its range.
    """

    kind: SamplerKind = "ddim"
    steps: int = 50
    guidance: float = 1.0
    guided_channels: int | None = 3
    eta: float = 0.0
    clip_sample: bool = False
    batch_size: int = 256
    seed: int = 0
    precision: Precision = "fp32"
    spacing: Spacing = "linspace"

    def __post_init__(self) -> None:
        _require(self.kind in get_args(SamplerKind), self, "kind", _one_of(SamplerKind))
        # DPM-Solver++ spaces steps + 1 points over the timesteps, and no two may coincide.
        limit = _TRAINING.steps - (self.kind == "dpm_solver++")
        _require(1 <= self.steps <= limit, self, "steps", f"1 to {limit} for {self.kind}")
        finite = math.isfinite(self.guidance)
        _require(finite and self.guidance >= 0, self, "guidance", "a finite number from 0")
        channels = self.guided_channels
        _require(channels is None or channels > 0, self, "guided_channels", "None or at least 1")
        _require(0 <= self.eta <= 1, self, "eta", "0 to 1")
        _require(self.eta == 0 or self.kind == "ddim", self, "eta", 'above 0 only for kind="ddim"')
        _require(self.batch_size > 0, self, "batch_size", "at least 1")
        _require(self.precision in get_args(Precision), self, "precision", _one_of(Precision))
        _require(self.spacing in get_args(Spacing), self, "spacing", _one_of(Spacing))


def sample_images(
    model: DiT,
    config: SamplerConfig,
    indices: Iterable[int],
    labels: Labels | None = None,
    progress: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Draw the images with these indices, batch by batch.

    Image i always has the same bytes on a given machine, whatever else is asked for and in
    whatever order: it has its own generator, and batch k always computes indices k * batch_size
    to (k + 1) * batch_size - 1, the ones not asked for included, because a matrix product rounds
    a row differently when the number of rows changes.

    Args:
        model: A float or quantized DiT; its device is used.
        config: How to sample.
        indices: Which images, from 0; no duplicates.
        labels: One label per index asked for, or a function from any index to its label. Without
            it, image i has label ``i % num_classes``.
        progress: Whether to show a bar over model calls.

    Returns:
        An iterator over (indices, images (n, C, H, W)), float32 in the model's space.

    Raises:
        ValueError: If indices or labels are invalid, or guidance needs a null class that the
            model lacks; from the iterator, if images are not finite.
    """
    wanted = list(indices)
    if len(set(wanted)) != len(wanted) or min(wanted, default=0) < 0:
        raise ValueError("image indices must be from 0 and without duplicates")
    if config.guidance != 1.0:
        _ = model.null_class  # raises where guidance is impossible
    return _batches(model, config, wanted, label_lookup(model, wanted, labels), progress)


def to_uint8(images: Tensor) -> Tensor:
    """Map [-1, 1] to the nearest of 0 to 255, as uint8; values outside are clipped.

    Example:
        >>> to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0]))
        tensor([  0,   0, 128, 255], dtype=torch.uint8)
    """
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _batches(
    model: DiT,
    config: SamplerConfig,
    indices: list[int],
    label_of: Callable[[int], int] | None,
    progress: bool,
) -> Iterator[tuple[list[int], Tensor]]:
    size = config.batch_size
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(index // size * size, []).append(index)
    started, drawn = time.perf_counter(), 0
    # Without smoothing, what happens between batches (decoding, writing) counts in the ETA.
    steps = len(groups) * config.steps
    with tqdm(total=steps, disable=not progress, unit="step", smoothing=0) as bar:
        for first, group in groups.items():
            rows = range(first, first + size)
            y = None if label_of is None else torch.tensor([label_of(row) for row in rows])
            images = _sample_batch(model, config, rows, y, bar)
            asked_for = images[[index - first for index in group]]
            _check_finite(asked_for)
            yield group, asked_for
            drawn += len(group)
            rate = drawn / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate:.3g} images/s", refresh=False)


def _check_finite(images: Tensor) -> None:
    """Refuse what rounding to uint8 would turn into black images, which scores would accept."""
    broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(images)} images drawn hold NaN or infinite values: most likely the "
            "weights diverged in training; take an earlier checkpoint (or, if it is the sampler, "
            'less guidance or precision="fp32")'
        )


def _sample_batch(
    model: DiT, config: SamplerConfig, rows: range, y: Tensor | None, bar: "tqdm[Any]"
) -> Tensor:
    """Compute one whole batch of the index grid, (len(rows), C, H, W)."""
    device = next(model.parameters()).device
    generators = [generator_for(config.seed, "image", row) for row in rows]
    x = start_noise(model, generators).to(device)
    y = None if y is None else y.to(device)
    scheduler, timesteps = build_scheduler(config, model.learn_sigma)
    options = step_options(config, generators)
    with _evaluating(model), torch.inference_mode():
        for t, step in zip(timesteps, scheduler.timesteps, strict=True):
            output = predict(model, config, x, torch.full((len(rows),), t, device=device), y)
            if config.kind != "ddpm":
                output = output[:, : model.in_channels]
            x = scheduler.step(output, step, x, **options).prev_sample
            bar.update()
    return x


def start_noise(model: DiT, generators: Iterable[torch.Generator]) -> Tensor:
    """First noise of one image per generator, on the CPU: (N, C, H, W)."""
    shape = (1, model.in_channels, model.input_size, model.input_size)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


def predict(model: DiT, config: SamplerConfig, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """Call the model, guided if asked, in the configured precision: float32 out."""
    bf16 = config.precision == "bf16"
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
        if y is None or config.guidance == 1.0:
            output: Tensor = model(x, t, y)
        else:
            null = torch.full_like(y, model.null_class)
            output = model.forward_with_cfg(
                torch.cat([x, x]),
                torch.cat([t, t]),
                torch.cat([y, null]),
                config.guidance,
                config.guided_channels,
            )[: x.shape[0]]
    return output.float()


def build_scheduler(config: SamplerConfig, learned_variance: bool) -> tuple[Any, list[int]]:
    """Return a diffusers scheduler, and the training timestep for each of its steps.

    DDPM and DDIM run on a schedule of their own that has only the chosen timesteps, as in the
    improved-DDPM code. Given the full schedule instead, diffusers' DDIM takes the step before t to
    be t - 1000 // steps, which is not where its next "linspace" timestep lies.
    """
    if config.kind == "dpm_solver++":
        solver = DPMSolverMultistepScheduler(
            num_train_timesteps=_TRAINING.steps,
            beta_start=_TRAINING.beta_start,
            beta_end=_TRAINING.beta_end,
            beta_schedule="linear",
            timestep_spacing=config.spacing,
            # With its maximum at 1, "dynamic thresholding" is clipping to [-1, 1].
            thresholding=config.clip_sample,
            sample_max_value=1.0,
        )
        solver.set_timesteps(config.steps)
        return solver, solver.timesteps.tolist()
    timesteps = _spaced_timesteps(config.steps, config.spacing)
    kept = torch.tensor([1.0, *_TRAINING.alphas_cumprod[timesteps].tolist()], dtype=torch.float64)
    respaced = {
        "num_train_timesteps": config.steps,
        "trained_betas": (1 - kept[1:] / kept[:-1]).tolist(),
        "timestep_spacing": "linspace",  # all of those that are left
        "clip_sample": config.clip_sample,
    }
    if config.kind == "ddim":
        scheduler = DDIMScheduler(**respaced)
    else:
        variance = "learned_range" if learned_variance else "fixed_small"
        scheduler = DDPMScheduler(variance_type=variance, **respaced)
    scheduler.set_timesteps(config.steps)
    return scheduler, timesteps[::-1]


def _spaced_timesteps(steps: int, spacing: Spacing) -> list[int]:
    """Timesteps of DDPM and DDIM in rising order (table 2 of arXiv:2305.08891)."""
    count = _TRAINING.steps
    if spacing == "leading":
        return [i * (count // steps) for i in range(steps)]
    if spacing == "trailing":
        # numpy's own sums, which decide where a half is rounded to; they can go one point too far.
        falling = np.arange(count, 0, -count / steps)[:steps].round().astype(int) - 1
        return [int(t) for t in falling[::-1]]
    if steps == 1:
        return [count - 1]  # where diffusers would take 0; a single step has to start from noise
    return [round((count - 1) * i / (steps - 1)) for i in range(steps)]


def step_options(config: SamplerConfig, generators: list[torch.Generator]) -> dict[str, Any]:
    """What a scheduler's ``step`` takes beside the prediction, the timestep and x."""
    if config.kind == "ddpm":
        return {"generator": generators}
    if config.kind == "dpm_solver++":
        return {}
    return {
        "eta": config.eta,
        "generator": generators,
        # The noise that belongs to the clipped image, as in the improved-DDPM code.
        "use_clipped_model_output": config.clip_sample,
    }


def label_lookup(
    model: DiT, indices: list[int], labels: Labels | None
) -> Callable[[int], int] | None:
    """Return the label of any index, or None for an unconditional model.

    Raises:
        ValueError: for labels that the model does not have, or not one per index.
    """
    classes = model.num_classes
    if not classes:
        if labels is not None:
            raise ValueError("this DiT is unconditional (num_classes=0): pass no labels")
        return None
    given = {}
    if labels is not None and not callable(labels):
        if len(labels) != len(indices):
            raise ValueError(f"{len(labels)} labels for {len(indices)} indices; give one per index")
        given = dict(zip(indices, labels, strict=True))
    rows = classes + (model.class_dropout_prob > 0)

    def label_of(index: int) -> int:
        label = labels(index) if callable(labels) else given.get(index, index % classes)
        if not 0 <= label < rows:
            raise ValueError(f"image {index} has label {label}; this model has 0 to {rows - 1}")
        return int(label)

    for index in indices:  # now, rather than hours into a run
        label_of(index)
    return label_of


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, and each back into its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _one_of(kinds: Any) -> str:
    return "one of " + ", ".join(map(repr, get_args(kinds)))


def _require(condition: bool, config: SamplerConfig, name: str, limit: str) -> None:
    if not condition:
        raise ValueError(f"SamplerConfig({name}={getattr(config, name)!r}): must be {limit}")
