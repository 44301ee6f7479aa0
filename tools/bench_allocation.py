"""Time to allocate bits to the 112 layers of a DiT-XL/2, four choices each: at most a second.

    python tools/bench_allocation.py [--runs 5]

Medians and the slowest of some random sensitivities, whose layers differ as log-normal numbers do,
at four averages: with the costs of DiT-XL/2, by both solvers, and with costs that share no unit.
"""

import argparse
import statistics
import time

import numpy as np
import numpy.typing as npt

from dit_qat.allocation import allocate_bits
from dit_qat.allocation.knapsack import Solver

CHOICES, AVERAGES = (1, 2, 3, 4), (1.3, 2.0, 2.7, 3.3)
GAUSSIAN_ERRORS = (0.36338, 0.118846, 0.0374397, 0.0115429)  # of a Gaussian at these bits
COST = [parts * 1152**2 for parts in (3, 1, 4, 4)] * 28  # qkv, proj, fc1, fc2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="sensitivities per average")
    runs = parser.parse_args().runs
    random = np.random.default_rng(0)
    solvers: tuple[Solver, ...] = ("table", "milp")
    for solver in solvers:
        report(f"costs of DiT-XL/2, {solver}", [np.array(COST, float)] * runs, solver, random)
    uneven = [random.uniform(1, 5, len(COST)) for _ in range(runs)]
    report("costs without a common unit", uneven, "auto", random)


def report(
    what: str,
    costs: list[npt.NDArray[np.float64]],
    solver: Solver,
    random: np.random.Generator,
) -> None:
    seconds = []
    for average in AVERAGES:
        for cost in costs:
            errors = np.array(GAUSSIAN_ERRORS) * random.lognormal(size=(len(cost), 1))
            started = time.perf_counter()
            allocate_bits(errors, cost.tolist(), CHOICES, average, solver=solver)
            seconds.append(time.perf_counter() - started)
    print(f"{what}: median {statistics.median(seconds):.3f} s, slowest {max(seconds):.3f} s")


if __name__ == "__main__":
    main()
