"""The Inception network behind FID, sFID, KID, precision, recall and Inception Score.

It is torch-fidelity's port of the TensorFlow graph of 2015-12-05, with its TensorFlow-like resize.
"""

from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from dit_qat.dit.evaluation.exact import exact_arithmetic
from dit_qat.dit.evaluation.sources import file_sha256
from dit_qat.dit.evaluation.state_files import load_strictly_, read_state

__all__ = [
    "INCEPTION_SHA256",
    "Activations",
    "InceptionFeatures",
    "find_inception",
    "load_inception",
]

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Hash of the published weights: torch-fidelity's file, the same as pytorch-fid's."""

_SPATIAL_CHANNELS = 7  # of 17 x 17 pixels, as in ADM's evaluator


class Activations(NamedTuple):
    """What the network says about N images.

    Attributes:
        pool: (N, 2048), after the average pooling.
        spatial: (N, 2023), the first 7 channels of 17 x 17 pixels of the first branch of the block
            Mixed_6d, after its ReLU, channels last: ``mixed_6/conv:0`` in ADM's evaluator.
        logits: (N, 1008), without the bias.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class InceptionFeatures(nn.Module):
    """Pooled features of 8-bit images; a ``feature=`` module for torchmetrics, too.

    Args:
        network: torch-fidelity's network, with its weights.
        sha256: Hash of the file of the weights.
    """

    num_features = 2048
    num_spatial = _SPATIAL_CHANNELS * 17 * 17

    def __init__(self, network: FeatureExtractorInceptionV3, sha256: str) -> None:
        super().__init__()
        self.network = network
        self.sha256 = sha256

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, 2048) of images (N, 1 or 3, H, W), uint8."""
        return self.activations(images).pool

    @torch.no_grad()
    def activations(self, images: Tensor) -> Activations:
        """Return all outputs for images (N, 1 or 3, H, W), uint8; grey counts as equal colours.

        Raises:
            ValueError: Another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"Inception needs uint8 images (N, 1 or 3, H, W), got {images.dtype} of shape "
                f"{tuple(images.shape)}"
            )
        blocks: list[Tensor] = []
        # The block's output begins with its first branch.
        hook = self.network.Mixed_6d.register_forward_hook(lambda _m, _i, out: blocks.append(out))
        try:
            with exact_arithmetic(images.device):
                pool, logits = self.network(images.expand(-1, 3, -1, -1))
        finally:
            hook.remove()
        spatial = blocks[0][:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Activations(pool, spatial, logits)

    def train(self, mode: bool = True) -> "InceptionFeatures":
        """Stay in evaluation mode, whatever the module that holds this one does."""
        return super().train(False)


def find_inception(weights: str = "auto") -> Path:
    """Return the file of the weights; ``auto`` is torch-fidelity's, downloaded on first use.

    Raises:
        FileNotFoundError: There is no such file.
        ConnectionError: The download failed.
    """
    if weights != "auto":
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"--inception {path}: no such file; give a file of torch-fidelity's weights, or "
                "auto to download them"
            )
        return path
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(URL_INCEPTION_V3).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another hash
            raise ConnectionError(
                f"cannot download the Inception weights ({error}); fetch {URL_INCEPTION_V3} where "
                f"there is a network, and put it at {path} or name it with --inception FILE"
            ) from error
    return path


def load_inception(path: Path, device: torch.device | str = "cpu") -> InceptionFeatures:
    """Load the network with the weights of a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds other weights.
    """
    state = read_state(path)
    with torch.device("meta"):  # draws no random numbers for weights that are replaced
        network = _Network()
    load_strictly_(network, state, path)
    features = InceptionFeatures(network, file_sha256(path))
    return features.eval().to(device)


class _Network(FeatureExtractorInceptionV3):
    """The network without its own loading, which would unpickle: it is given an empty file."""

    def __init__(self) -> None:
        empty = BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        outputs = ["2048", "logits_unbiased"]
        super().__init__("inception-v3-compat", outputs, feature_extractor_weights_path=empty)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a state, but skip the empty one of the constructor."""
        return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None
