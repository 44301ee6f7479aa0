"""N:M pruning: which entries of every M consecutive columns are kept, and how many per layer."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dit_qat.calibration import Run
from dit_qat.layers.binary_code import BinaryLayout
from dit_qat.llm.methods.binarizer import CodingMethod

__all__ = [
    "PruningMethod",
    "allocate_kept",
    "drop_lowest",
    "keep_highest",
    "outlier_share",
    "ria",
    "shifted_kept",
]

_HALVINGS = 80
_ROWS = 256  # sorted at a time: places take two weights of memory


class PruningMethod(CodingMethod):
    """A method that prunes to N:M, where layers may differ in N; its configuration says ``of``."""

    _kept: Mapping[str, int] = {}

    def start(self, run: Run) -> None:
        """Decide how much every layer keeps, while the model is float.

        Raises:
            ValueError: for a layer whose width patterns do not fill, or as :meth:`allocate`.
        """
        super().start(run)
        self._kept = self.allocate(run)

    @abstractmethod
    def allocate(self, run: Run) -> Mapping[str, int]:
        """Entries kept of every group, by full name of a linear; those absent keep the usual."""

    def check_shape(self, rows: int, width: int) -> None:
        """Refuse a layer whose width patterns do not fill."""
        own = self.config
        BinaryLayout(kept=own.kept, of=own.of, block_size=own.block_size).blocks(width)

    def kept_of(self, name: str) -> int:
        """Entries that a linear keeps of every group."""
        return self._kept.get(name, int(self.config.kept))


def keep_highest(score: Tensor, kept: int, of: int) -> Tensor:
    """Mask (n, k) bool of the ``kept`` highest scores in every ``of`` consecutive columns of a row.

    Of equal scores the first is dropped first.
    """
    mask = torch.ones_like(score, dtype=torch.bool)
    for rows, kept_rows in zip(torch.split(score, _ROWS), torch.split(mask, _ROWS), strict=True):
        lowest = rows.view(len(rows), -1, of).argsort(dim=-1, stable=True)[..., : of - kept]
        kept_rows.view(len(rows), -1, of).scatter_(-1, lowest, False)
    return mask


def drop_lowest(score: Tensor, keep: Tensor, of: int) -> Tensor:
    """The mask with one entry less in every ``of`` columns of a row: its lowest score."""
    groups = score.masked_fill(~keep, torch.inf).view(len(score), -1, of)
    dropped = keep.view(groups.shape).scatter(-1, groups.argmin(-1, keepdim=True), False)
    return dropped.view(keep.shape)


def ria(weight: Tensor, norms: Tensor, power: float = 0.5) -> Tensor:
    """Relative importance ``(|w| / column sum + |w| / row sum) ||x_j||^power`` (out, in).

    arXiv:2408.01803, after RIA.

    Args:
        weight: (out, in).
        norms: (in,) norms of the inputs.
        power: Of the norms.
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    relative = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, True).clamp_min(tiny)
    return relative * norms.to(size.dtype) ** power


def outlier_share(score: Tensor, factor: float = 3.0) -> float:
    """Share of scores above ``factor`` times their mean."""
    return float((score > factor * score.mean()).double().mean())


def shifted_kept(shares: Sequence[float], kept: int, of: int, strength: float) -> list[int]:
    """Entries kept per layer as STBLLM's release allocates them by outlier shares.

    Shares are scaled to 0..strength, centred and rounded; a shift of one becomes two. Below a
    strength of 1/2 (the release has 0.08) every shift is zero.
    """
    values = torch.tensor(shares, dtype=torch.float64)
    spread = values.max() - values.min()
    scaled = strength * (values - values.min()) / (spread if spread > 0 else 1)
    shift = (scaled - scaled.mean()).round()
    shift[shift == 1] = 2
    return [int(n) for n in (kept + shift).clamp(1, of)]


def allocate_kept(
    importance: Sequence[float],
    target: int,
    low: int,
    high: int,
    gain: float = 1.0,
    sizes: Sequence[int] | None = None,
) -> list[int]:
    """Entries kept per layer, more where importance is higher, ``target`` on average.

    ``clip(floor(target + gain (I - 1) + t + 1/2), low, high)`` with importances of mean one, and t
    found by bisection; layers between the two values at its limit are settled by importance, so
    that layers of one size meet the budget exactly and others do not exceed it.

    Args:
        importance: Of every layer, positive on the whole.
        target: Entries kept on average.
        low: Least.
        high: Most.
        gain: Of importance.
        sizes: Weights of the layers; None: all the same.

    Raises:
        ValueError: for importances without a positive mean, or a target outside low..high.
    """
    values = torch.tensor(importance, dtype=torch.float64)
    if not bool(values.isfinite().all()) or not float(values.mean()) > 0:
        raise ValueError("importances of layers must be finite, with a mean above 0")
    if not low <= target <= high:
        raise ValueError(f"target={target} lies outside {low}..{high}")
    values = gain * (values / values.mean() - 1) + target + 0.5
    weights = torch.ones(len(values)) if sizes is None else torch.tensor(sizes)
    weights, budget = weights.double(), target * float(weights.double().sum())

    def kept(t: float) -> Tensor:
        return (values + t).floor().clamp(low, high)

    reach = float(values.max() - values.min()) + high - low + 1
    under, over = -reach, reach
    for _ in range(_HALVINGS):
        middle = (under + over) / 2
        under, over = (middle, over) if kept(middle) @ weights <= budget else (under, middle)
    found, more = kept(under), kept(over)
    for layer in values.argsort(stable=True, descending=True):
        trial = found.clone()
        trial[layer] = more[layer]
        if trial @ weights <= budget:
            found = trial
    return [int(n) for n in found]
