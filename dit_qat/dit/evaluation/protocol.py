"""The protocol card: everything that a score depends on, beside the score."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_qat import __version__
from dit_qat.dit.evaluation.references import Reference
from dit_qat.dit.evaluation.scoring import KID_SUBSETS, NEIGHBOURS, Comparison, kid_subset
from dit_qat.dit.evaluation.sources import ImageSource

__all__ = [
    "ADM_REFERENCE",
    "UNKNOWN",
    "Protocol",
    "find_record",
    "protocol_of",
    "record_folder",
]

UNKNOWN = "unknown"
"""Stands where nobody wrote down what was done."""

ADM_REFERENCE = "ADM's layout: statistics, and images"

_SUBFOLDERS = ("images", "shards", "samples.npz")
_RECORD, _UNFINISHED = "metrics.json", "sampling.json"


@dataclass(frozen=True)
class Protocol:
    """How a score came about.

    Attributes:
        samples: Where the samples are.
        samples_sha256: Identity of their files.
        num_samples: How many there are.
        shape: Channels, height and width of a sample.
        conditional: Whether classes were asked for.
        classes: How many different ones; None without.
        reference: Where the reference is.
        reference_sha256: Hash of the file, or of the images' files.
        reference_kind: Images or statistics, and in which layout.
        reference_count: Of how many images FID's statistics are.
        reference_images: How many images serve KID, precision and recall.
        reference_shape: Channels, height and width of such an image.
        extractor: The feature network.
        extractor_sha256: Hash of its weights.
        dinov2_sha256: Hash of the weights behind FD-DINOv2.
        resize: How images come to the network's size.
        details: The settings of single metrics.
        network: Where the sampled network came from.
        network_sha256: Hash of its weights.
        sampler: ddpm, ddim, ...
        steps: Of the sampler.
        spacing: Of its timesteps.
        guidance: Classifier-free guidance scale.
        guided_channels: How many latent channels are guided; None for all.
        seed: Of the samples.
        precision: In which they were drawn.
        vae: The autoencoder, or that there is none.
        vae_sha256: Hash of its weights.
        vae_scaling: Its scaling factor.
        rounding: How pixels became 8 bits.
        sampling_versions: Of the software that drew them.
        versions: Of the software that scored them.
    """

    samples: str
    samples_sha256: str
    num_samples: int
    shape: tuple[int, int, int]
    conditional: Any
    classes: Any
    reference: str | None
    reference_sha256: str | None
    reference_kind: str | None
    reference_count: int | str | None
    reference_images: int | None
    reference_shape: tuple[int, int, int] | None
    extractor: str | None
    extractor_sha256: str | None
    dinov2_sha256: str | None
    resize: str
    details: Mapping[str, str]
    network: Any
    network_sha256: Any
    sampler: Any
    steps: Any
    spacing: Any
    guidance: Any
    guided_channels: Any
    seed: Any
    precision: Any
    vae: Any
    vae_sha256: Any
    vae_scaling: Any
    rounding: str
    sampling_versions: Any
    versions: Mapping[str, str]


def record_folder(source: ImageSource) -> Path | None:
    """Return the folder, resolved, in which ``dit-qat sample`` would have described the images."""
    return source.path.resolve().parent if source.path.name in _SUBFOLDERS else None


def find_record(source: ImageSource) -> dict[str, Any]:
    """Return what ``dit-qat sample`` wrote beside the images; empty if it did not draw them.

    Raises:
        ValueError: A damaged record, one of another number of images, or an unfinished run.
    """
    folder = record_folder(source)
    if folder is None:
        return {}
    path = folder / _RECORD
    if not path.is_file():
        if (folder / _UNFINISHED).is_file():
            raise ValueError(
                f"{folder} is a sampling run that is not finished; repeat its command to go on"
            )
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away to score without") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record of a sampling run; move it away to score without")
    count = record.get("num_samples")
    if count is not None and count != len(source):
        raise ValueError(
            f"{path} speaks of {count} images, there are {len(source)}: the folder changed since "
            "it was sampled; sample again, or move metrics.json away to score without"
        )
    return record


def protocol_of(comparison: Comparison, record: Mapping[str, Any]) -> Protocol:
    """Return the card of a comparison whose samples were drawn as ``record`` says."""
    inception, dinov2 = comparison.networks.inception, comparison.networks.dinov2
    return Protocol(
        samples=str(comparison.samples.path),
        samples_sha256=comparison.samples.sha256(),
        num_samples=len(comparison.samples),
        shape=comparison.samples.shape,
        extractor=None
        if inception is None
        else "Inception v3 of 2015-12-05, torch-fidelity's port",
        extractor_sha256=None if inception is None else inception.sha256,
        dinov2_sha256=None if dinov2 is None else dinov2.sha256,
        resize=_resize(comparison),
        details=_details(comparison),
        versions=_versions(),
        **_reference_part(comparison.reference),
        **_sampling_part(record),
    )


def _reference_part(reference: Reference | None) -> dict[str, Any]:
    names = ("", "_sha256", "_kind", "_count", "_images", "_shape")
    if reference is None:
        return {f"reference{name}": None for name in names}
    images = reference.images
    count, shape = (None, None) if images is None else (len(images), images.shape)
    given = reference.moments.get("pool")
    if given is None:
        of_moments: int | str | None = count
    else:
        of_moments = UNKNOWN if given.count is None else given.count
    parts = (str(reference.path), reference.sha256(), _kind(reference), of_moments, count, shape)
    return {f"reference{name}": part for name, part in zip(names, parts, strict=True)}


def _kind(reference: Reference) -> str:
    if not reference.moments:
        return "images"
    if reference.extractors:
        return f"cached statistics of images {str(reference.source_sha256)[:16]}"
    if reference.images is not None and {"pool", "spatial"} <= reference.moments.keys():
        return ADM_REFERENCE
    return "statistics"


def _sampling_part(record: Mapping[str, Any]) -> dict[str, Any]:
    sampler = record.get("sampler") or {}
    labels = record.get("labels", UNKNOWN)
    known = {
        "conditional": UNKNOWN if labels == UNKNOWN else labels is not None,
        "classes": len(set(labels)) if isinstance(labels, list) else labels,
        "network": record.get("source", UNKNOWN),
        "network_sha256": record.get("weights_sha256", UNKNOWN),
        "sampler": sampler.get("kind", UNKNOWN),
        "rounding": "round((x + 1) * 127.5), clipped to 0..255" if sampler else UNKNOWN,
        "sampling_versions": record.get("versions", UNKNOWN),
    }
    for name in ("steps", "spacing", "guidance", "guided_channels", "seed", "precision"):
        known[name] = sampler.get(name, UNKNOWN)
    space = record.get("latent_space", UNKNOWN)
    if space is None:
        return {
            **known,
            "vae": "none, the network draws pixels",
            "vae_sha256": None,
            "vae_scaling": None,
        }
    fields = {"vae": "source", "vae_sha256": "sha256", "vae_scaling": "scaling_factor"}
    return known | {
        name: UNKNOWN if space == UNKNOWN else space.get(field, UNKNOWN)
        for name, field in fields.items()
    }


def _resize(comparison: Comparison) -> str:
    parts = []
    if comparison.networks.inception is not None:
        parts.append("bilinear to 299 as TensorFlow 1 does, without antialiasing")
    if comparison.networks.dinov2 is not None:
        parts.append("for DINOv2 bicubic to 224 with antialiasing")
    if comparison.samples.shape[0] == 1:
        parts.append("grey repeated to three channels")
    return "; ".join(parts)


def _details(comparison: Comparison) -> dict[str, str]:
    images = None if comparison.reference is None else comparison.reference.images
    every = {
        "sfid": "first 7 channels of mixed_6/conv, 17 x 17 (Mixed_6d), 2,023 features",
        "is": "mean over splits of 5,000 in order, without the bias of the logits",
        "precision": f"{NEIGHBOURS} nearest neighbours, pool features, exact distances",
        "recall": f"{NEIGHBOURS} nearest neighbours, pool features, exact distances",
        "fd_dinov2": "class token of ViT-L/14, 1,024 features",
    }
    if images is not None:
        size = kid_subset(len(comparison.samples), len(images))
        every["kid"] = (
            f"{KID_SUBSETS} subsets of {size}, seed {comparison.seed}, kernel (x y / d + 1)^3"
        )
    return {name: text for name, text in every.items() if name in comparison.metrics}


def _versions() -> dict[str, str]:
    names = ("torch", "torch-fidelity", "timm", "numpy")
    return {
        "dit_qat": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
