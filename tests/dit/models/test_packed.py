"""The DiT in the registry of architectures."""

import torch
from torch import nn

from dit_qat.dit.models import DiT, dit_variant
from dit_qat.export.registry import architecture_named, architecture_of


def test_a_dit_is_described_and_built_again() -> None:
    for model in (
        DiT(8, 2, 1, 32, 2, 4, num_classes=0, class_dropout_prob=0.0, learn_sigma=False),
        dit_variant("DiT-S/8", depth=1, timestep_shift=1, norm2_eps=1e-5),
    ):
        entry = architecture_of(model)
        assert entry is architecture_named("dit")
        with torch.device("meta"):
            twin = entry.build(entry.describe(model))
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        assert {name: value.shape for name, value in twin.state_dict().items()} == shapes
        assert entry.describe(twin) == entry.describe(model)
        assert isinstance(twin.get_submodule("blocks.0.mlp.fc1"), nn.Linear)
