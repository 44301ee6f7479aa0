"""The embedded data set: scikit-learn's 1,797 handwritten digits of 8x8 pixels."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dit_qat.dit.data.module import StepData
from dit_qat.dit.data.sampler import Draw
from dit_qat.dit.models import DiT

__all__ = ["Digits", "digit_images"]


def digit_images() -> tuple[Tensor, Tensor]:
    """Return all images (1797, 1, 8, 8) in [-1, 1], float32, and their labels (1797,), int64.

    The 17 grey levels 0..16 become ``level / 8 - 1``, which float32 holds exactly.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).div(8).sub(1)
    return images.unsqueeze(1), torch.from_numpy(digits.target).to(torch.int64)


class _DigitDraws:
    def __init__(self) -> None:
        self.images, self.labels = digit_images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        return self.images[draw.indices], self.labels[draw.indices]


class Digits(StepData):
    """Serve the digits; validation and test go through all of them, in order.

    Args:
        batch_size: Images per optimizer step, over all processes and accumulated micro-batches.
        seed: Seed of the shuffled order; by default the ``seed`` of the module in training.
        num_workers: Loader processes; 0 is fastest for images this small.

    Raises:
        ValueError: A batch size below 1 or a negative number of workers.
    """

    num_classes = 10
    image_shape = (1, 8, 8)

    def __init__(
        self, batch_size: int = 128, seed: int | None = None, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, seed, num_workers)

    def train_dataset(self) -> _DigitDraws:
        """All digits."""
        return _DigitDraws()

    def validation_dataset(self) -> _DigitDraws:
        """All digits."""
        return _DigitDraws()

    def check_network(self, network: DiT) -> None:
        """Refuse a network of another shape, or with too few classes.

        Raises:
            ValueError: saying which argument of the network to change.
        """
        shape = (network.in_channels, network.input_size, network.input_size)
        if shape != self.image_shape:
            raise ValueError(
                f"digits have the shape {self.image_shape}, the network takes {shape}; set its "
                "in_channels and input_size"
            )
        if network.num_classes and network.num_classes < self.num_classes:
            raise ValueError(
                f"digits have {self.num_classes} classes, the network num_classes="
                f"{network.num_classes}; set that to {self.num_classes}, or to 0 to ignore labels"
            )
