"""What can be written: how each format is checked, written, and run as its own readers do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from dit_qat.dit.convert.difference import Inputs, outputs
from dit_qat.dit.models.build import build_dit
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.native import read_native, save_dit
from dit_qat.dit.models.published import (
    PUBLISHED_SUFFIXES,
    check_published,
    infer_config,
    read_published,
    save_published,
)
from dit_qat.dit.models.to_diffusers import check_diffusers, dit_to_diffusers
from dit_qat.dit.pipelines import check_pipeline, write_pipeline

if TYPE_CHECKING:
    from dit_qat.dit.models.autoencoder import Autoencoder

__all__ = ["FORMATS", "CheckpointFormat", "Content", "Format"]

CheckpointFormat = Literal["dit_qat", "published", "diffusers", "pipeline"]


@dataclass(frozen=True)
class Content:
    """What is written.

    Attributes:
        network: A float DiT of the format's convention.
        autoencoder: For a pipeline.
        labels: Names of classes by number, for a pipeline.
    """

    network: DiT
    autoencoder: "Autoencoder | None" = None
    labels: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Format:
    """One way to hold a DiT.

    Attributes:
        suffixes: Of its file; none if it is a folder.
        convention: Arguments of :class:`DiT` that its readers take for granted.
        check: Raises ValueError for what it cannot hold.
        write: Writes a file, or into an empty folder.
        run: Reads that back, and predicts.
    """

    suffixes: tuple[str, ...]
    convention: Mapping[str, Any]
    check: Callable[[Content], None]
    write: Callable[[Path, Content], None]
    run: Callable[[Path, Inputs], Tensor]

    @property
    def is_folder(self) -> bool:
        """Whether it is written as a folder."""
        return not self.suffixes


def _run_native(path: Path, inputs: Inputs) -> Tensor:
    return outputs(build_dit(*read_native(path), path).eval(), inputs)


def _run_published(path: Path, inputs: Inputs) -> Tensor:
    _, state = read_published(path)
    return outputs(build_dit(infer_config(state, path), state, path).eval(), inputs)


def _run_diffusers(folder: Path, inputs: Inputs, subfolder: str | None = None) -> Tensor:
    from diffusers import DiTTransformer2DModel  # seconds, which only this costs

    # low_cpu_mem_usage needs one more package.
    model = DiTTransformer2DModel.from_pretrained(
        folder, subfolder=subfolder, low_cpu_mem_usage=False
    )
    return outputs(
        lambda x, t, y: model(x, timestep=t, class_labels=y).sample,  # in evaluation mode
        inputs,
    )


def _write_pipeline(folder: Path, content: Content) -> None:
    assert content.autoencoder is not None
    write_pipeline(folder, content.network, content.autoencoder, content.labels)


def _check_pipeline(content: Content) -> None:
    assert content.autoencoder is not None
    check_pipeline(content.network, content.autoencoder)


FORMATS: dict[CheckpointFormat, Format] = {
    "dit_qat": Format(
        suffixes=(".safetensors",),
        convention={},
        check=lambda content: None,
        write=lambda path, content: save_dit(content.network, path),
        run=_run_native,
    ),
    "published": Format(
        suffixes=PUBLISHED_SUFFIXES,
        convention={"timestep_shift": 0, "norm2_eps": 1e-6},
        check=lambda content: check_published(content.network),
        write=lambda path, content: save_published(content.network, path),
        run=_run_published,
    ),
    "diffusers": Format(
        suffixes=(),
        convention={"timestep_shift": 1},  # its norm_eps is configured as norm2_eps
        check=lambda content: check_diffusers(content.network),
        write=lambda folder, content: dit_to_diffusers(content.network).save_pretrained(folder),
        run=_run_diffusers,
    ),
    "pipeline": Format(
        suffixes=(),
        convention={"timestep_shift": 1},
        check=_check_pipeline,
        write=_write_pipeline,
        run=lambda folder, inputs: _run_diffusers(folder, inputs, "transformer"),
    ),
}
