import pytest
import torch

from dit_qat.dit.models import dit_variant


def count(name, **overrides):
    with torch.device("meta"):
        model = dit_variant(name, **overrides)
    return sum(parameter.numel() for parameter in model.parameters())


# arXiv:2212.09748, table 1, in millions; XL/2 to the last parameter from the published file.
@pytest.mark.parametrize(
    ("name", "millions"), [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675)]
)
def test_parameter_counts_are_the_published_ones(name, millions):
    assert count(name) == pytest.approx(millions * 1e6, rel=0.005)


def test_xl_2_has_exactly_the_parameters_of_the_published_checkpoint():
    assert count("DiT-XL/2") == 675_129_632


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_every_published_variant_builds(size, patch):
    with torch.device("meta"):
        model = dit_variant(f"DiT-{size}/{patch}", num_classes=10)
    assert (model.patch_size, model.num_classes) == (patch, 10)
    assert model.pos_embed.shape[1] == (32 // patch) ** 2


@pytest.mark.parametrize("name", ["DiT-M/2", "DiT-XL/3", "xl/2", "DiT-XL/22"])
def test_unknown_variants_list_the_known_ones(name):
    with pytest.raises(ValueError, match="DiT-XL/"):
        dit_variant(name)
