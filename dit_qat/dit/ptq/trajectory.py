"""The path from noise to images, step by step, for a float and a quantized model alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_qat.calibration import evaluating
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.randomness import generator_for
from dit_qat.dit.sampling.sampler import (
    Labels,
    SamplerConfig,
    build_scheduler,
    label_lookup,
    predict,
    start_noise,
    step_options,
)

__all__ = ["Trajectory", "float_trajectory", "step_errors", "trajectory_error"]


class Trajectory:
    """A few images on their way from noise, each a function of its index and the seed.

    A step depends on x and its number alone, so that a search may go on from any point. Stepping
    through all of them gives the bytes of
    :func:`~dit_qat.dit.sampling.sample_images` with these images as one batch.

    Args:
        model: Gives the sizes; any float or quantized DiT of the same may take the steps.
        config: How to sample; ``batch_size`` plays no part.
        images: How many images, from index 0.
        labels: As for ``sample_images``.

    Attributes:
        start: First noise (N, C, H, W).
        timesteps: The model's timestep at each step.

    Raises:
        ValueError: for a sampler that remembers earlier steps, no images, or wrong labels.
    """

    def __init__(
        self, model: DiT, config: SamplerConfig, images: int = 8, labels: Labels | None = None
    ) -> None:
        if config.kind == "dpm_solver++":
            raise ValueError(
                'kind="dpm_solver++" remembers earlier steps, so no step can be taken on its own; '
                'use "ddim" or "ddpm"'
            )
        if images < 1:
            raise ValueError(f"images={images}: a trajectory needs at least 1")
        if config.guidance != 1.0:
            _ = model.null_class  # raises where guidance is impossible
        self.config = config
        indices = list(range(images))
        label_of = label_lookup(model, indices, labels)
        self._labels = None if label_of is None else torch.tensor([label_of(i) for i in indices])
        self._generators = [generator_for(config.seed, "image", i) for i in indices]
        self.start = start_noise(model, self._generators)
        # Where each image's generator stands before each step.
        self._states = [[g.get_state() for g in self._generators]]
        self._scheduler, timesteps = build_scheduler(config, model.learn_sigma)
        self.timesteps: list[float] = [float(t) for t in timesteps]

    def __len__(self) -> int:
        return len(self.timesteps)

    @torch.no_grad()
    def step(self, model: DiT, x: Tensor, index: int) -> Tensor:
        """Take step number ``index`` from x (N, C, H, W), on the device of x."""
        t = torch.full((len(x),), int(self.timesteps[index]), device=x.device)
        y = None if self._labels is None else self._labels.to(x.device)
        with evaluating(model):
            output = predict(model, self.config, x, t, y)
        if self.config.kind != "ddpm":
            output = output[:, : model.in_channels]
        for generator, state in zip(self._generators, self._noise_states(index, x), strict=True):
            generator.set_state(state)
        options = step_options(self.config, self._generators)
        time = self._scheduler.timesteps[index]
        stepped: Tensor = self._scheduler.step(output, time, x, **options).prev_sample
        return stepped

    def run(self, model: DiT) -> list[Tensor]:
        """Take all steps: x before the first step and after each, ``len(self) + 1`` in all."""
        device = next(model.parameters()).device
        points = [self.start.to(device)]
        for index in range(len(self)):
            points.append(self.step(model, points[-1], index))
        return points

    def _noise_states(self, index: int, x: Tensor) -> list[Tensor]:
        """States of the generators before a step: each step draws one noise per image."""
        while len(self._states) <= index:
            for generator, state in zip(self._generators, self._states[-1], strict=True):
                generator.set_state(state)
                torch.randn((1, *x.shape[1:]), generator=generator)
            self._states.append([generator.get_state() for generator in self._generators])
        return self._states[index]


def float_trajectory(trajectory: Trajectory, model: DiT) -> list[Tensor]:
    """What a float model makes of a trajectory: x before the first step and after each."""
    return trajectory.run(model)


def trajectory_error(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Mean over steps of ``||x_q - x_f||^2 / ||x_f||^2``; the common start does not count.

    Args:
        reference: x_f before the first step and after each.
        found: x_q, as many.

    Raises:
        ValueError: for trajectories of different lengths.
    """
    return sum(errors := step_errors(reference, found)) / len(errors)


def step_errors(reference: Sequence[Tensor], found: Sequence[Tensor]) -> list[float]:
    """``||x_q - x_f||^2 / ||x_f||^2`` after every step; as :func:`trajectory_error`."""
    if len(reference) != len(found) or len(found) < 2:
        raise ValueError(
            f"trajectories of {len(reference)} and {len(found)} points; both need the start and "
            "every step"
        )
    errors = []
    for x, y in zip(reference[1:], found[1:], strict=True):
        difference = (y.to(x.device) - x).double().square().sum()
        errors.append(float(difference / x.double().square().sum()))
    return errors
