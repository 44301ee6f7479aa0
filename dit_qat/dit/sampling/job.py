"""What a sampling run draws, and in which form it leaves it."""

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from dit_qat.dit.models.autoencoder import Autoencoder
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.sampling.record import network_sha256
from dit_qat.dit.sampling.sampler import SamplerConfig, to_uint8
from dit_qat.dit.sampling.store import ShardStore

__all__ = ["SamplingJob"]


@dataclass(frozen=True)
class SamplingJob:
    """What to draw, and in which form to leave it.

    Attributes:
        network: A float or quantized DiT.
        sampler: How to sample.
        num: Images 0 to num - 1.
        label_of: The label of any index; None for an unconditional network.
        autoencoder: What decodes the network's latents; None if it draws pixels.
        decode_batch_size: Latents per call of the decoder; part of what fixes an image's bytes.
        latents: Leave what the network draws, float32, in latents.npz, and no images.
        png: Leave images/000000.png and so on.
        npz: Leave samples.npz, as the ADM evaluator reads it.
        compiled: Compile the network.
        threads: CPU threads of a process; part of what fixes an image's bytes, so that it must not
            depend on the number of processes. A GPU does not care.
    """

    network: DiT
    sampler: SamplerConfig
    num: int
    label_of: Callable[[int], int] | None = None
    autoencoder: Autoencoder | None = None
    decode_batch_size: int = 8
    latents: bool = False
    png: bool = True
    npz: bool = False
    compiled: bool = False
    threads: int = 1

    @property
    def pictures(self) -> bool:
        """Whether to leave PNGs."""
        return self.png and not self.latents

    @property
    def packed(self) -> str | None:
        """The name of the one file with everything, if there shall be one."""
        if self.latents:
            return "latents.npz"
        return "samples.npz" if self.npz else None

    def moved(self, device: torch.device) -> "SamplingJob":
        """The job with its networks on a device, compiled if asked."""
        network = self.network.to(device)
        if self.compiled:
            # Not Module.compile, which guided calls pass by; batches have one size only.
            forward = torch.compile(network.forward, dynamic=False)
            network.forward = forward  # type: ignore[method-assign]
        autoencoder = None if self.autoencoder is None else self.autoencoder.to(device)
        return replace(self, network=network, autoencoder=autoencoder)

    def record(self) -> dict[str, Any]:
        """What fixes the bytes, beside the machine."""
        network, autoencoder = self.network, self.autoencoder
        return {
            "num_samples": self.num,
            "weights_sha256": network_sha256(network),
            "labels_sha256": self._labels_sha256(),
            "latents": self.latents,
            "shape": [network.in_channels, network.input_size, network.input_size],
            "sampler": asdict(self.sampler),
            "latent_space": None if autoencoder is None else asdict(autoencoder.space),
            "decode_batch_size": None if autoencoder is None else self.decode_batch_size,
            "compile": self.compiled,
        }

    def _labels_sha256(self) -> str | None:
        if self.label_of is None:
            return None
        labels = array("q", map(self.label_of, range(self.num)))
        return hashlib.sha256(labels.tobytes()).hexdigest()

    def store(self, folder: Path) -> ShardStore:
        """Where the rows go: one shard per compute batch."""
        side, channels = self.network.input_size, self.network.in_channels
        if self.latents:
            shape, dtype = (channels, side, side), "float32"
        elif self.autoencoder is not None:
            side = side * self.autoencoder.space.downscale
            shape, dtype = (side, side, 3), "uint8"
        else:
            shape, dtype = (side, side, channels), "uint8"
        size = self.sampler.batch_size
        return ShardStore(folder / "shards", self.num, size, shape, dtype, self.label_of)

    def rows(self, drawn: Tensor) -> npt.NDArray[Any]:
        """What the network drew, as a shard holds it."""
        if self.latents:
            return drawn.float().cpu().numpy()
        if self.autoencoder is not None:
            drawn = self.autoencoder.decode(drawn, self.decode_batch_size)
        return to_uint8(drawn).permute(0, 2, 3, 1).contiguous().cpu().numpy()
