"""What a run of post-training quantization is asked to do, read and checked."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dit_qat.dit.models.autoencoder import Autoencoder, check_channels, load_autoencoder
from dit_qat.dit.ptq.calibrate import kept_steps
from dit_qat.dit.ptq.checks import check_method, check_options, check_subject, schedule
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.dit.ptq.results import as_plain
from dit_qat.dit.ptq.settings import Calibration, Evaluation, Patterns, PipelineCall
from dit_qat.dit.ptq.subject import Subject, open_subject
from dit_qat.dit.ptq.target import PTQTarget
from dit_qat.dit.ptq.text_to_image import Drawing, Prompt, check_drawing, read_prompts
from dit_qat.dit.ptq.trajectory import Trajectory
from dit_qat.dit.sampling import SamplerConfig
from dit_qat.export.registry import architecture_of

__all__ = ["PTQJob", "Prepared", "prepare"]

_KINDS = {"ddim": "DDIM", "ddpm": "DDPM", "dpm_solver++": "DPM-Solver++"}


@dataclass(frozen=True)
class PTQJob:
    """What is asked for.

    Attributes:
        model: A source of :func:`~dit_qat.dit.ptq.subject.open_subject`.
        method: How to quantize.
        calibration: On what.
        sampler: How a DiT of ours draws; its seed plays no part.
        pipeline: How a diffusers pipeline is called.
        patterns: Which layers.
        evaluation: What to compare on.
        vae: Decodes the latents of a DiT for the pictures; None: the one beside it, if any.
        seed: Of all that is drawn.
        limit_bytes: What calibration may take.
        device: Where it runs.
    """

    model: str
    method: PTQMethod
    calibration: Calibration = field(default_factory=Calibration)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    pipeline: PipelineCall = field(default_factory=PipelineCall)
    patterns: Patterns = field(default_factory=Patterns)
    evaluation: Evaluation = field(default_factory=Evaluation)
    vae: str | None = None
    seed: int = 0
    limit_bytes: int | None = None
    device: torch.device | str = "cpu"

    def plain(self) -> dict[str, Any]:
        """Plain values: what ``metrics.json`` and a run that goes on know it by."""
        parts = ("calibration", "sampler", "pipeline", "patterns", "evaluation")
        config = asdict(self.method.config)
        return as_plain(
            {"model": self.model, "method": {"name": self.method.name, **config}}
            | {part: asdict(getattr(self, part)) for part in parts}
            | {"vae": self.vae, "seed": self.seed}
        )


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs have been read and checked."""

    job: PTQJob
    subject: Subject
    target: PTQTarget
    prompts: list[str]
    drawn: list[Prompt]
    trajectory: Trajectory | None
    autoencoder: Autoencoder | None

    @property
    def sampler(self) -> SamplerConfig:
        """How a DiT of ours draws."""
        return replace(self.job.sampler, seed=self.job.seed)

    @property
    def drawing(self) -> Drawing:
        """How a pipeline draws prompts."""
        settings, call = self.job.evaluation, self.job.pipeline
        path, layout = settings.prompts, settings.layout
        if layout is None:
            layout = "vbench" if path is not None and path.suffix != ".jsonl" else "geneval"
        return Drawing(call.steps, call.options, self.job.seed, layout, settings.per_prompt)

    @property
    def calibration_text(self) -> str:
        """What it is calibrated on, in words."""
        pipeline, settings = self.subject.pipeline, self.job.calibration
        total = self.sampler.steps if pipeline is None else self.job.pipeline.steps
        kept = kept_steps(total, settings.steps)
        what = f"{settings.images} images" if pipeline is None else f"{len(self.prompts)} prompts"
        return f"{what} at {total if kept is None else len(kept)} of {total} steps"

    @property
    def sampling_text(self) -> str:
        """How images are drawn, in words."""
        if self.subject.pipeline is None:
            guided = f"guidance {self.sampler.guidance:g}"
            plain = "no guidance" if self.sampler.guidance == 1 else guided
            return f"{_KINDS[self.sampler.kind]}, {self.sampler.steps} steps, {plain}"
        call = self.job.pipeline
        options = ", ".join(f"{name} {value}" for name, value in call.options.items())
        name = type(self.subject.pipeline).__name__
        return f"{name}, {call.steps} steps" + (f", {options}" if options else "")


def prepare(job: PTQJob) -> Prepared:
    """Load the model and refuse what would fail later.

    Raises:
        OSError: for files that are not there.
        ValueError: for a model, settings, patterns or a method that do not fit together.
    """
    if job.calibration.prompts is not None:
        job.calibration.read_prompts()  # files first: a pipeline takes minutes to load
    drawn = [] if job.evaluation.prompts is None else read_prompts(job.evaluation.prompts)
    subject = open_subject(job.model, job.device, job.pipeline.dtype)
    sampler = replace(job.sampler, seed=job.seed)
    given = job.pipeline != PipelineCall()
    prompts = check_subject(subject, job.calibration, sampler, given)
    target = job.patterns.target(subject.model)
    architecture_of(subject.model)  # what cannot be packed is not worth the wait
    if subject.pipeline is not None:
        _check_pipeline(job, subject)
        steps = [float(step) for step in range(job.pipeline.steps)]
        check_method(job.method, target, subject, steps, job.calibration.steps)
        kept_steps(job.pipeline.steps, job.calibration.steps)
        prepared = Prepared(job, subject, target, prompts, drawn, None, None)
        if drawn:
            check_drawing(subject.pipeline, drawn, prepared.drawing)
        return prepared
    if drawn:
        raise ValueError(f"{subject.name} draws classes; --evaluation.prompts is for pipelines")
    timesteps = schedule(subject.dit, sampler)
    check_method(job.method, target, subject, timesteps, job.calibration.steps)
    trajectory = Trajectory(subject.dit, sampler, job.evaluation.images)
    return Prepared(job, subject, target, prompts, drawn, trajectory, _autoencoder(job, subject))


def _check_pipeline(job: PTQJob, subject: Subject) -> None:
    check_options(subject.pipeline, job.pipeline.options)
    if job.vae is not None:
        raise ValueError(
            f"{subject.name} is a pipeline and decodes with its own autoencoder; leave --vae out"
        )


def _autoencoder(job: PTQJob, subject: Subject) -> Autoencoder | None:
    """What decodes a DiT's latents for the pictures."""
    source = job.vae or subject.vae
    if source is None:
        return None
    autoencoder = load_autoencoder(source).to(job.device)
    check_channels(autoencoder.space, subject.dit)
    return autoencoder
