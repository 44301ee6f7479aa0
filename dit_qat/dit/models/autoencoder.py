"""The image autoencoder of latent diffusion: pixels to moments, latents to pixels."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor

from dit_qat.dit.models.dit import DiT

if TYPE_CHECKING:  # its import takes seconds, which who loads no autoencoder need not wait
    from diffusers import AutoencoderKL

__all__ = ["Autoencoder", "LatentSpace", "check_channels", "load_autoencoder"]

_KIND = "AutoencoderKL"
_SUBFOLDER = "vae"
_CONFIG = "config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True)
class LatentSpace:
    """What latents mean: which autoencoder they belong to, and how the DiT sees them.

    The DiT sees ``(z - shift_factor) * scaling_factor`` of a latent z.

    Attributes:
        source: Folder (absolute) or hub id that the autoencoder came from.
        sha256: Of its float32 weights; the same however they are stored.
        scaling_factor: About one over the standard deviation of the latents.
        shift_factor: About their mean; 0 for most autoencoders.
        channels: Channels of a latent.
        downscale: Pixels per latent element, along each side.
    """

    source: str
    sha256: str
    scaling_factor: float
    shift_factor: float
    channels: int
    downscale: int

    def scale_(self, latents: Tensor) -> Tensor:
        """Make latents of the autoencoder, in place, what the DiT sees."""
        return latents.sub_(self.shift_factor).mul_(self.scaling_factor)

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents of the DiT as the autoencoder sees them."""
        return latents / self.scaling_factor + self.shift_factor

    def side(self, size: int) -> int:
        """Height and width of the latents of images of ``size`` pixels.

        Raises:
            ValueError: if the size is no multiple of ``downscale``.
        """
        if size < 1 or size % self.downscale:
            nearest = max(1, round(size / self.downscale)) * self.downscale
            raise ValueError(
                f"image size {size} is no multiple of {self.downscale}, the pixels per latent of "
                f"the autoencoder; the nearest is {nearest}"
            )
        return size // self.downscale


class Autoencoder:
    """diffusers' ``AutoencoderKL`` in float32, without gradients, whatever autocast says.

    Args:
        network: The diffusers model; put into eval mode.
        source: Where it came from, for :attr:`space`.

    Attributes:
        network: The diffusers model.
        space: What its latents mean.
    """

    def __init__(self, network: "AutoencoderKL", source: str) -> None:
        self.network: AutoencoderKL = network.float().eval().requires_grad_(False)
        config = network.config
        self.space = LatentSpace(
            source=source,
            sha256=_weights_sha256(network),
            scaling_factor=float(config.scaling_factor),
            shift_factor=float(config.shift_factor or 0.0),
            channels=int(config.latent_channels),
            downscale=2 ** (len(config.block_out_channels) - 1),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.network.device
        return device

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; return the autoencoder itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, unscaled, on the autoencoder's device.

        Args:
            images: (N, 3, H, W) in [-1, 1]; H and W multiples of the downscale.

        Returns:
            Twice (N, channels, H / downscale, W / downscale), float32; log-variances between -30
            and 20.
        """
        with torch.autocast(self.device.type, enabled=False):
            moments = self.network.encode(images.to(self.device, torch.float32)).latent_dist
        return moments.mean, moments.logvar

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Images of latents, in batches of one size, so that bytes do not depend on how many.

        Args:
            latents: (N, channels, h, w) as the DiT draws them, that is, scaled.
            batch_size: Latents per batch; the last one is padded with zeros.

        Returns:
            (N, 3, h * downscale, w * downscale), float32, around [-1, 1], not clamped.

        Raises:
            ValueError: for latents of another shape or a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"the decoder's batch size {batch_size} must be at least 1")
        if latents.ndim != 4 or latents.shape[1] != self.space.channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}, but this autoencoder decodes (N, "
                f"{self.space.channels}, h, w); use the one that the DiT was trained with"
            )
        with torch.autocast(self.device.type, enabled=False):
            decoded = [
                self._decode(batch, batch_size) for batch in torch.split(latents, batch_size)
            ]
        return torch.cat(decoded)

    def _decode(self, latents: Tensor, batch_size: int) -> Tensor:
        batch = latents.new_zeros(batch_size, *latents.shape[1:], dtype=torch.float32)
        batch[: len(latents)] = latents
        images: Tensor = self.network.decode(self.space.unscale(batch.to(self.device))).sample
        return images[: len(latents)]


def load_autoencoder(
    source: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> Autoencoder:
    """Load diffusers' ``AutoencoderKL``.

    Args:
        source: A folder of one, a folder of a pipeline that has ``vae/``, or a hub id of either,
            such as ``stabilityai/sd-vae-ft-ema``.
        device: Where the weights go.

    Raises:
        FileNotFoundError: if there is none, or the hub cannot be reached.
        ValueError: if it is another kind of model, or its weights are damaged or incomplete.
    """
    from diffusers import AutoencoderKL

    name = os.fspath(source)
    if Path(name).exists():
        name = str(Path(name).resolve())  # which is on record, for any working directory
        folder = _local(Path(name))
    else:
        folder = _downloaded(name)
    _check_kind(folder)
    safe = (folder / _WEIGHTS[0]).is_file()
    if not safe and not (folder / _WEIGHTS[1]).is_file():
        raise FileNotFoundError(f"{folder}: neither {' nor '.join(_WEIGHTS)} is there")
    try:
        network, report = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=safe,
            low_cpu_mem_usage=False,  # which needs one more package
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        raise ValueError(
            f"{folder}: the weights cannot be loaded ({str(error).strip()}); copy or download "
            "them again"
        ) from error
    _check_complete(folder, network, report)
    return Autoencoder(network, name).to(device)


def _local(folder: Path) -> Path:
    for candidate in (folder, folder / _SUBFOLDER):
        if (candidate / _CONFIG).is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder}: no {_CONFIG} there or in {_SUBFOLDER}/; give the folder of an {_KIND} or of a "
        "pipeline"
    )


def _downloaded(repo: str) -> Path:
    """The folder of the hub's cache that holds the configuration and the weights."""
    try:
        config, prefix = _download_config(repo)
        try:
            hf_hub_download(repo, prefix + _WEIGHTS[0])
        except EntryNotFoundError:
            hf_hub_download(repo, prefix + _WEIGHTS[1])
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{repo}: no such folder, and no autoencoder could be had from the hub repository of "
            f"that name ({type(error).__name__}); check the name and the connection, or download "
            "it where there is one and give its folder"
        ) from error
    return config.parent


def _download_config(repo: str) -> tuple[Path, str]:
    """Path of the configuration, and where in the repository it lies."""
    prefix = f"{_SUBFOLDER}/"
    try:
        return Path(hf_hub_download(repo, _CONFIG)), ""
    except LocalEntryNotFoundError:  # no connection: what is in the cache, without more waiting
        return Path(hf_hub_download(repo, prefix + _CONFIG, local_files_only=True)), prefix
    except EntryNotFoundError:
        return Path(hf_hub_download(repo, prefix + _CONFIG)), prefix


def _check_kind(folder: Path) -> None:
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except ValueError as error:
        raise ValueError(
            f"{folder / _CONFIG}: damaged ({error}); copy or download it again"
        ) from error
    kind = config.get("_class_name")
    if kind != _KIND:
        raise ValueError(
            f"{folder}: its {_CONFIG} describes {kind}, not {_KIND}; give the folder or hub id of "
            f"an {_KIND}, or of a pipeline with {_SUBFOLDER}/"
        )


def _check_complete(folder: Path, network: "AutoencoderKL", report: dict[str, Any]) -> None:
    """Refuse weights of another model, which diffusers would complete with random ones."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [str(key) for key in report[kind]]
        if keys:
            raise ValueError(
                f"{folder}: {len(keys)} {kind.replace('_', ' ')}, such as {keys[0]}; its weights "
                f"and {_CONFIG} belong to different models"
            )
    for key, tensor in _tensors(network):
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {key} holds NaN or infinite values; download it again")


def _tensors(network: "AutoencoderKL") -> Iterator[tuple[str, Tensor]]:
    return iter(sorted(network.state_dict().items()))


def _weights_sha256(network: "AutoencoderKL") -> str:
    digest = hashlib.sha256()
    for name, tensor in _tensors(network):
        values = tensor.detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_channels(space: LatentSpace, network: DiT) -> None:
    """Make sure that an autoencoder decodes what a network draws.

    Raises:
        ValueError: if the numbers of channels differ.
    """
    if space.channels != network.in_channels:
        raise ValueError(
            f"the autoencoder {space.source} decodes latents of {space.channels} channels, the "
            f"network draws {network.in_channels}; name the one that it was trained with"
        )
