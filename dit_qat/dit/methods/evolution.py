"""An evolutionary search over a few choices per gene, as Q-DiT uses it (arXiv:2406.17343)."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

__all__ = ["Evolution", "Found", "Genes", "evolve"]

Genes = tuple[int, ...]

_TRIES = 10  # draws per child wanted, as in the release; legal children may be rare


@dataclass(frozen=True)
class Evolution:
    """Sizes of the search, as in Q-DiT.

    Attributes:
        epochs: Generations after the first.
        population: Of a generation; random candidates make up what children leave.
        parents: The best so far, from which children come.
        crossover: Children of two parents, each gene of either.
        mutation: Children of one parent, some genes drawn anew.
        mutation_rate: Share of those genes.

    Raises:
        ValueError: for sizes that make no search.
    """

    epochs: int = 10
    population: int = 50
    parents: int = 10
    crossover: int = 25
    mutation: int = 25
    mutation_rate: float = 0.1

    def __post_init__(self) -> None:
        if min(self.population, self.parents) < 1 or min(self.epochs, self.crossover) < 0:
            raise ValueError(f"{self} searches nothing; population and parents start at 1")
        if self.mutation < 0 or not 0 < self.mutation_rate <= 1:
            raise ValueError(f"{self}: mutation starts at 0, its rate lies above 0 and up to 1")


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        genes: The fittest.
        fitness: Its value; lower is fitter.
        history: Least fitness after the first generation and after each epoch.
        evaluated: How many different candidates were measured.
    """

    genes: Genes
    fitness: float
    history: list[float]
    evaluated: int


def evolve(
    choices: Sequence[Sequence[int]],
    start: Genes,
    fitness: Callable[[Genes], float],
    legal: Callable[[Genes], bool],
    config: Evolution,
    seed: int,
) -> Found:
    """Search genes of least fitness; the start is a candidate, so the result is never worse.

    Args:
        choices: Values of every gene.
        start: Seed of the first generation, legal.
        fitness: Lower is better; asked once per candidate.
        legal: Which candidates may live.
        config: Sizes of the search.
        seed: Of all draws.
    """
    return _Search(choices, fitness, legal, config, random.Random(seed)).run(start)


class _Search:
    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        fitness: Callable[[Genes], float],
        legal: Callable[[Genes], bool],
        config: Evolution,
        draw: random.Random,
    ) -> None:
        self.choices, self.fitness, self.legal = choices, fitness, legal
        self.config, self.draw = config, draw
        self.measured: dict[Genes, float] = {}

    def run(self, start: Genes) -> Found:
        c = self.config
        self._measure(start)
        self._grow(self._random, c.population - 1)
        history = [min(self.measured.values())]
        for _ in range(c.epochs):
            parents = sorted(self.measured, key=self.measured.__getitem__)[: c.parents]
            born = self._grow(partial(self._mutant, parents), c.mutation)
            born += self._grow(partial(self._cross, parents), c.crossover)
            self._grow(self._random, c.population - born)
            history.append(min(self.measured.values()))
        best = min(self.measured, key=self.measured.__getitem__)
        return Found(best, self.measured[best], history, len(self.measured))

    def _grow(self, make: Callable[[], Genes], count: int) -> int:
        """Measure up to ``count`` new legal candidates; how many there were."""
        born = 0
        for _ in range(_TRIES * count):
            if born >= count:
                break
            genes = make()
            if genes not in self.measured and self.legal(genes):
                self._measure(genes)
                born += 1
        return born

    def _measure(self, genes: Genes) -> None:
        fitness = self.fitness(genes)
        self.measured[genes] = math.inf if math.isnan(fitness) else fitness

    def _random(self) -> Genes:
        return tuple(self.draw.choice(values) for values in self.choices)

    def _mutant(self, parents: Sequence[Genes]) -> Genes:
        rate = self.config.mutation_rate
        pairs = zip(self.draw.choice(parents), self.choices, strict=True)
        return tuple(
            self.draw.choice(values) if self.draw.random() < rate else gene
            for gene, values in pairs
        )

    def _cross(self, parents: Sequence[Genes]) -> Genes:
        one, other = self.draw.choice(parents), self.draw.choice(parents)
        return tuple(self.draw.choice(pair) for pair in zip(one, other, strict=True))
