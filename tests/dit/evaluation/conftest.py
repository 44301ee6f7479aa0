import pytest
import torch

from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation import train_digit_classifier


@pytest.fixture(scope="session")
def held_out():
    """A mask of every fifth digit, which the ``classifier`` fixture has not seen."""
    return torch.arange(len(digit_images()[0])) % 5 == 0


@pytest.fixture(scope="session")
def classifier(held_out):
    images, labels = digit_images()
    return train_digit_classifier(steps=120, seed=0, data=(images[~held_out], labels[~held_out]))
