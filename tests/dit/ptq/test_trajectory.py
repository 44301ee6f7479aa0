from collections.abc import Callable

import pytest
import torch

from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import Trajectory, float_trajectory, step_errors, trajectory_error
from dit_qat.dit.sampling import SamplerConfig, sample_images

MakeDiT = Callable[..., DiT]
SAMPLERS = {
    "ddim": SamplerConfig(kind="ddim", steps=4),
    "ddim with fresh noise": SamplerConfig(kind="ddim", steps=4, eta=0.5, clip_sample=True),
    "ddpm": SamplerConfig(kind="ddpm", steps=4, seed=3),
    "guided": SamplerConfig(kind="ddim", steps=3, guidance=2.0, guided_channels=None),
    "bf16": SamplerConfig(kind="ddim", steps=3, precision="bf16"),
}


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("classes", [3, 0])
def test_all_steps_give_the_bytes_of_the_sampler(
    make_dit: MakeDiT, name: str, classes: int
) -> None:
    config = SAMPLERS[name]
    if config.guidance != 1.0 and not classes:
        pytest.skip("an unconditional model has no guidance")
    model = make_dit(num_classes=classes)
    config = SamplerConfig(**{**vars(config), "batch_size": 5})
    ((_, images),) = sample_images(model, config, range(5))
    points = Trajectory(model, config, 5).run(model)
    assert len(points) == config.steps + 1
    assert torch.equal(points[-1], images)


def test_a_step_depends_on_x_and_its_number_alone(make_dit: MakeDiT) -> None:
    model = make_dit()
    trajectory = Trajectory(model, SAMPLERS["ddpm"], 2, labels=[2, 0])
    points = float_trajectory(trajectory, model)
    for index in (2, 0, 3, 1):
        assert torch.equal(trajectory.step(model, points[index], index), points[index + 1])
    again = Trajectory(model, SAMPLERS["ddpm"], 2, labels=[2, 0])
    assert torch.equal(again.step(model, points[2], 2), points[3])
    assert torch.equal(points[0], trajectory.start)
    assert trajectory.timesteps == [999.0, 666.0, 333.0, 0.0]
    assert len(trajectory) == 4


def test_the_error_is_relative_and_a_mean_over_steps() -> None:
    start = torch.ones(2, 3)
    exact, found = [start, 2 * start, 4 * start], [start, 3 * start, 4 * start]
    assert step_errors(exact, found) == [0.25, 0.0]
    assert trajectory_error(exact, found) == 0.125
    assert trajectory_error(exact, exact) == 0
    with pytest.raises(ValueError, match="3 and 2 points"):
        trajectory_error(exact, found[:2])


def test_what_has_no_single_steps_is_refused(make_dit: MakeDiT) -> None:
    model = make_dit()
    with pytest.raises(ValueError, match=r'remembers earlier steps.*"ddim" or "ddpm"'):
        Trajectory(model, SamplerConfig(kind="dpm_solver++", steps=4))
    with pytest.raises(ValueError, match="images=0"):
        Trajectory(model, SAMPLERS["ddim"], 0)
    with pytest.raises(ValueError, match="image 1 has label 9"):
        Trajectory(model, SAMPLERS["ddim"], 2, labels=[0, 9])
    with pytest.raises(ValueError, match="no null class"):
        Trajectory(make_dit(class_dropout_prob=0.0), SAMPLERS["guided"], 2)


def test_modes_are_given_back(make_dit: MakeDiT) -> None:
    model = make_dit().train()
    trajectory = Trajectory(model, SAMPLERS["ddim"], 2)
    trajectory.step(model, trajectory.start, 0)
    assert model.training
