"""A DiT in diffusers' ``DiTPipeline``: as a folder that needs us no more, or packed in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dit_qat.dit.diffusion import NoiseSchedule
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.locate import PIPELINE_INDEX
from dit_qat.dit.models.packed_source import load_packed_dit
from dit_qat.dit.models.to_diffusers import check_diffusers, dit_to_diffusers
from dit_qat.export.files import write_json
from dit_qat.export.loader import load_quantized
from dit_qat.export.manifest import Manifest, read_manifest
from dit_qat.export.tensor_file import DTYPES

if TYPE_CHECKING:
    from diffusers import DiTPipeline

    from dit_qat.dit.models.autoencoder import Autoencoder

__all__ = [
    "PackedTransformer",
    "check_pipeline",
    "packed_pipeline",
    "packed_transformer",
    "pipeline_scheduler",
    "read_labels",
    "write_pipeline",
]

_CLASSES = 1000
_LABELS = "id2label"


def check_pipeline(model: DiT, autoencoder: "Autoencoder") -> None:
    """Refuse what a folder of ``DiTPipeline`` cannot draw with.

    Raises:
        ValueError: Unless the model has 1,000 classes and fits diffusers' class and the
            autoencoder.
    """
    check_diffusers(model)
    _check_drawn(model, autoencoder)


def _check_drawn(model: DiT, autoencoder: "Autoencoder") -> None:
    """Refuse what the code of ``DiTPipeline`` does not fit, whatever its transformer is."""
    if model.num_classes != _CLASSES:
        raise ValueError(
            f"num_classes={model.num_classes}: diffusers' DiTPipeline hard-codes {_CLASSES} as the "
            "null class, so it guides models of that many classes only; use the format diffusers "
            "(the transformer alone) or dit_qat"
        )
    _ = model.null_class  # raises where guidance is impossible
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


class PackedTransformer(nn.Module):
    """A DiT of ours under the name, the call and the configuration that ``DiTPipeline`` uses.

    It computes timestep frequencies by its own convention (``timestep_shift``), which diffusers'
    class could not.

    Args:
        network: Packed, float or quantized.

    Attributes:
        config: What the pipeline asks for: sample_size, in_channels, out_channels.
    """

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.network = network
        self.config = FrozenDict(
            sample_size=network.input_size,
            in_channels=network.in_channels,
            out_channels=network.out_channels,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents that it takes."""
        return self.network.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.network.pos_embed.device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
    ) -> Transformer2DModelOutput:
        """Latents (N, C, H, W), timesteps (N,) and labels (N,) to predictions, as ``.sample``."""
        return Transformer2DModelOutput(self.network(hidden_states, timestep, class_labels))


def packed_transformer(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Load a packed folder as what a diffusers pipeline has for a ``transformer``.

    A transformer of diffusers comes back as its own class, with the dtypes that were packed; a DiT
    of ours as a :class:`PackedTransformer`, for ``DiTPipeline``. Bits by timestep are followed.

    Args:
        folder: What ``dit-qat ptq`` or ``dit-qat export`` wrote.
        device: Where it goes.

    Raises:
        FileNotFoundError: If the folder lacks a file.
        ValueError: If it is damaged.

    Example::

        pipeline = FluxPipeline.from_pretrained("flux", transformer=None, torch_dtype=bfloat16)
        pipeline.transformer = packed_transformer("flux-adatsq")
        pipeline.to("cuda")
    """
    network = load_quantized(folder, device)
    if isinstance(network, DiT):
        return PackedTransformer(network)
    _restore_dtypes(network, read_manifest(folder))
    return network


def _restore_dtypes(network: nn.Module, manifest: Manifest) -> None:
    """Compute in what the file holds, rather than in float32: a pipeline has one dtype."""
    for name, value in network.named_parameters(remove_duplicate=False):
        value.data = value.data.to(DTYPES[manifest.tensors[name].dtype])
    for name, buffer in network.named_buffers(remove_duplicate=False):
        if name in manifest.tensors:
            buffer.data = buffer.data.to(DTYPES[manifest.tensors[name].dtype])


def packed_pipeline(
    folder: Path | str, vae: str, device: torch.device | str = "cpu"
) -> "DiTPipeline":
    """Load a packed folder as a ``DiTPipeline`` that generates from packed weights.

    With N steps that divide 1000, it draws what our DDIM draws at ``spacing="leading"`` with all
    channels guided. The pipeline lives in memory; ``save_pretrained`` cannot hold packed weights,
    for which the folder is there.

    Args:
        folder: What ``dit-qat export`` wrote, of a latent model of 1,000 classes.
        vae: Folder of its autoencoder or of a pipeline with one, or a hub id; of a pipeline's
            folder, the names of classes come along.
        device: Where all of it goes.

    Raises:
        FileNotFoundError: If a folder lacks a file.
        ValueError: If the folder is damaged, or the pipeline's code does not fit the model, or the
            autoencoder is not that of the training.

    Example::

        pipeline = packed_pipeline("dit-xl2-a3", "facebook/DiT-XL-2-256", "cuda")
        image = pipeline([207], num_inference_steps=50).images[0]
    """
    from diffusers import DiTPipeline  # seconds, which only this costs

    from dit_qat.dit.models.autoencoder import load_autoencoder

    network, autoencoder = load_packed_dit(Path(folder), device), load_autoencoder(vae)
    _check_drawn(network, autoencoder)
    trained = read_manifest(folder).provenance.get("latent_space")
    if trained is not None and trained["sha256"] != autoencoder.space.sha256:
        raise ValueError(
            f"{vae} is not the autoencoder that {folder} was trained with, {trained['source']} "
            f"(sha256 {autoencoder.space.sha256[:16]} here, {trained['sha256'][:16]} there); give "
            "that one"
        )
    pipeline: DiTPipeline = DiTPipeline(
        transformer=PackedTransformer(network),
        vae=autoencoder.network,
        scheduler=pipeline_scheduler(),
        id2label=read_labels(Path(vae) / "transformer"),
    )
    return pipeline.to(device)


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
