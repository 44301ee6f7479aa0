"""Protocols that published numbers were made with, and how far ours is from one of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dit_qat.dit.evaluation.inception import INCEPTION_SHA256
from dit_qat.dit.evaluation.protocol import ADM_REFERENCE, UNKNOWN, Protocol

__all__ = ["PUBLISHED", "Deviation", "Published", "PublishedName", "compare", "fitting_published"]

PublishedName = Literal["dit", "ptq4dit"]

_WHY = {
    "num_samples": "FID falls as samples are added, so that different numbers of them cannot be "
    "compared: 2.27 is published for float DiT-XL/2 with 50,000 of them and 4.53 with 10,000",
    "steps": "every score depends on the number of steps",
    "sampler": "every score depends on the sampler",
    "spacing": "every score depends on the timesteps",
    "guidance": "guidance trades diversity for fidelity: FID, IS and precision all move with it, "
    "and at guidance 4 quantized models get a lower FID than the float one, so that a low FID says "
    "nothing there",
    "guided_channels": "DiT guides the first 3 of 4 latent channels; to guide all gives other "
    "images",
    "vae": "decoders of the same latents differ: for float DiT-XL/2, FID 2.27 is published with "
    "sd-vae-ft-ema, 2.30 with sd-vae-ft-mse and 2.46 with the decoder before their fine-tuning "
    "(names are compared, not weights)",
    "vae_scaling": "latents of another scale are those of another autoencoder",
    "reference_kind": "papers use ADM's statistics of the whole training set, and its 10,000 "
    "images for precision and recall",
    "shape": "features depend on the size of the images",
    "conditional": "the published model is given classes",
    "classes": "the reference is of all classes, which samples of some cannot look like",
    "extractor_sha256": "features of other weights are other features: no FID, sFID, IS, KID, "
    "precision or recall from them can be compared with any paper's",
}


@dataclass(frozen=True)
class Published:
    """A protocol, as far as it is known, and the scores of the float model under it.

    Attributes:
        title: What to call it.
        facts: Fields of :class:`Protocol` and their values.
        scores: By metric.
    """

    title: str
    facts: Mapping[str, Any]
    scores: Mapping[str, float] = field(default_factory=dict)


PUBLISHED: Mapping[PublishedName, Published] = {
    # Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748 (also of its
    # three decoders), sampled in JAX; and the README and sample_ddp.py of its PyTorch code.
    "dit": Published(
        "DiT-XL/2, float, of the DiT paper (FID 2.21 by its PyTorch code, says the DiT README)",
        {
            "num_samples": 50_000,
            "shape": (3, 256, 256),
            "conditional": True,
            "classes": 1000,
            "steps": 250,
            "sampler": "ddpm",
            "spacing": "linspace",
            "guidance": 1.5,
            "guided_channels": 3,
            "vae": "stabilityai/sd-vae-ft-ema",
            "vae_scaling": 0.18215,
            "reference_kind": ADM_REFERENCE,
        },
        {"fid": 2.27, "sfid": 4.60, "is": 278.24, "precision": 0.83, "recall": 0.57},
    ),
    # Wu et al., "PTQ4DiT", arXiv:2405.16005: the score as later papers quote it, the settings from
    # its code and README (guidance, ten images of each class, the decoder that is its default).
    "ptq4dit": Published(
        "DiT-XL/2, float, under PTQ4DiT's protocol",
        {
            "num_samples": 10_000,
            "shape": (3, 256, 256),
            "conditional": True,
            "classes": 1000,
            "steps": 250,
            "sampler": "ddpm",
            "spacing": "linspace",
            "guidance": 1.5,
            "vae": "stabilityai/sd-vae-ft-mse",
            "vae_scaling": 0.18215,
            "reference_kind": ADM_REFERENCE,
        },
        {"fid": 4.53},
    ),
}


@dataclass(frozen=True)
class Deviation:
    """A point in which our protocol is not the published one.

    Attributes:
        field: Its name in the protocol card.
        ours: Our value.
        theirs: The published one.
        why: Why it matters.
    """

    field: str
    ours: Any
    theirs: Any
    why: str

    def __str__(self) -> str:
        return f"{self.field}: {self.ours} here, {self.theirs} there. Why it matters: {self.why}"


def fitting_published(protocol: Protocol) -> PublishedName | None:
    """Return the protocol to compare with unless told: DiT's for classes at 256 x 256."""
    fits = protocol.shape == (3, 256, 256) and protocol.conditional in (True, UNKNOWN)
    return "dit" if fits else None


def compare(protocol: Protocol, published: Published | None) -> list[Deviation]:
    """Return where a protocol differs, or may differ, from a published one; the worst come first.

    The weights of the feature network are compared even where nothing is published.
    """
    found = []
    if protocol.extractor_sha256 not in (None, INCEPTION_SHA256):
        field = "extractor_sha256"
        ours = str(protocol.extractor_sha256)
        found.append(Deviation(field, ours[:16], INCEPTION_SHA256[:16], _WHY[field]))
    for name, theirs in (published.facts if published else {}).items():
        ours = getattr(protocol, name)
        if ours is None and name == "reference_kind":
            continue  # the Inception Score needs no reference
        if not _agrees(name, ours, theirs):
            found.append(Deviation(name, ours, theirs, _WHY[name]))
    return found


def _agrees(name: str, ours: Any, theirs: Any) -> bool:
    if name == "vae":  # a hub id, or a folder that holds a copy
        return str(theirs).rpartition("/")[2] in str(ours)
    return bool(ours == theirs)
