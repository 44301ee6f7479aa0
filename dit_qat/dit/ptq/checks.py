"""What a run would fail on hours later, refused before it starts."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dit_qat.calibration.target import Target
from dit_qat.dit.methods.adatsq import AdaTSQ
from dit_qat.dit.methods.clq import CLQ
from dit_qat.dit.methods.clq.smoothing import smoothings
from dit_qat.dit.methods.rotation import rotation_of
from dit_qat.dit.models import DiT
from dit_qat.dit.ptq.calibrate import kept_steps
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.dit.ptq.settings import Calibration
from dit_qat.dit.ptq.subject import Subject
from dit_qat.dit.sampling import SamplerConfig
from dit_qat.dit.sampling.sampler import build_scheduler
from dit_qat.layers.step_bits import StepBits

__all__ = ["check_method", "check_options", "check_subject", "schedule"]

_OURS_TO_GIVE = (
    *("prompt", "class_labels", "num_inference_steps", "generator", "output_type", "return_dict"),
    *("callback", "callback_on_step_end"),
)
_ROTATED = "static_dynamic"  # the balance of ViDiT-Q that rotates


def check_method(
    method: PTQMethod, target: Target, subject: Subject, timesteps: Sequence[float], kept: Any
) -> None:
    """Refuse a method that this model or schedule is not for.

    Args:
        method: Whose own settings have been checked already.
        target: The layers.
        subject: The model.
        timesteps: Of the schedule, in order; numbers of steps where they are not known yet.
        kept: Which steps are recorded: as :attr:`Calibration.steps`.

    Raises:
        ValueError: for a width without a rotation, a search along a path that a pipeline does not
            show, or kept steps that do not cover the schedule of a policy.
    """
    for name, linear in target.linears().items():
        _check_rotation(method, linear.in_features, name)
    if not isinstance(method, AdaTSQ):
        return
    if method.config.mode == "path":
        if subject.pipeline is None:
            return
        raise ValueError(
            f'{method.name} with mode="path" follows a sampler of our DiTs, and {subject.name} is '
            'a pipeline; use mode="teacher_forced", which searches on recorded calls'
        )
    keep = kept_steps(len(timesteps), kept)
    if keep is not None:
        recorded = [timesteps[step] for step in sorted(keep)]
        covered = StepBits(tuple(recorded), (8,) * len(recorded))
        try:
            for timestep in timesteps:
                covered.index(timestep)
        except ValueError as error:
            raise ValueError(
                f"a policy of steps {sorted(keep)} would not cover the schedule ({error}); "
                "keep more of them: --calibration.steps N keeps N evenly, both ends included"
            ) from error


def _check_rotation(method: PTQMethod, width: int, layer: str) -> None:
    """Build what a method will rotate a width by."""
    config = method.config
    if isinstance(method, CLQ):
        smoothings(torch.ones(width), ("none",), config.block_size, (None,), layer)
    elif isinstance(method, AdaTSQ):
        if config.weights.base == "hadamard":
            rotation_of(width, None, layer)
    elif hasattr(config, "block_size") and getattr(config, "balance", _ROTATED) == _ROTATED:
        rotation_of(width, None, layer, config.block_size)


def check_subject(
    subject: Subject, calibration: Calibration, sampler: SamplerConfig, pipeline_given: bool
) -> list[str]:
    """Refuse settings of the other kind of model, and labels or prompts that are missing.

    Returns:
        The prompts of a pipeline.

    Raises:
        FileNotFoundError: if the file of prompts is not there.
        ValueError: see above.
    """
    if subject.pipeline is not None:
        if sampler != SamplerConfig(seed=sampler.seed):
            raise ValueError(
                f"{subject.name} is a pipeline and has its own scheduler; leave --sampler out and "
                "set --pipeline.steps, --pipeline.guidance and --pipeline.batch_size"
            )
        if getattr(subject.pipeline, "transformer_2", None) is not None:
            raise ValueError(
                f"{subject.name} has two transformers, each for steps of its own, and only one is "
                "quantized here; give a pipeline with one"
            )
        if calibration.classes is not None:
            raise ValueError(
                f"{subject.name} draws prompts; give --calibration.prompts, no classes"
            )
        return calibration.read_prompts()
    if pipeline_given:
        raise ValueError(
            f"{subject.name} is a DiT, not a pipeline of diffusers; leave --pipeline out and set "
            "--sampler.steps, --sampler.guidance and --sampler.batch_size"
        )
    if calibration.prompts is not None:
        raise ValueError(
            f"{subject.name} draws classes, not prompts; leave --calibration.prompts out (by "
            "default all classes are drawn in turn)"
        )
    _check_classes(subject.dit, calibration.classes)
    if sampler.guidance != 1.0:
        _ = subject.dit.null_class  # raises where guidance is impossible
    kept_steps(sampler.steps, calibration.steps)
    return []


def check_options(pipeline: Any, options: Mapping[str, Any]) -> None:
    """Refuse what a pipeline cannot be called with, or is given anyway.

    Raises:
        ValueError: naming the option, and what there is.
    """
    known = inspect.signature(pipeline.__call__).parameters
    name = type(pipeline).__name__
    given = sorted(set(options) & set(_OURS_TO_GIVE))
    if given:
        raise ValueError(
            f"pipeline option {given[0]!r}: this command gives it itself; leave it out of "
            "--pipeline.more"
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    unknown = [option for option in options if option not in known]
    if unknown:
        free = ", ".join(option for option in known if option not in _OURS_TO_GIVE)
        raise ValueError(f"{name} takes no {unknown[0]!r}; leave it out (it takes {free})")


def schedule(model: DiT, sampler: SamplerConfig) -> list[float]:
    """Timesteps of a DiT's sampler, in order."""
    _, timesteps = build_scheduler(sampler, model.learn_sigma)
    return [float(t) for t in timesteps]


def _check_classes(model: DiT, classes: Sequence[int] | None) -> None:
    if classes is None:
        return
    if not model.num_classes:
        raise ValueError("this DiT knows no classes; leave --calibration.classes out")
    wrong = [label for label in classes if not 0 <= label < model.num_classes]
    if wrong:
        raise ValueError(
            f"class {wrong[0]} for calibration: this DiT has classes 0 to {model.num_classes - 1}"
        )
