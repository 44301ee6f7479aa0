import itertools

import pytest

from dit_qat.dit.methods.evolution import Evolution, Genes, evolve

CHOICES = [(32, 64, 128)] * 6


def cost(genes: Genes) -> float:
    return sum((i + 1) * gene for i, gene in enumerate(genes))


def legal(genes: Genes) -> bool:
    return sum(genes) / len(genes) >= 64


def test_it_finds_the_best_of_a_small_space() -> None:
    best = min(filter(legal, itertools.product(*CHOICES)), key=cost)
    found = evolve(CHOICES, (64,) * 6, cost, legal, Evolution(epochs=20), seed=0)
    assert found.fitness == cost(found.genes)
    assert found.genes == best


def test_everything_measured_is_legal_and_measured_once() -> None:
    seen: list[Genes] = []

    def fitness(genes: Genes) -> float:
        seen.append(genes)
        return cost(genes)

    found = evolve(CHOICES, (64,) * 6, fitness, legal, Evolution(), seed=1)
    assert all(map(legal, seen))
    assert len(seen) == len(set(seen)) == found.evaluated
    assert seen[0] == (64,) * 6


@pytest.mark.parametrize("seed", range(3))
def test_the_best_never_gets_worse_and_never_falls_behind_the_start(seed: int) -> None:
    found = evolve(CHOICES, (64,) * 6, cost, legal, Evolution(epochs=4, population=6), seed=seed)
    assert found.history == sorted(found.history, reverse=True)
    assert len(found.history) == 5
    assert found.fitness <= cost((64,) * 6)


def test_the_same_seed_finds_the_same() -> None:
    one, other = (evolve(CHOICES, (64,) * 6, cost, legal, Evolution(epochs=2), 3) for _ in range(2))
    assert one == other


def test_a_space_of_one_ends() -> None:
    found = evolve([(64,)] * 3, (64,) * 3, cost, legal, Evolution(), seed=0)
    assert found.genes == (64, 64, 64)
    assert found.evaluated == 1


def test_a_candidate_that_diverges_is_never_the_fittest() -> None:
    def fitness(genes: Genes) -> float:
        return float("nan") if genes == (64,) * 6 or sum(genes) % 3 else cost(genes)

    found = evolve(CHOICES, (64,) * 6, fitness, legal, Evolution(epochs=2), seed=0)
    assert found.fitness == cost(found.genes)
    assert found.history == sorted(found.history, reverse=True)
