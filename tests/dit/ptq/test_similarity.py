import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_qat.dit.ptq.similarity import PairScorer


def frames(value: int = 100, count: int = 1, side: int = 16) -> np.ndarray:
    return np.full((count, side, side, 3), value, dtype=np.uint8)


def test_psnr_is_its_definition() -> None:
    a, b = frames(), frames()
    b[:, :8] += 10  # half of the pixels by 10: a mean square of 50
    assert PairScorer()("", a, b)["psnr"] == pytest.approx(10 * math.log10(255**2 / 50))


def test_equal_images_get_the_most() -> None:
    scores = PairScorer()("", frames(), frames())
    assert scores["psnr"] == 100
    assert scores["ssim"] == pytest.approx(1)


def test_a_video_gets_the_mean_over_its_frames() -> None:
    scorer, a, b = PairScorer(), frames(count=2), frames(count=2)
    b[0] += 5
    b[1] += 20
    parts = [scorer("", a[i : i + 1], b[i : i + 1])["psnr"] for i in range(2)]
    assert scorer("", a, b)["psnr"] == pytest.approx(sum(parts) / 2)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place of torch's downloads."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_what_is_missing_is_said_and_left_out(tmp_path: Path) -> None:
    scorer = PairScorer(clip=str(tmp_path / "no-clip"))
    scores = scorer("", frames(side=8), frames(side=8))
    assert [*scores] == ["psnr"]
    assert "pth, which is not here" in scorer.missing["lpips"]
    assert "CLIPScore needs" in scorer.missing["clip_score"]
    assert "windows of 11 pixels, and these images have 8" in scorer.missing["ssim"]


def test_frames_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="are no pair"):
        PairScorer()("", frames(), frames(side=24))


class Metric:
    """In the place of torchmetrics' own, which takes hundreds of megabytes of weights."""

    def __init__(self, *settings: object) -> None:
        self.asked: list[tuple[torch.Tensor, object]] = []

    def to(self, device: object) -> "Metric":
        return self

    def eval(self) -> "Metric":
        return self

    def __call__(self, one: torch.Tensor, other: object) -> torch.Tensor:
        self.asked.append((one, other))
        return one.float().mean()


def test_lpips_is_asked_for_frames_from_minus_one_to_one(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import AlexNet_Weights

    metric = Metric()
    name = "LearnedPerceptualImagePatchSimilarity"
    monkeypatch.setattr(f"torchmetrics.image.lpip.{name}", lambda *_: metric)
    (hub / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]).touch()
    scorer = PairScorer()
    assert "lpips" not in scorer.missing
    assert scorer("", frames(0, 2, 32), frames(255, 2, 32))["lpips"] == -1
    assert [(float(a.max()), float(b.min())) for a, b in metric.asked] == [(-1.0, 1.0)] * 2
    assert metric.asked[0][0].shape == (1, 3, 32, 32)


def test_clip_scores_both_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The metric itself is torchmetrics'; here only what it is asked."""
    metric = Metric()
    monkeypatch.setattr("dit_qat.dit.ptq.similarity.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr("torchmetrics.multimodal.CLIPScore", lambda _: metric)
    scorer = PairScorer(clip=str(tmp_path))
    scores = scorer("a red cat", frames(100, 3), frames(200, 3))
    assert (scores["clip_score_float"], scores["clip_score_quantized"]) == (100, 200)
    assert [(image.shape, prompt) for image, prompt in metric.asked] == [
        ((3, 16, 16), "a red cat"),
        ((3, 16, 16), "a red cat"),
    ]
