import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dit_qat.cli.llm import methods
from dit_qat.cli.main import VERBS, main
from dit_qat.layers import CodedLinear, IntLinear

LETTERS = string.ascii_letters + string.digits + " ."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand weights that reads letters."""
    folder = tmp_path_factory.mktemp("llm") / "float"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    order = torch.randint(len(LETTERS), (2000,), generator=torch.Generator().manual_seed(0))
    path.write_text("".join(LETTERS[i] for i in order))
    return path


@pytest.fixture
def quantize(model: Path, text: Path, tmp_path: Path) -> Callable[..., int]:
    """Run the verb; returns the exit code."""

    def run(*options: object, out: Path = tmp_path / "packed") -> int:
        given = ["--model", model, "--calibration", text, "--windows", 12, "--device", "cpu"]
        return main(["llm", "quantize", "--out", str(out), *map(str, (*given, *options))])

    return run


def test_a_model_is_quantized_judged_sampled_and_written_plainly(
    quantize: Callable[..., int], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert quantize("--method", "rtn", "--settings", '{"bits": 3}') == 0
    shown = capsys.readouterr().out
    assert "effective bits per weight" in shown
    assert "model.layers.0.mlp.up_proj" in shown
    metrics = json.loads((packed / "metrics.json").read_text())
    assert metrics["method"] == "rtn"
    assert len(metrics["layers"]) == 14
    assert metrics["average_bits"]["effective_weight_bits"] > 3
    assert not list(tmp_path.glob(".*"))
    found = AutoModelForCausalLM.from_pretrained(packed)
    assert isinstance(found.model.layers[0].mlp.up_proj, CodedLinear | IntLinear)

    judge = ["llm", "evaluate", "--model", str(packed), "--text", str(text), "--window", "16"]
    assert main([*judge, "--windows", "4", "--out", str(tmp_path / "score")]) == 0
    score = json.loads((tmp_path / "score/metrics.json").read_text())
    assert score["windows"] == 4
    assert f"perplexity {score['perplexity']:.4f}" in capsys.readouterr().out

    draw = ["llm", "generate", "--model", str(packed), "--prompt", "abc", "--tokens", "4"]
    assert main(draw) == 0
    assert capsys.readouterr().out.startswith("a")

    plain = tmp_path / "plain"
    options = ["--model", str(packed), "--out", str(plain), "--dtype", "float32"]
    assert main(["llm", "export", *options]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(plain)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        pair = [m(input_ids=ids).logits for m in (loaded, found)]
    torch.testing.assert_close(*pair)


def test_bits_of_a_packed_language_model_are_told(
    quantize: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize("--method", "rtn") == 0
    capsys.readouterr()
    assert main(["inspect", "--weights", str(tmp_path / "packed")]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_an_interrupted_run_leaves_its_blocks_and_goes_on(
    quantize: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dit_qat.cli.llm.save_quantized", killed)
        assert quantize("--method", "rtn") == 130
    state = tmp_path / ".packed.state"
    assert len(list(state.glob("block_*"))) == 2
    assert quantize("--method", "rtn") == 0
    assert not state.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "arbb"), "'arbb' is unknown; there are"),
        (("--method", "rtn", "--settings", '{"bitz": 3}'), "--settings of rtn"),
        (("--method", "rtn", "--length", 64), "at most 32"),
        (("--method", "rtn", "--windows", 4000), "give more text"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    quantize: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    message: str,
) -> None:
    assert quantize(*options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_float_model_is_not_dequantized(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["llm", "export", "--model", str(model), "--out", str(tmp_path / "x")]) == 2
    assert "is not packed" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_verbs_of_language_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llm"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in VERBS["llm"].inner)
    assert main(["llm", "quantise"]) == 2
    assert "near names: quantize" in capsys.readouterr().err
    assert main(["llm", "evaluate", "--help"]) == 0
    assert "--window" in capsys.readouterr().out


def test_every_method_has_its_name() -> None:
    found = methods()
    assert {"rtn", "gptq"} <= found.keys()
    assert all(kind.name == name for name, kind in found.items())
