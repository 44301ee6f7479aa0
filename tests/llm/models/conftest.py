"""Small random language models, in folders as the hub has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


def small_config(kind: str, **overrides: Any) -> Any:
    if kind == "OPT":
        return transformers.OPTConfig(
            **SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32} | overrides
        )
    sizes = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
    return getattr(transformers, f"{kind}Config")(**sizes | overrides)


def word_tokenizer(words: int) -> Any:
    vocabulary = {f"w{index}": index for index in range(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a random model and its tokenizer; ``shard`` bytes per file."""

    def save(kind: str = "Llama", shard: str = "20KB", words: int = 60, **overrides: Any) -> Path:
        folder = tmp_path / kind
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(small_config(kind, **overrides))
            for parameter in model.parameters():  # norms of one, biases of zero would hide swaps
                if parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, 1.0, 0.3)
        model.save_pretrained(folder, max_shard_size=shard)
        word_tokenizer(words).save_pretrained(folder)
        return folder

    return save
