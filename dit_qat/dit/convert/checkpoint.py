"""``convert_checkpoint``: read, measure, write, read back, and only then give it its name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_qat.dit.convert.difference import (
    TIMESTEPS,
    Difference,
    Inputs,
    difference,
    fixed_inputs,
    outputs,
)
from dit_qat.dit.convert.formats import FORMATS, CheckpointFormat, Content, Format
from dit_qat.dit.convert.opening import Opened, open_source
from dit_qat.dit.convert.place import RECORD, check_place, sidecar
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.published import Weights
from dit_qat.export.files import write_json, written_whole
from dit_qat.export.folders import writing, written_folder
from dit_qat.layers import QuantAttention, QuantLinear
from dit_qat.layers.swap import to_float_

if TYPE_CHECKING:
    from dit_qat.dit.models.autoencoder import Autoencoder

__all__ = ["Conversion", "convert_checkpoint"]

_LIMIT = 1e-5
_PACKAGES = ("dit-qat", "torch", "diffusers", "timm")


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how far the result is from the source.

    Attributes:
        source: As given.
        target: The file or folder written.
        format: Of the target.
        weights: "ema" or "model", where the source has a choice.
        network: Arguments of :class:`DiT` of what was written.
        parameters: How many the network has, the table of positions included.
        differences: Of outputs on fixed inputs. "written": between what was to be written and what
            was read back, by the code that reads the format. "conventions": what the other
            timestep frequencies or norm epsilon change. "dequantized": between the fake-quantized
            network and the float one of the same ternary weights.
        autoencoder: The latent space of a pipeline's autoencoder.
        versions: Of the packages that took part.
    """

    source: str
    target: str
    format: str
    weights: str | None
    network: dict[str, Any]
    parameters: int
    differences: dict[str, Difference]
    autoencoder: dict[str, Any] | None
    versions: dict[str, str]


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: CheckpointFormat,
    vae: str | None = None,
    weights: Weights = "ema",
    across_conventions: bool = False,
    dequantize: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write a checkpoint in another format, whole or not at all.

    Within one convention of timestep frequencies and norm epsilon, the outputs of what is written
    equal the source's to 1e-5 (norm of the difference over the norm); that is measured before the
    target gets its name. A record is written beside a file (``NAME.json``) or into a folder
    (``conversion.json``).

    Args:
        source: A source of :func:`~dit_qat.dit.models.load_dit`, or a ``.ckpt`` of dit-qat fit.
        target: "dit_qat": a .safetensors file; "published": a .pt file; "diffusers": a folder of
            DiTTransformer2DModel; "pipeline": a folder of DiTPipeline.
        format: Of the target. "published" holds the original's convention only (timestep_shift=0,
            norm2_eps=1e-6), the two of diffusers hold timestep_shift=1.
        vae: Folder or hub id of the pipeline's autoencoder.
        weights: Which weights of a training checkpoint; without averaged ones, "ema" takes the
            others.
        across_conventions: Write the same weights although the format's convention gives other
            outputs; the record says how much they differ.
        dequantize: Write a quantized network as the float network of its ternary weights, with
            activations and attention no longer quantized; the record says how much the outputs
            differ.
        overwrite: Replace what an earlier conversion wrote.

    Returns:
        What the record holds.

    Raises:
        FileNotFoundError: If the source or the autoencoder is nowhere to be found.
        FileExistsError: If the target exists.
        OSError: If the target cannot be written.
        ValueError: If the source is damaged, the format cannot hold it, or a flag is needed.
    """
    target, chosen = Path(target), _format(format, vae)
    check_place(target, chosen, [os.fspath(source), vae], overwrite)
    opened = open_source(source, weights)
    autoencoder = None if vae is None else _autoencoder(vae, opened)
    inputs = fixed_inputs(opened.network)
    network, expected, differences = _to_float(opened, inputs, dequantize)
    stated = _restated(network, chosen)
    content = Content(stated, autoencoder, opened.labels)
    chosen.check(content)
    if stated is not network:
        now = outputs(stated, inputs)
        differences["conventions"] = difference(expected, now)
        _check_conventions(network, stated, differences["conventions"], format, across_conventions)
        expected = now
    report = _report(source, target, format, opened, content, differences)
    return _write(report, chosen, content, inputs, expected)


def _format(format: CheckpointFormat, vae: str | None) -> Format:
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is none of {', '.join(FORMATS)}")
    if (format == "pipeline") != (vae is not None):
        raise ValueError(
            "a pipeline needs an autoencoder: name its folder or hub id as vae"
            if vae is None
            else f"vae={vae!r}: the format {format} holds no autoencoder; leave it out, or choose "
            "the format pipeline"
        )
    return FORMATS[format]


def _autoencoder(vae: str, opened: Opened) -> "Autoencoder":
    from dit_qat.dit.models.autoencoder import load_autoencoder  # seconds, which only this costs

    autoencoder, trained = load_autoencoder(vae), opened.latent_space
    if trained is not None and trained["sha256"] != autoencoder.space.sha256:
        raise ValueError(
            f"{vae}: its weights (sha256 {autoencoder.space.sha256[:16]}) are not those of the "
            f"autoencoder that the network was trained with, {trained['source']} (sha256 "
            f"{trained['sha256'][:16]}); give that one"
        )
    return autoencoder


def _to_float(
    opened: Opened, inputs: Inputs, dequantize: bool
) -> tuple[DiT, Tensor, dict[str, Difference]]:
    """The float network, its outputs, and what dequantizing changed."""
    network = opened.network
    quantized = [
        name
        for name, module in network.named_modules()
        if isinstance(module, QuantLinear | QuantAttention)
    ]
    if quantized and not dequantize:
        raise ValueError(
            f"the network is quantized ({len(quantized)} layers, such as {quantized[0]}), and this "
            "format holds float weights; with dequantize=True (--dequantize), its ternary weights "
            "are written as float ones, and activations and attention are no longer quantized"
        )
    expected = outputs(opened.forward, inputs)
    if not quantized:
        return network, expected, {}
    network = to_float_(network, quantized=True)
    now = outputs(network, inputs)
    return network, now, {"dequantized": difference(expected, now)}


def _restated(network: DiT, chosen: Format) -> DiT:
    """The same tensors under the format's convention; the same network where that is its own."""
    config = network.config | dict(chosen.convention)
    if config == network.config:
        return network
    with torch.device("meta"):
        stated = DiT(**config)
    stated.load_state_dict(network.state_dict(), assign=True)
    return stated.eval()


def _check_conventions(
    network: DiT, stated: DiT, found: Difference, format: str, allowed: bool
) -> None:
    if allowed:
        return
    changes = ", ".join(
        f"{name}={value} here and {stated.config[name]} there"
        for name, value in network.config.items()
        if value != stated.config[name]
    )
    worst, by = found.largest
    raise ValueError(
        f"the format {format} has another convention ({changes}): with the same weights, its "
        f"outputs differ by {found.overall:.2%} (norm of the difference over the norm, fixed "
        f"inputs at timesteps {TIMESTEPS[0]} to {TIMESTEPS[-1]}; {by:.2%} at {worst}); pass "
        "across_conventions=True (--across_conventions) to write it nevertheless, or choose the "
        "format dit_qat, which holds both conventions"
    )


def _write(
    report: Conversion, chosen: Format, content: Content, inputs: Inputs, expected: Tensor
) -> Conversion:
    """Write under a temporary name, run what was written, rename; return the completed report."""
    target = Path(report.target)
    with _written(target, chosen) as place:
        with writing(target):
            chosen.write(place, content)
        found = difference(expected, chosen.run(place, inputs))
        _check_written(found, report.format)
        report = replace(report, differences=report.differences | {"written": found})
        if chosen.is_folder:
            write_json(place / RECORD, asdict(report))
    if not chosen.is_folder:
        write_json(sidecar(target), asdict(report))
    return report


def _check_written(found: Difference, format: str) -> None:
    if not found.overall <= _LIMIT:  # also if it is not a number
        raise ValueError(
            f"what was written as {format} gives outputs that differ by {found.overall:.1e} from "
            f"the source's (limit {_LIMIT:.0e}), so it was removed: an error of dit-qat, or a "
            f"change in diffusers {version('diffusers')}; please report it"
        )


@contextmanager
def _written(target: Path, chosen: Format) -> Iterator[Path]:
    writer = written_folder if chosen.is_folder else written_whole
    with writer(target) as place:
        yield place


def _report(
    source: str | os.PathLike[str],
    target: Path,
    format: str,
    opened: Opened,
    content: Content,
    differences: dict[str, Difference],
) -> Conversion:
    network, autoencoder = content.network, content.autoencoder
    return Conversion(
        source=os.fspath(source),
        target=str(target),
        format=format,
        weights=opened.weights,
        network=network.config,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        differences=differences,
        autoencoder=None if autoencoder is None else asdict(autoencoder.space),
        versions={name: version(name) for name in _PACKAGES},
    )
