"""Images in pixel space, straight from their files."""

import torch
from torch import Tensor

from dit_qat.dit.data.fit import check_labels, check_shape, fixed_choice
from dit_qat.dit.data.module import StepData
from dit_qat.dit.data.pictures import Pictures, image_of, model_space
from dit_qat.dit.data.sampler import Draw
from dit_qat.dit.models import DiT
from dit_qat.dit.randomness import derive_seed

__all__ = ["Images"]

_CHANNELS = 3


class _Pixels:
    def __init__(self, pictures: Pictures, size: int) -> None:
        self.pictures, self.size = pictures, size
        self._labels = pictures.labels

    def load(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images (n, 3, S, S) in [-1, 1], perhaps none, and labels, zeros where there are none."""
        images = torch.empty(len(indices), _CHANNELS, self.size, self.size, dtype=torch.uint8)
        for image, index in zip(images, indices, strict=True):
            image.copy_(image_of(self.pictures, index, self.size))
        labels = torch.zeros(len(indices), dtype=torch.int64)
        if self._labels is not None:
            labels = self._labels[indices]
        return model_space(images), labels


class _Training(_Pixels):
    """All images, mirrored or not by their place in the run."""

    def __init__(self, pictures: Pictures, size: int, seed: int, mirror: bool) -> None:
        super().__init__(pictures, size)
        self.seed, self.mirror = seed, mirror

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        images, labels = self.load(draw.indices)
        if self.mirror:
            places = range(draw.position, draw.position + len(draw.indices))
            mirrored = torch.tensor([derive_seed(self.seed, "mirror", p) % 2 for p in places])
            images = torch.where(mirrored.bool()[:, None, None, None], images.flip(-1), images)
        return images, labels


class _Validation(_Pixels):
    """Chosen images as they are."""

    def __init__(self, pictures: Pictures, size: int, chosen: list[int]) -> None:
        super().__init__(pictures, size)
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        return self.load([self.chosen[index] for index in draw.indices])


class Images(StepData):
    """Serve pictures as images in [-1, 1], for a DiT in pixel space.

    Whether an image is mirrored depends on the seed and its place in the run, not on processes or
    workers. Validation takes ``validation_images`` images, unmirrored and in a fixed order: of
    ``validation``, or, without it, of the training data themselves, which are then not held out.

    Args:
        pictures: Training pictures, such as ``CIFAR10`` or ``ImageFolder``.
        size: Height and width, after a centre crop.
        batch_size: Images per optimizer step, over all processes and accumulated micro-batches.
        validation: Other pictures.
        validation_images: How many images to validate on at most; 0 for no validation.
        mirror: Whether to flip half of the images from left to right in training.
        seed: Of order and mirrors; by default the ``seed`` of the module in training.
        num_workers: Loader processes of each training process; decoding needs them.

    Raises:
        ValueError: for a number that is out of its range; in training, for a broken picture.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: int,
        batch_size: int = 128,
        validation: Pictures | None = None,
        validation_images: int = 1024,
        mirror: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        if size < 1 or validation_images < 0:
            raise ValueError(
                f"size={size} must be at least 1 and validation_images={validation_images} not "
                "negative"
            )
        self.pictures, self.size, self.mirror = pictures, size, mirror
        self.validation = pictures if validation is None else validation
        self.validation_images = validation_images

    def train_dataset(self) -> _Training:
        """All training pictures."""
        return _Training(self.pictures, self.size, self.run_seed(), self.mirror)

    def validation_dataset(self) -> _Validation:
        """The same images for every run."""
        chosen = fixed_choice(len(self.validation), self.validation_images)
        return _Validation(self.validation, self.size, chosen)

    def check_network(self, network: DiT) -> None:
        """Refuse a network of another shape, or whose classes are not those of the labels.

        Raises:
            ValueError: saying which argument of the network to change.
        """
        check_shape(network, _CHANNELS, self.size, "the images")
        check_labels(network, self.pictures.labels, "the training images")
        check_labels(network, self.validation.labels, "the validation images")
