"""When a measurement says how long it is going to take."""

import pytest

from dit_qat.dit.evaluation import meter
from dit_qat.dit.evaluation.meter import Meter


@pytest.mark.parametrize(
    ("total", "sample", "said_after", "text"),
    [
        (1000, 9, 9, "rows: 1,000 batches, about 50 min"),
        (20, 9, 2, "rows: 20 batches, about 60 s"),
        (3, 9, 1, "rows: 3 batches, about 9 s"),
        (10_000, 1, 1, "rows: 10,000 batches, about 8.3 h"),
    ],
)
def test_a_sample_tells_the_time(monkeypatch, total, sample, said_after, text) -> None:
    clock = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    said: list[tuple[float, str]] = []
    with Meter("rows", total, sample, False, lambda line: said.append((clock[0], line))) as counted:
        for _ in range(total):
            clock[0] += 3
            counted.tick()
    assert said == [(3 * said_after, text)]


def test_nobody_need_listen() -> None:
    with Meter("rows", 2, 1, False, None) as counted:
        counted.tick()
