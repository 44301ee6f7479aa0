from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation import classifier as module
from dit_qat.dit.evaluation.classifier import (
    DigitClassifier,
    load_digit_classifier,
    train_digit_classifier,
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed package, with an empty folder of assets."""
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr(module, "resources", SimpleNamespace(files=lambda _: tmp_path))
    return tmp_path


def test_it_recognizes_digits_that_it_has_not_seen(classifier, held_out):
    images, labels = digit_images()
    hits = classifier(images[held_out]).argmax(dim=1) == labels[held_out]
    assert hits.float().mean() > 0.9


def test_features_are_what_the_last_layer_sees(classifier):
    images = digit_images()[0][:7]
    features = classifier.features(images)
    assert features.shape == (7, DigitClassifier.num_features)
    assert torch.equal(classifier.head(features), classifier(images))


def test_training_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = train_digit_classifier(steps=3, seed=5)
    before = torch.manual_seed(2).get_state()
    second = train_digit_classifier(steps=3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    third = train_digit_classifier(steps=3, seed=6)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
        assert not torch.equal(weight, third.state_dict()[name])


def test_shifts_move_the_digit_by_at_most_one_pixel_over_background():
    images = torch.full((1, 1, 8, 8), -1.0)
    images[0, 0, 3, 4] = 1.0
    positions = set()
    for indices, shifted in module._shifted_batches(images, steps=2, seed=0):
        assert indices.tolist() == [0] * len(indices)
        assert torch.equal(shifted.sum(dim=(1, 2, 3)), torch.full((len(indices),), -62.0))
        positions |= {divmod(int(image.argmax()), 8) for image in shifted}
    assert positions == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


def test_training_needs_a_step():
    with pytest.raises(ValueError, match="steps=0"):
        train_digit_classifier(steps=0)


def test_loading_restores_the_saved_weights_frozen(package, classifier):
    save_file(classifier.state_dict(), package / "assets" / "digits_classifier.safetensors")
    before = torch.get_rng_state()
    loaded = load_digit_classifier()
    assert torch.equal(torch.get_rng_state(), before)
    images = digit_images()[0][:9]
    assert torch.equal(loaded(images), classifier(images))
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_loading_is_strict(package, classifier):
    weights = classifier.state_dict()
    del weights["head.bias"]
    save_file(weights, package / "assets" / "digits_classifier.safetensors")
    with pytest.raises(ValueError, match=r"(?s)not the classifier of this version.*head\.bias"):
        load_digit_classifier()


def test_a_damaged_asset_is_explained(package, classifier):
    path = package / "assets" / "digits_classifier.safetensors"
    save_file(classifier.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"digits_classifier\.safetensors is damaged.*reinstall"):
        load_digit_classifier()


def test_a_missing_asset_is_explained(package):
    with pytest.raises(FileNotFoundError, match=r"reinstall dit-qat.*train_digit_classifier"):
        load_digit_classifier()
