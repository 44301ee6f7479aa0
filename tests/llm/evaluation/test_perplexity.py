"""Perplexity against closed forms and the library's own loss."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.llm.evaluation import perplexity, window_losses

transformers = pytest.importorskip("transformers")


class Fixed(nn.Module):
    """Predicts by a table (vocabulary, vocabulary) of logits, whatever came before."""

    def __init__(self, logits: Tensor, limit: int = 64) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.config = SimpleNamespace(max_position_embeddings=limit)

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(*self.table.shape)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert not self.training
        return SimpleNamespace(logits=self.table[input_ids])


def test_knowing_nothing_is_the_size_of_the_vocabulary() -> None:
    windows = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(0))
    assert perplexity(Fixed(torch.zeros(50, 50)), windows) == pytest.approx(50)


def test_knowing_all_is_one() -> None:
    successor = 100 * torch.eye(20).roll(1, dims=1)
    assert perplexity(Fixed(successor), torch.arange(20).view(2, 10)) == pytest.approx(1)


def test_the_first_token_is_context_and_not_predicted() -> None:
    """The frequencies of a Markov chain are its entropy, whatever it starts from."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    found = window_losses(Fixed(logits), torch.tensor([[0, 1, 0], [1, 1, 1], [0, 0, 0]]))
    expected = [(math.log(4 / 3) + math.log(2)) / 2, math.log(2), math.log(4)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("batch", [None, 1, 2, 5])
def test_a_language_model_has_its_own_loss(batch: int | None) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    windows = torch.randint(40, (5, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows]
    torch.testing.assert_close(
        window_losses(model, windows, batch), torch.tensor(mean, dtype=torch.float64)
    )
    assert perplexity(model, windows, batch) == pytest.approx(math.exp(sum(mean) / 5))
    assert model.training


def test_beyond_all_floats_it_is_infinite() -> None:
    wrong = 1e4 * torch.eye(20)
    assert perplexity(Fixed(wrong), torch.arange(20).view(2, 10)) == math.inf


def test_outputs_that_are_not_finite_are_refused() -> None:
    table = torch.zeros(8, 8)
    table[5, 0] = math.nan
    windows = torch.tensor([[0, 1, 2], [3, 4, 6], [4, 5, 6]])
    for batch in (None, 2):
        with pytest.raises(ValueError, match="outputs on window 2 are not finite"):
            perplexity(Fixed(table), windows, batch)


def test_windows_that_do_not_fit_are_refused() -> None:
    model = Fixed(torch.zeros(8, 8), limit=4)
    with pytest.raises(ValueError, match="5 tokens are longer than Fixed allows"):
        perplexity(model, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="embeds 0 to 7"):
        perplexity(model, torch.full((2, 4), 8))
    with pytest.raises(ValueError, match="batch=0"):
        perplexity(model, torch.zeros(2, 4, dtype=torch.long), batch=0)
