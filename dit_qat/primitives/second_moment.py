"""The streaming second moment X^T X of a layer's inputs; the literature calls it the Hessian."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["SecondMoment"]


class SecondMoment:
    """Sum of ``weight * x x^T`` over the tokens seen, uncentred.

    Args:
        width: Features of a token.
        device: Where the sum is kept and formed.
        dtype: What it is summed in.

    Attributes:
        matrix: (width, width), symmetric.
        tokens: How many tokens were added.
    """

    def __init__(
        self,
        width: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if width < 1:
            raise ValueError(f"width={width} is no width; it must be at least 1")
        self.matrix = torch.zeros(width, width, device=device, dtype=dtype)
        self.tokens = 0

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.matrix.shape[0]

    @torch.no_grad()
    def add(self, x: Tensor, weight: float = 1.0) -> None:
        """Add tokens (..., width), each counted ``weight`` times.

        Raises:
            ValueError: for another width, values that are not finite, or a weight that is not
                finite or below 0.
        """
        if x.ndim < 1 or x.shape[-1] != self.width:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, the second moment width {self.width}; "
                "its last dimension must be that width"
            )
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight={weight} is no weight of tokens; use a finite one from 0 on")
        rows = x.detach().reshape(-1, self.width).to(self.matrix)
        if not rows.isfinite().all():
            bad = int((~rows.isfinite()).any(-1).count_nonzero())
            raise ValueError(
                f"{bad} of {rows.shape[0]} tokens hold NaN or infinite values; "
                "a second moment of them would be of no use"
            )
        self.matrix.addmm_(rows.T, rows, alpha=weight)
        self.tokens += rows.shape[0]

    def state(self) -> dict[str, Tensor]:
        """Plain tensors from which :meth:`from_state` goes on."""
        return {"matrix": self.matrix, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "SecondMoment":
        """The inverse of :meth:`state`; shares the matrix.

        Raises:
            ValueError: if the matrix is not square.
        """
        matrix = state["matrix"]
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a second moment is square, not {tuple(matrix.shape)}; it is damaged")
        moment = cls(1, device="meta")
        moment.matrix, moment.tokens = matrix, int(state["tokens"])
        return moment
