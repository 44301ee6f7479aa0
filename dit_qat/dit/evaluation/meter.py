"""How far a measurement is, and, as soon as it shows, how long it is going to take."""

import time
from collections.abc import Callable
from types import TracebackType

from tqdm.auto import tqdm

__all__ = ["Meter"]


class Meter:
    """Count batches: a bar over them, and one sentence for those who see no bar.

    Args:
        what: What is measured, for the sentence.
        total: How many batches there will be.
        sample: After how many of them the rest is estimated; fewer where all are few.
        progress: Whether to show the bar.
        say: Takes the sentence; None for none.
    """

    def __init__(
        self,
        what: str,
        total: int,
        sample: int,
        progress: bool,
        say: Callable[[str], None] | None,
    ) -> None:
        self._what, self._total, self._say = what, total, say
        self._sample = max(1, min(sample, total // 10))
        self._done = 0
        self._bar = tqdm(total=total, desc="sensitivity", unit="batch", disable=not progress)
        self._started = time.perf_counter()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def tick(self) -> None:
        """Count a batch."""
        self._done += 1
        self._bar.update()
        if self._done == self._sample and self._say is not None:
            each = (time.perf_counter() - self._started) / self._done
            self._say(
                f"{self._what}: {self._total:,} batches, about {_lasting(each * self._total)}"
            )


def _lasting(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
