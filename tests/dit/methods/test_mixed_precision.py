import itertools

import pytest

from dit_qat.dit.methods.mixed_precision import group_budgets, layer_groups, raise_most_sensitive


def test_layers_are_grouped_by_what_they_move() -> None:
    names = [
        "blocks.0.attn.qkv",
        "blocks.0.mlp.fc1",
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn2.to_q",
        "transformer_blocks.0.ff.net.2",
        "temporal_transformer_blocks.0.attn1.to_q",
        "layers.0.attention.to_q",
    ]
    assert layer_groups(names) == {
        "self-attention": [names[0], names[2], names[6]],
        "feed-forward": [names[1], names[4]],
        "cross-attention": [names[3]],
        "temporal attention": [names[5]],
    }


ERRORS = {"a": {2: 8.0, 4: 2.0, 8: 0.1}, "b": {2: 20.0, 4: 1.0, 8: 0.9}}


def test_budgets_are_met_and_best_among_all_splits_along_the_lines() -> None:
    sizes = {"a": 100, "b": 300}

    def line(group: str, bits: float) -> float:
        by_bits = ERRORS[group]
        low, high = (2, 4) if bits <= 4 else (4, 8)
        return by_bits[low] + (by_bits[high] - by_bits[low]) * (bits - low) / (high - low)

    for average in (2.0, 2.7, 3.5, 4.0, 5.5, 8.0):
        found = group_budgets(ERRORS, sizes, average)
        spent = sum(sizes[g] * bits for g, bits in found.items())
        assert spent <= average * 400 + 1e-6
        mine = sum(line(g, bits) for g, bits in found.items())
        for step in range(601):
            bits_b = 2 + step / 100
            bits_a = (average * 400 - bits_b * 300) / 100
            if 2 <= bits_a <= 8:
                assert mine <= line("a", bits_a) + line("b", bits_b) + 1e-9


def test_bits_that_buy_nothing_are_not_bought() -> None:
    found = group_budgets({"a": {4: 1.0, 8: 1.0}, "b": {4: 2.0, 8: 1.0}}, {"a": 1, "b": 1}, 8)
    assert found == {"a": 4, "b": 8}


def test_a_choice_above_the_hull_is_passed_over() -> None:
    # Four bits are hardly better than two here, eight are: layers go to eight one by one.
    found = group_budgets({"a": {2: 10.0, 4: 9.5, 8: 0.0}}, {"a": 10}, 5)
    assert found == {"a": 5}


@pytest.mark.parametrize("budget", [2.0, 3.0, 4.0, 4.5, 6.0, 8.0])
def test_the_most_sensitive_are_raised_first_within_budget(budget: float) -> None:
    ranking = ["w", "x", "y", "z"]
    sizes = dict.fromkeys(ranking, 10)
    bits = raise_most_sensitive(ranking, sizes, (2, 4, 8), budget)
    assert sum(bits.values()) / 4 <= budget
    assert all(bits[a] >= bits[b] for a, b in itertools.pairwise(ranking))


def test_a_layer_too_large_for_what_is_left_is_passed_over() -> None:
    bits = raise_most_sensitive(["big", "small"], {"big": 100, "small": 10}, (4, 8), 4.5)
    assert bits == {"big": 4, "small": 8}
