"""How alike two images are: PSNR and SSIM always, LPIPS and CLIPScore where weights are here."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from dit_qat.export.extras import import_extra

__all__ = ["CLIP_MODEL", "PairScorer"]

CLIP_MODEL = "openai/clip-vit-large-patch14"

_MOST_PSNR = 100.0  # what equal images are given: infinity is no number in a JSON file
_SSIM_WINDOW = 11
_LEAST_LPIPS = 32

Frames = npt.NDArray[np.uint8]


class PairScorer:
    """Compares what a float and a quantized model drew.

    Args:
        clip: Folder or hub id of a CLIP model, of which nothing is downloaded.
        device: Where both run.

    Attributes:
        missing: Why a score is not given, by name.
    """

    def __init__(self, clip: str = CLIP_MODEL, device: torch.device | str = "cpu") -> None:
        self.missing: dict[str, str] = {}
        self._device = torch.device(device)
        self._lpips = self._load_lpips()
        self._clip = self._load_clip(clip)

    def __call__(self, prompt: str, expected: Frames, found: Frames) -> dict[str, float]:
        """Score one image or video.

        Args:
            prompt: What was asked for.
            expected: The float model's (F, H, W, 3).
            found: The quantized model's.

        Returns:
            ``psnr`` (dB, at most 100) and ``ssim``; ``lpips``; ``clip_score_float`` and
            ``clip_score_quantized`` (of the middle frame); those that are missing are left out.

        Raises:
            ValueError: for different shapes.
        """
        if expected.shape != found.shape:
            raise ValueError(f"frames of shape {expected.shape} and {found.shape} are no pair")
        pair = _channels_first(expected), _channels_first(found)
        scores = {"psnr": _psnr(*pair)}
        if min(expected.shape[1:3]) >= _SSIM_WINDOW:
            scores["ssim"] = _ssim(*pair)
        else:
            self.missing["ssim"] = (
                f"SSIM compares windows of {_SSIM_WINDOW} pixels, and these images have "
                f"{min(expected.shape[1:3])}"
            )
        if self._lpips is not None and min(expected.shape[1:3]) >= _LEAST_LPIPS:
            scores["lpips"] = self._lpips(*pair)
        if self._clip is not None:
            middle = len(expected) // 2
            for name, frames in zip(("float", "quantized"), pair, strict=True):
                scores[f"clip_score_{name}"] = self._clip(frames[middle], prompt)
        return scores

    def _load_lpips(self) -> Callable[[Tensor, Tensor], float] | None:
        weights = _alexnet_file()
        if not weights.is_file():
            self.missing["lpips"] = (
                f"LPIPS needs torchvision's AlexNet, {weights}, which is not here; put the file "
                "there (torchvision downloads it where there is a connection)"
            )
            return None
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity("alex").to(self._device).eval()

        @torch.no_grad()
        def score(expected: Tensor, found: Tensor) -> float:
            scaled = [(x.float() / 127.5 - 1).to(self._device) for x in (expected, found)]
            return fmean(float(metric(a[None], b[None])) for a, b in zip(*scaled, strict=True))

        return score

    def _load_clip(self, name: str) -> Callable[[Tensor, str], float] | None:
        if find_spec("transformers") is None:
            self.missing["clip_score"] = (
                "CLIPScore needs the package transformers, which is not installed here"
            )
            return None
        if not (Path(name).is_dir() or _is_cached(name)):
            self.missing["clip_score"] = (
                f"CLIPScore needs {name}, which is neither a folder nor in the hub's cache here; "
                f"run 'hf download {name}' where there is a connection"
            )
            return None
        from torchmetrics.multimodal import CLIPScore

        def local() -> tuple[Any, Any]:
            package = import_extra("transformers", "llm")
            given = {"local_files_only": True}
            model = package.CLIPModel.from_pretrained(name, use_safetensors=True, **given)
            return model, package.CLIPProcessor.from_pretrained(name, **given)

        metric = CLIPScore(local).to(self._device).eval()

        @torch.no_grad()
        def score(image: Tensor, prompt: str) -> float:
            return float(metric(image.to(self._device), prompt))

        return score


def _is_cached(repo: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(repo, "config.json"), str)
    except HFValidationError:  # a path, and no name of a repository
        return False


def _alexnet_file() -> Path:
    from torchvision.models import AlexNet_Weights

    name: str = AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _channels_first(frames: Frames) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)


def _psnr(expected: Tensor, found: Tensor) -> float:
    """Mean over frames."""
    errors = (expected.double() - found.double()).square().mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / errors)).clamp(max=_MOST_PSNR).mean())


def _ssim(expected: Tensor, found: Tensor) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    score = structural_similarity_index_measure(found.float(), expected.float(), data_range=255.0)
    assert isinstance(score, Tensor)
    return float(score)
