"""Inception Score, from sums that do not grow with the number of images."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["InceptionScore"]


@dataclass
class _Split:
    """Sums over the images of one split: of probabilities (C,), and of sum_c p log p."""

    count: int
    probabilities: Tensor
    negative_entropy: float

    def add(self, other: "_Split") -> None:
        self.count += other.count
        self.probabilities = self.probabilities + other.probabilities
        self.negative_entropy += other.negative_entropy

    def score(self) -> float:
        marginal = self.probabilities / self.count
        entropy = -torch.special.xlogy(marginal, marginal).sum()
        return float((self.negative_entropy / self.count + entropy).exp())


class InceptionScore:
    """``exp(E_x KL(p(y|x) || p(y)))``, by the splits of ADM's evaluator.

    Splits are images 0 to 4,999, 5,000 to 9,999 and so on, the last one may be smaller; the score
    is their mean. torch-fidelity shuffles the images and makes ten equal splits instead, which for
    50,000 images is the same up to the shuffle (Salimans et al., "Improved Techniques for Training
    GANs", arXiv:1606.03498, section 4).

    Args:
        split_size: Images per split.
    """

    def __init__(self, split_size: int = 5000) -> None:
        self.split_size = split_size
        self._splits: dict[int, _Split] = {}

    def update(self, first: int, logits: Tensor) -> None:
        """Add logits (N, C) of the images from number ``first`` on."""
        values = logits.detach().to("cpu", torch.float64)
        indices = torch.arange(first, first + len(values)) // self.split_size
        for split in sorted(set(indices.tolist())):
            logs = values[indices == split].log_softmax(dim=1)
            p = logs.exp()
            self._add(split, _Split(len(p), p.sum(dim=0), float((p * logs).sum())))

    def merge(self, other: "InceptionScore") -> None:
        """Add the images of another process."""
        for split, sums in other._splits.items():
            self._add(split, sums)

    def compute(self) -> tuple[float, float]:
        """Return mean and standard deviation over the splits.

        Raises:
            ValueError: No images.
        """
        if not self._splits:
            raise ValueError("an Inception Score needs at least 1 image")
        scores = torch.tensor(
            [split.score() for split in self._splits.values()], dtype=torch.float64
        )
        return float(scores.mean()), float(scores.std(correction=0))

    def _add(self, split: int, sums: _Split) -> None:
        if split in self._splits:
            self._splits[split].add(sums)
        else:
            self._splits[split] = _Split(sums.count, sums.probabilities, sums.negative_entropy)
