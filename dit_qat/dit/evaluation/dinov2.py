"""DINOv2 features for FD-DINOv2, by the protocol of dgm-eval.

Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of
diffusion models", arXiv:2306.04675.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer, vit_large_patch14_dinov2
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.dit.evaluation.exact import exact_arithmetic
from dit_qat.dit.evaluation.sources import file_sha256
from dit_qat.dit.evaluation.state_files import load_strictly_, read_state

__all__ = ["DINOV2_SIDE", "DinoFeatures", "load_dinov2"]

DINOV2_SIDE = 224
"""Height and width of the images that the network sees."""

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_UNUSED = ("mask_token", "head.weight", "head.bias")
_POSITION_OFFSET = 0.1  # DINOv2's own guard against a grid that is one patch short


class DinoFeatures(nn.Module):
    """The class token of a DINOv2 network, for 8-bit images.

    Args:
        network: A vision transformer for images of ``DINOV2_SIDE`` pixels, without a head.
        sha256: Hash of the file of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: VisionTransformer, sha256: str) -> None:
        super().__init__()
        self.network = network
        self.sha256 = sha256
        self.num_features: int = network.num_features
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of images (N, 1 or 3, H, W), uint8.

        Bicubic resize with antialiasing, in floating point as Pillow does it, clipped to 0..255.
        """
        side = (DINOV2_SIDE, DINOV2_SIDE)
        pixels = images.expand(-1, 3, -1, -1).float()
        if pixels.shape[2:] != side:
            pixels = F.interpolate(pixels, side, mode="bicubic", antialias=True).clamp(0, 255)
        with exact_arithmetic(images.device):
            features: Tensor = self.network((pixels / 255 - self.mean) / self.std)
        return features

    def train(self, mode: bool = True) -> "DinoFeatures":
        """Stay in evaluation mode."""
        return super().train(False)


def load_dinov2(
    path: Path,
    device: torch.device | str = "cpu",
    build: Callable[..., VisionTransformer] = vit_large_patch14_dinov2,
) -> DinoFeatures:
    """Load DINOv2 from a file: Meta's dinov2_vitl14_pretrain.pth, or timm's safetensors.

    Args:
        path: The weights.
        device: Where they go.
        build: Makes the network; called with ``img_size`` and ``num_classes``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds other weights.
    """
    state = {name: value for name, value in read_state(path).items() if name not in _UNUSED}
    with torch.device("meta"):
        network = build(img_size=DINOV2_SIDE, num_classes=0)
    load_strictly_(network, _fit_positions(state, network.patch_embed.grid_size[0]), path)
    return DinoFeatures(network, file_sha256(path)).eval().to(device)


def _fit_positions(state: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Interpolate the position embeddings (1, 1 + n^2, D) to ``grid`` patches, as DINOv2 does."""
    positions = state.get("pos_embed")
    if positions is None or positions.shape[1] == 1 + grid**2:
        return dict(state)
    side = round((positions.shape[1] - 1) ** 0.5)
    token, patches = positions[:, :1], positions[:, 1:]
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    scale = (grid + _POSITION_OFFSET) / side
    resized = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return {**state, "pos_embed": torch.cat([token, resized.flatten(2).transpose(1, 2)], dim=1)}
