import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation import train_digit_classifier
from dit_qat.dit.evaluation.inception import Activations, load_inception
from dit_qat.dit.processes import Processes
from dit_qat.dit.randomness import generator_for


@pytest.fixture(scope="session")
def held_out():
    """A mask of every fifth digit, which the ``classifier`` fixture has not seen."""
    return torch.arange(len(digit_images()[0])) % 5 == 0


@pytest.fixture(scope="session")
def classifier(held_out):
    images, labels = digit_images()
    return train_digit_classifier(steps=120, seed=0, data=(images[~held_out], labels[~held_out]))


@pytest.fixture(scope="session")
def inception(inception_file):
    return load_inception(inception_file)


class SmallInception(nn.Module):
    """Outputs like Inception's of few dimensions, in no time."""

    num_features, num_spatial = 12, 9
    sha256 = "5" * 64

    def __init__(self):
        super().__init__()
        weight = torch.randn(48, 12 + 9 + 10, generator=generator_for(0, "small inception"))
        self.register_buffer("weight", weight)
        self.images = 0

    def activations(self, images):
        self.images += len(images)
        cells = F.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1).float() / 128 - 1, 4)
        return Activations(*(cells.flatten(1) @ self.weight).tanh().split([12, 9, 10], dim=1))

    def forward(self, images):
        return self.activations(images).pool


@pytest.fixture
def small_inception():
    return SmallInception()


@pytest.fixture
def alone():
    return Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def run_together():
    """Call a function as several processes would, each in a thread; return what each got."""

    def run(count, action):
        board, barrier = [None] * count, threading.Barrier(count, timeout=300)

        class Linked(Processes):
            def gather(self, value):
                board[self.rank] = pickle.dumps(value)
                barrier.wait()
                values = [pickle.loads(item) for item in board]
                barrier.wait()
                return values

        processes = [Linked(rank, count, torch.device("cpu")) for rank in range(count)]
        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(action, process) for process in processes]
            return [future.exception() or future.result() for future in futures]

    return run


@pytest.fixture
def make_images():
    """Images of smooth random patches, uint8, whose statistics a shift moves."""

    def make(count, key="images", shape=(3, 8, 8), shift=0):
        generator = generator_for(0, key)
        coarse = torch.rand(count, shape[0], 4, 4, generator=generator)
        images = F.interpolate(coarse, shape[1:]) * 200 + shift
        return images.clamp(0, 255).to(torch.uint8)

    return make
