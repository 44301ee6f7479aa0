"""A DiT as a folder of diffusers' ``DiTPipeline``, which generates without this package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import DDIMScheduler

from dit_qat.dit.diffusion import NoiseSchedule
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.locate import PIPELINE_INDEX
from dit_qat.dit.models.to_diffusers import check_diffusers, dit_to_diffusers
from dit_qat.export.files import write_json

if TYPE_CHECKING:
    from dit_qat.dit.models.autoencoder import Autoencoder

__all__ = ["check_pipeline", "pipeline_scheduler", "read_labels", "write_pipeline"]

_CLASSES = 1000
_LABELS = "id2label"


def check_pipeline(model: DiT, autoencoder: "Autoencoder") -> None:
    """Refuse what ``DiTPipeline`` cannot draw with.

    Raises:
        ValueError: Unless the model has 1,000 classes and fits diffusers' class and the
            autoencoder.
    """
    check_diffusers(model)
    if model.num_classes != _CLASSES:
        raise ValueError(
            f"num_classes={model.num_classes}: diffusers' DiTPipeline hard-codes {_CLASSES} as the "
            "null class, so it guides models of that many classes only; use the format diffusers "
            "(the transformer alone) or dit_qat"
        )
    space = autoencoder.space
    if space.channels != model.in_channels:
        raise ValueError(
            f"{space.source}: its latents have {space.channels} channels, and the DiT has "
            f"in_channels={model.in_channels}; give the autoencoder that the DiT was trained with"
        )
    if space.shift_factor:
        raise ValueError(
            f"{space.source}: has shift_factor={space.shift_factor}, which DiTPipeline ignores, so "
            "its images would be wrong; use the format diffusers (the transformer alone)"
        )


def pipeline_scheduler() -> DDIMScheduler:
    """The scheduler of the training schedule, whose steps are those of DDIM with eta 0.

    With N steps that divide 1000, the pipeline is our DDIM at ``spacing="leading"`` with all
    channels guided.
    """
    schedule = NoiseSchedule()
    return DDIMScheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        steps_offset=0,
    )


def write_pipeline(
    folder: Path, model: DiT, autoencoder: "Autoencoder", labels: Mapping[str, str] | None = None
) -> None:
    """Write model_index.json, transformer/, vae/ and scheduler/ into an empty folder.

    Args:
        folder: Where to write.
        model: A float DiT with diffusers' timestep frequencies.
        autoencoder: That of the model's latents.
        labels: Names of classes (several are separated by commas) by number; by default numbers.

    Raises:
        ValueError: As :func:`check_pipeline`.
    """
    from diffusers import DiTPipeline  # seconds, which only this costs

    check_pipeline(model, autoencoder)
    pipeline = DiTPipeline(
        transformer=dit_to_diffusers(model),
        vae=autoencoder.network,
        scheduler=pipeline_scheduler(),
    )
    pipeline.save_pretrained(folder)
    # diffusers reads the names of classes from its index, and does not write them there.
    index = json.loads((folder / PIPELINE_INDEX).read_text(encoding="utf-8"))
    names = labels or {str(i): str(i) for i in range(_CLASSES)}
    write_json(folder / PIPELINE_INDEX, index | {_LABELS: dict(names)})


def read_labels(transformer: Path) -> dict[str, str] | None:
    """Names of classes, by number, from the pipeline that a transformer's folder stands in, if any.

    Raises:
        ValueError: If the pipeline's index is damaged.
    """
    path = transformer.parent / PIPELINE_INDEX
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text(encoding="utf-8")).get(_LABELS)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}: no JSON object ({error}); copy or download it again") from error
    if labels is None:
        return None
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        raise ValueError(f"{path}: its {_LABELS} is no object of names; remove it, or mend it")
    return labels
