from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from dit_qat.dit.evaluation.dinov2 import _fit_positions, load_dinov2

build = partial(VisionTransformer, patch_size=14, embed_dim=32, depth=1, num_heads=2, init_values=1)


@pytest.fixture(scope="module")
def state():
    """Weights in the layout of Meta's file: 37 x 37 positions, a mask token, no head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(img_size=518, num_classes=0)
        torch.nn.init.normal_(network.pos_embed)
    return {**network.state_dict(), "mask_token": torch.zeros(1, 32)}


@pytest.fixture(params=["pth", "safetensors"])
def dino(request, state, tmp_path):
    path = tmp_path / f"dino.{request.param}"
    {"pth": torch.save, "safetensors": save_file}[request.param](state, path)
    return load_dinov2(path, build=build)


def test_features_are_the_class_token_of_a_pillow_resized_image(dino, state):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 300, 260), generator=generator, dtype=torch.uint8)
    channels = [
        np.asarray(
            Image.fromarray(channel.numpy().astype(np.float32)).resize((224, 224), Image.BICUBIC)
        )
        for channel in image
    ]
    pixels = torch.from_numpy(np.stack(channels)).clamp(0, 255) / 255
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    tokens = dino.network.forward_features(pixels.unsqueeze(0))
    torch.testing.assert_close(dino(image.unsqueeze(0)), tokens[:, 0], rtol=1e-4, atol=1e-4)
    assert dino.num_features == 32
    assert len(dino.sha256) == 64
    assert not dino.train().network.training


def test_positions_are_interpolated_as_dinov2_does(state):
    fitted = _fit_positions(state, 16)["pos_embed"]
    assert fitted.shape == (1, 1 + 16**2, 32)
    assert torch.equal(fitted[:, 0], state["pos_embed"][:, 0])
    # The scale factor 16.1 / 37, not 16 / 37, places the samples.
    at = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    ramp = torch.arange(37.0).view(1, 37, 1).expand(37, 37, 1).reshape(1, -1, 1)
    ramped = {"pos_embed": torch.cat([torch.zeros(1, 1, 1), ramp], dim=1)}
    rows = _fit_positions(ramped, 16)["pos_embed"][0, 1:, 0].view(16, 16)
    # A cubic is not exact on a ramp; 16 / 37 would be off by 0.19 at the far end.
    torch.testing.assert_close(rows[0, 2:-2], at[2:-2], rtol=0, atol=0.06)


def test_other_weights_are_refused(state, tmp_path):
    path = tmp_path / "dino.pth"
    torch.save({k: v for k, v in state.items() if k != "norm.weight"}, path)
    with pytest.raises(ValueError, match="another network than VisionTransformer"):
        load_dinov2(path, build=build)
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        load_dinov2(tmp_path / "nothing.pth", build=build)
