"""Models from folders, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_qat.llm.models import (
    check_tokenizer,
    check_windows,
    files,
    load_llm,
    load_llm_by_block,
    window_length,
)

Save = Callable[..., Path]
Load = Callable[..., Any]

LOADERS = [load_llm, load_llm_by_block]


def test_a_folder_gives_its_model_and_tokenizer(save_model: Save) -> None:
    folder = save_model()
    model, tokenizer = load_llm(folder)
    assert not model.training
    assert tokenizer("w3 w5")["input_ids"] == [3, 5]
    assert next(model.parameters()).dtype == torch.float32
    assert next(load_llm(str(folder), dtype=torch.bfloat16).model.parameters()).dtype == (
        torch.bfloat16
    )


def test_the_stored_dtype(save_model: Save) -> None:
    folder = save_model(dtype=torch.float16)
    assert next(load_llm(folder, dtype=None).model.parameters()).dtype == torch.float16


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (80, r"ids up to 79 and \w+ embeds 64 \(0 to 63\)"),
        (50, r"has 50 tokens and \w+ embeds 64"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    save_model: Save, load: Load, words: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(save_model(words=words))


def test_an_embedding_may_be_padded(save_model: Save) -> None:
    model, _ = load_llm(save_model())
    check_tokenizer(model, load_llm(save_model("OPT", words=58)).tokenizer)


@pytest.mark.parametrize("load", LOADERS)
def test_folders_that_hold_no_model(tmp_path: Path, save_model: Save, load: Load) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder and no hub id"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder and no hub id"):
        load("nowhere")
    folder = save_model(shard="1GB")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="Llama"):
        load(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors.*can run code"):
        load(folder)


def test_a_missing_tokenizer_is_named(save_model: Save) -> None:
    folder = save_model()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="does not load as a causal language model"):
        load_llm(folder)


def test_missing_tensors_are_no_random_numbers(save_model: Save) -> None:
    folder = save_model(num_hidden_layers=2)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(
        ValueError, match=r"lacks 9 tensors of LlamaForCausalLM, such as model\.lay"
    ):
        load_llm(folder)


def test_a_hub_id_is_downloaded(save_model: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model()
    asked: list[Any] = []

    def download(name: str, **keywords: Any) -> str:
        asked.append((name, keywords["revision"]))
        return str(folder)

    monkeypatch.setattr(files, "snapshot_download", download)
    assert load_llm("org/model", revision="v1").model is not None
    assert asked == [("org/model", "v1")]

    def fail(name: str, **keywords: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(files, "snapshot_download", fail)
    with pytest.raises(OSError, match=r"there is no folder org/model.*no route.*HF_HUB_OFFLINE"):
        load_llm("org/model")


def test_an_absent_device_is_refused(save_model: Save) -> None:
    for load in LOADERS:
        with pytest.raises(ValueError, match="device 'cuda:99' cannot be used here"):
            load(save_model(), device="cuda:99")


def test_window_lengths(save_model: Save) -> None:
    model, _ = load_llm(save_model())
    assert window_length(model) == 32
    assert window_length(model, 16) == 16
    with pytest.raises(ValueError, match=r"33 tokens are longer .*max_position_embeddings=32"):
        window_length(model, 33)
    with pytest.raises(ValueError, match="1 tokens predict nothing"):
        window_length(model, 1)
    longer, _ = load_llm(save_model("Qwen2", max_position_embeddings=4096))
    assert window_length(longer) == 2048
    longer.config = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no max_position_embeddings"):
        window_length(longer)


def test_windows_that_do_not_fit(save_model: Save) -> None:
    model, _ = load_llm(save_model())
    check_windows(model, torch.zeros(2, 32, dtype=torch.long))
    with pytest.raises(ValueError, match=r"ids from 0 to 64, and \w+ embeds 0 to 63"):
        check_windows(model, 64 * torch.eye(32, dtype=torch.long))
    for bad in (torch.zeros(4), torch.zeros(4, dtype=torch.long), torch.zeros(0, 4).long()):
        with pytest.raises(ValueError, match="windows are token ids"):
            check_windows(model, bad)
