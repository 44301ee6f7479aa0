"""A quantized model beside its float one: errors, scores, and pictures of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_qat.calibration import CallStore
from dit_qat.dit.experiment import score
from dit_qat.dit.models.autoencoder import Autoencoder
from dit_qat.dit.ptq.evaluation import (
    OutputErrors,
    PathErrors,
    output_errors,
    path_errors,
    spread_calls,
)
from dit_qat.dit.ptq.latent_path import LatentPath, PathSums
from dit_qat.dit.ptq.report import Score
from dit_qat.dit.ptq.settings import Evaluation
from dit_qat.dit.ptq.similarity import PairScorer
from dit_qat.dit.ptq.subject import Subject
from dit_qat.dit.ptq.text_to_image import Drawing, draw_prompt, using
from dit_qat.dit.ptq.trajectory import Trajectory
from dit_qat.dit.sampling import to_uint8

__all__ = ["Comparison", "compare_dit", "compare_pipeline"]

_PICTURED = 100
_PIXEL_CHANNELS = (1, 3)
_LABELS = {
    "fd_digits": "FD-digits, lower is better",
    "precision": "Precision",
    "recall": "Recall",
    "class_accuracy": "Class accuracy",
    "psnr": "PSNR to the float images, dB",
    "ssim": "SSIM to the float images",
    "lpips": "LPIPS to the float images, lower is better",
}


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        errors: On recorded calls.
        path: Along the path of x, or of a pipeline's latents; None where it does not show them.
        scores: Lines of the report.
        plain: The same for ``metrics.json``.
        pictures: Images of both, uint8 (N, C, H, W); None for latents without a decoder.
        notes: Sentences for the report.
    """

    errors: OutputErrors
    path: PathErrors | None
    scores: Sequence[Score] = ()
    plain: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[Tensor, Tensor] | None = None
    notes: Sequence[str] = ()


def compare_dit(
    subject: Subject,
    reference: nn.Module,
    store: CallStore,
    trajectory: Trajectory,
    settings: Evaluation,
    *,
    autoencoder: Autoencoder | None = None,
    scored: bool = False,
    progress: bool = False,
) -> Comparison:
    """Compare a DiT of ours with its float twin.

    Args:
        subject: Holds the quantized model.
        reference: The float model.
        store: Recorded calls.
        trajectory: The images that both draw.
        settings: How much.
        autoencoder: Decodes latents for the pictures.
        scored: Score FD-digits, which only the embedded model's images have.
        progress: Whether to show bars.
    """
    from dit_qat.dit.models import DiT

    assert isinstance(reference, DiT)
    errors = output_errors(
        subject.model, reference, spread_calls(store, settings.calls), progress=progress
    )
    path = path_errors(subject.dit, reference, trajectory)
    if not (scored and settings.samples):
        pictures = _decoded(subject.dit, path, autoencoder)
        return Comparison(errors, path, pictures=pictures)
    before, after = (
        score(model, trajectory.config, settings.samples, progress)
        for model in (reference, subject.dit)
    )
    lines = [
        Score(label, before.scores[name], after.scores[name])
        for name, label in _LABELS.items()
        if name in after.scores
    ]
    plain = {"float": before.scores, "quantized": after.scores}
    pictures = (before.images[:_PICTURED], after.images[:_PICTURED])
    return Comparison(errors, path, lines, plain, pictures, (_FD_NOTE,))


def compare_pipeline(
    subject: Subject,
    reference: nn.Module,
    store: CallStore,
    prompts: Sequence[str],
    drawing: Drawing,
    settings: Evaluation,
    *,
    timestep_argument: str = "timestep",
    progress: bool = False,
) -> Comparison:
    """Compare a pipeline with its quantized and its float transformer, on a few prompts.

    Args:
        subject: Holds the pipeline and the quantized model.
        reference: The float transformer.
        store: Recorded calls.
        prompts: To draw; the first few are.
        drawing: How.
        settings: How much.
        timestep_argument: What the transformer's forward calls the timestep.
        progress: Whether to show bars.
    """
    errors = output_errors(
        subject.model, reference, spread_calls(store, settings.calls), progress=progress
    )
    sums = PathSums()
    scorer = PairScorer(device=next(reference.parameters()).device)
    drawn: list[list[Tensor]] = [[], []]
    found: list[dict[str, float]] = []
    for at, prompt in enumerate(prompts[: settings.images]):
        pair, paths = [], []
        for model in (reference, subject.model):
            path = LatentPath(subject.pipeline, timestep_argument)
            with using(subject.pipeline, model), path.listening(model):
                pair.append(draw_prompt(subject.pipeline, prompt, drawing, at, path=path))
            paths.append(path)
        sums.add(*paths)
        found.append(scorer(prompt, *pair))
        for images, frames in zip(drawn, pair, strict=True):
            middle = np.ascontiguousarray(frames[len(frames) // 2])
            images.append(torch.from_numpy(middle).permute(2, 0, 1))
    plain = {name: sum(s[name] for s in found) / len(found) for name in found[0]}
    along = sums.errors()
    return Comparison(
        errors,
        along,
        score_lines(plain),
        {"similarity": plain, "images": len(found), "missing": scorer.missing},
        (torch.stack(drawn[0]), torch.stack(drawn[1])),
        (*scorer.missing.values(), *(() if along else (_NO_PATH,))),
    )


def score_lines(found: Mapping[str, float], of: str = "") -> list[Score]:
    """Lines of the report for what a :class:`PairScorer` found; ``of`` ends each label."""
    lines = [Score(text + of, None, found[n], ".4g") for n, text in _LABELS.items() if n in found]
    clip = [found.get(f"clip_score_{name}") for name in ("float", "quantized")]
    if clip[1] is not None:
        lines.append(Score(f"CLIPScore{of}", clip[0], clip[1], ".4g"))
    return lines


def _decoded(
    model: nn.Module, path: PathErrors, autoencoder: Autoencoder | None
) -> tuple[Tensor, Tensor] | None:
    ends = path.reference, path.found
    if autoencoder is not None:
        ends = autoencoder.decode(ends[0]), autoencoder.decode(ends[1])
    elif path.found.shape[1] not in _PIXEL_CHANNELS:
        return None
    return to_uint8(ends[0].cpu()), to_uint8(ends[1].cpu())


_NO_PATH = (
    "There is no trajectory error: this pipeline does not show its latents step by step (it takes "
    "no callback_on_step_end)."
)
_FD_NOTE = (
    "FD-digits is no FID: it is a squared Fréchet distance between features of a small digit "
    "classifier. It does not reach zero: perfect samples, 1,797 drawn anew from the real images, "
    "score 2.6 to 4.9 nine times out of ten, and differences of 1 to 2 are noise."
)
