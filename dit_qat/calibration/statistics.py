"""What a block driver gathers about the inputs of one linear layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["LinearStatistics", "Needs", "step_scales"]

_QUANTILE = 0.999
_MOST_SORTED = 1 << 23  # values; torch.quantile refuses more than twice as many


@dataclass(frozen=True)
class Needs:
    """What a method asks to know about each of its linear layers.

    Attributes:
        second_moment: X^T X, in^2 numbers.
        cross_moment: (X_fp - X)^T X, in^2 numbers, X_fp being what the float model feeds the layer
            on the same tokens (GPTAQ, arXiv:2504.02692); a second, float path is carried along.
        moment_tokens: Rows of each call that enter the moments; None: all.
        tokens: Rows of X to keep, spread evenly over the calls.
        ranges: Least, greatest and greatest absolute value of every channel.
        call_ranges: Greatest absolute values call by call, too.
        probe_calls: Calls, spread evenly, on which errors of a block are measured.
    """

    second_moment: bool = False
    cross_moment: bool = False
    moment_tokens: int | None = None
    tokens: int = 0
    ranges: bool = True
    call_ranges: bool = False
    probe_calls: int = 4

    def __post_init__(self) -> None:
        for name, least in (("moment_tokens", 1), ("tokens", 0), ("probe_calls", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Needs({name}={value}): must be at least {least}")

    def bytes(self, width: int, calls: int) -> int:
        """What the statistics of a layer with ``width`` inputs take."""
        numbers = width * width * (self.second_moment + self.cross_moment)
        numbers += self.tokens * (width + 2)
        numbers += 3 * width * self.ranges + calls * width * self.call_ranges
        return 4 * numbers


class LinearStatistics:
    """Inputs of one linear layer over all calls; float32, on the device of the model.

    Args:
        width: Number of inputs.
        calls: Number of calls to come.
        needs: What to gather.
        device: Where.

    Attributes:
        tokens: Rows seen.
    """

    def __init__(
        self, width: int, calls: int, needs: Needs, device: torch.device | str = "cpu"
    ) -> None:
        self.width, self.tokens = width, 0
        self._calls, self._needs = calls, needs
        self._moment = SecondMoment(width, device=device) if needs.second_moment else None
        self._cross = torch.zeros(width, width, device=device) if needs.cross_moment else None
        self._low = torch.full((width,), torch.inf, device=device)
        self._high = torch.full((width,), -torch.inf, device=device)
        self._call_absmax = torch.zeros(calls if needs.call_ranges else 0, width, device=device)
        self._rows: list[Tensor] = []
        self._row_steps: list[Tensor] = []

    def add(
        self,
        x: Tensor,
        call: int,
        step: int = 0,
        weight: float = 1.0,
        reference: Tensor | None = None,
    ) -> None:
        """Take the rows of call number ``call``.

        Args:
            x: Inputs (..., width).
            call: Which of the calls it is.
            step: Its sampler step.
            weight: Of its part in the moments.
            reference: What the float model has in the place of x; for the cross moment.

        Raises:
            ValueError: if values are not finite.
        """
        rows = self._rows_of(x)
        self.tokens += len(rows)
        if self._needs.ranges or self._needs.call_ranges:
            self._add_ranges(rows, call)
        self._add_moments(rows, call, weight, reference)
        before, after = (self._needs.tokens * n // self._calls for n in (call, call + 1))
        if after > before:
            self._rows.append(_sample(rows, after - before, call))
            self._row_steps.append(torch.full((len(self._rows[-1]),), step))

    def _rows_of(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, self.width).float()
        if not bool(rows.isfinite().all()):
            bad = int((~rows.isfinite()).any(dim=1).sum())
            raise ValueError(f"{bad} of {len(rows)} inputs hold NaN or infinite values")
        return rows

    def _add_moments(
        self, rows: Tensor, call: int, weight: float, reference: Tensor | None
    ) -> None:
        some = _sample(rows, self._needs.moment_tokens or len(rows), call)
        # Rows that were left out are stood for by the others.
        weight *= len(rows) / max(len(some), 1)
        if self._moment is not None:
            self._moment.add(some, weight)
        if self._cross is not None:
            assert reference is not None
            exact = _sample(self._rows_of(reference), len(some), call)
            self._cross.addmm_((exact - some).T, some, alpha=weight)

    def _add_ranges(self, rows: Tensor, call: int) -> None:
        low, high = rows.aminmax(dim=0)
        self._low, self._high = self._low.minimum(low), self._high.maximum(high)
        if self._needs.call_ranges:
            here = self._call_absmax[call]
            torch.maximum(here, low.abs().maximum(high.abs()), out=here)

    @property
    def second_moment(self) -> SecondMoment | None:
        """X^T X (in, in), weighted by step if the method asked for it; None if not needed."""
        return self._moment

    @property
    def cross_moment(self) -> Tensor | None:
        """(X_fp - X)^T X (in, in), weighted as the second moment; None if not needed."""
        return self._cross

    @property
    def low(self) -> Tensor:
        """Least value of every channel (in,)."""
        self._require(self._needs.ranges, "ranges=True")
        return self._low

    @property
    def high(self) -> Tensor:
        """Greatest value of every channel (in,)."""
        self._require(self._needs.ranges, "ranges=True")
        return self._high

    @property
    def absmax(self) -> Tensor:
        """Greatest absolute value of every channel (in,)."""
        return self.low.abs().maximum(self.high.abs())

    @property
    def call_absmax(self) -> Tensor:
        """Greatest absolute values call by call (calls, in)."""
        self._require(self._needs.call_ranges, "call_ranges=True")
        return self._call_absmax

    @property
    def absmax_quantile(self) -> Tensor:
        """The .999 quantile (in,) of absolute values over the rows kept, or of maxima over calls.

        Of calls if there are call ranges, since an outlier of one token is no outlier of a call.
        """
        of_calls = self._needs.call_ranges
        self._require(of_calls or self._needs.tokens > 0, "call_ranges=True or tokens above 0")
        values = self._call_absmax if of_calls else self.rows.abs()
        columns = max(1, _MOST_SORTED // max(len(values), 1))
        parts = [part.quantile(_QUANTILE, dim=0) for part in torch.split(values, columns, dim=1)]
        return torch.cat(parts)

    @property
    def rows(self) -> Tensor:
        """Rows of X that were kept (n, in), in the order of the calls."""
        self._require(self._needs.tokens > 0, "tokens above 0")
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows)]  # once, rather than at every look
        return self._rows[0] if self._rows else self._low.new_zeros(0, self.width)

    @property
    def row_steps(self) -> Tensor:
        """Sampler step of every kept row (n,), int64, on the CPU."""
        self._require(self._needs.tokens > 0, "tokens above 0")
        return torch.cat(self._row_steps) if self._row_steps else torch.zeros(0, dtype=torch.int64)

    def _require(self, gathered: bool, what: str) -> None:
        if not gathered:
            raise ValueError(f"these statistics were not gathered; ask for Needs({what})")


def _sample(rows: Tensor, count: int, call: int) -> Tensor:
    """``count`` rows, or all; which, the number of the call decides, so that q, k, v agree."""
    if count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(call))
    return rows[order[:count].sort().values.to(rows.device)]


def step_scales(
    weights: Tensor | None, steps: Sequence[int], rows: Sequence[int]
) -> Mapping[int, float]:
    """Weight of every row of a step in the second moment: ``w_t / n_t``, n_t its rows in all.

    The matrix is ``sum_t w_t X_t^T X_t / n_t`` then, whatever number of rows a step has.

    Args:
        weights: By step (steps,); None: 1 for every row.
        steps: Step of every call.
        rows: Rows of every call.
    """
    if weights is None:
        return dict.fromkeys(steps, 1.0)
    totals: dict[int, int] = {}
    for step, count in zip(steps, rows, strict=True):
        totals[step] = totals.get(step, 0) + count
    return {step: float(weights[step]) / max(total, 1) for step, total in totals.items()}
