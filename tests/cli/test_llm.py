import json
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dit_qat.cli.llm_methods import method_of, methods
from dit_qat.cli.main import VERBS, main
from dit_qat.layers import CodedLinear, IntLinear
from dit_qat.layers.rounding import ClipSearch

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
    drawn = {}
    for decoded in ("true", "false"):
        assert main([*draw, "--decoded", decoded]) == 0
        drawn[decoded] = capsys.readouterr()
        assert drawn[decoded].out.startswith("a")
    assert drawn["true"].out == drawn["false"].out
    assert "weights are decoded once (" in drawn["true"].err
    assert "weights are decoded at every call (" in drawn["false"].err

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
    assert quantize("--method", "arb", "--settings", '{"block_size": 32, "iterations": 1}') == 0
    capsys.readouterr()
    told = tmp_path / "told.json"
    assert main(["inspect", "--weights", str(tmp_path / "packed"), "--out", str(told)]) == 0
    shown, found = capsys.readouterr().out, json.loads(told.read_text())
    assert "adaLN" not in shown
    metrics = json.loads((tmp_path / "packed/metrics.json").read_text())
    layers = {layer["name"]: layer for layer in found["layers"]}
    stored = load_file(tmp_path / "packed/model.safetensors")
    for row in metrics["layers"]:
        layer, parts = layers[row["name"]], [t for n, t in stored.items() if row["name"] in n]
        bits = (
            8 * sum(tensor.nbytes for tensor in parts) / (row["in_features"] * row["out_features"])
        )
        assert layer["effective_weight_bits"] == pytest.approx(bits)
        assert layer["effective_weight_bits"] == pytest.approx(row["effective_weight_bits"])
        assert layer["weight_bits"] == row["weight_bits"] < 1.6 < 2.5 < bits
        line = next(line for line in shown.splitlines() if line.startswith(row["name"]))
        assert f"{row['weight_bits']:.2f}" in line
    mean = metrics["average_bits"]["effective_weight_bits"]
    assert found["effective_weight_bits"] == pytest.approx(mean)
    assert found["measured"]["effective_weight_bits_disk"] == pytest.approx(mean)


def test_an_interrupted_run_leaves_its_blocks_and_goes_on(
    quantize: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dit_qat.cli.llm.save_quantized", killed)
        assert quantize("--method", "rtn", "--residency", "block") == 130
    state = tmp_path / ".packed.state"
    assert len(list(state.glob("block_*"))) == 2
    assert quantize("--method", "rtn", "--settings", '{"bits": 4}', "--residency", "block") == 2
    assert "blocks of another run" in capsys.readouterr().err
    assert quantize("--method", "rtn", "--residency", "block") == 0
    assert not state.exists()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(found.model.layers[1].mlp.up_proj, CodedLinear | IntLinear)


def test_places_that_cannot_be_written_are_refused_before_the_model_is_read(
    quantize: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("keep")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert quantize("--method", "rtn", "--state", tmp_path / "mine") == 2
    assert "holds other files, such as notes.txt" in capsys.readouterr().err
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 19)
    monkeypatch.setattr("dit_qat.cli.llm.load_llm_to_quantize", None)  # nothing calls it
    assert quantize("--method", "rtn", out=tmp_path / "file/packed") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert quantize("--method", "rtn", "--state", tmp_path / "file/state") == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert quantize("--method", "rtn") == 2
    assert "MB free" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["file", "mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "arbb"), "'arbb' is unknown; there are"),
        (("--method", "rtn", "--settings", '{"bitz": 3}'), "--settings of rtn"),
        (("--method", "rtn", "--length", 64), "at most 32"),
        (("--method", "rtn", "--memory_gb", 0), "--memory_gb 0 is no room"),
        (("--method", "rtn", "--memory_gb", 1e-9), "above the limit"),
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


def test_a_packed_model_is_not_quantized_again(
    quantize: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize("--method", "rtn") == 0
    again = ("--method", "rtn", "--model", tmp_path / "packed")
    for residency in ("all", "block"):
        assert quantize(*again, "--residency", residency, out=tmp_path / "again") == 2
        assert "is quantized already" in capsys.readouterr().err


def test_nothing_is_measured_that_could_not_be_kept(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("keep")
    monkeypatch.setattr("dit_qat.cli.llm.load_llm", None)  # nothing calls it
    judge = ["llm", "evaluate", "--model", str(model)]
    assert main([*judge, "--out", str(tmp_path / "file/score")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([*judge, "--tasks", "piqa"]) == 2
    assert "lm_eval is needed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ("", 4, "--prompt has no tokens"),
        ("abcd", 29, "4 tokens and 29 more are beyond the 32"),
        ("abcd", 0, "use at least 1 token"),
    ],
)
def test_texts_that_cannot_be_continued(
    model: Path, capsys: pytest.CaptureFixture[str], prompt: str, tokens: int, message: str
) -> None:
    draw = ["llm", "generate", "--model", str(model), "--prompt", prompt, "--tokens", str(tokens)]
    assert main(draw) == 2
    assert message in capsys.readouterr().err


def test_a_float_model_is_not_dequantized(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["llm", "export", "--model", str(model), "--out", str(tmp_path / "x")]) == 2
    assert "is not packed" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_is_exported_replaces_nothing_of_worth(
    quantize: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert quantize("--method", "rtn") == 0
    before = (packed / "config.json").read_bytes()
    plain = ["llm", "export", "--model", str(packed), "--out"]
    for out, told in ((packed, "packed model's own"), (tmp_path, "no export wrote it")):
        assert main([*plain, str(out), "--overwrite"]) == 2
        assert told in capsys.readouterr().err
    assert (packed / "config.json").read_bytes() == before


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    ternary = '{"bits": 2, "symmetric": true, "group_size": 256}'
    for name, settings in (("ternary", ternary), ("planes", '{"bits": 1}')):
        given = ["--method", "rtn", "--settings", settings, "--windows", "1", "--device", "cpu"]
        assert main(["llm", "quantize", "--out", str(tmp_path / name), *given]) == 0
    file = tmp_path / "small.gguf"
    plain = ["llm", "export", "--format", "gguf", "--out", str(file), "--model"]
    assert main([*plain, str(tmp_path / "ternary")]) == 0
    assert "layers: 28 TQ2_0, 2.062 bits per weight" in capsys.readouterr().out
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert (kinds["blk.3.attn_q.weight"], kinds["output.weight"]) == ("TQ2_0", "F16")
    assert main([*plain, str(tmp_path / "planes")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*plain, str(tmp_path / "planes"), "--overwrite"]) == 0
    assert "28 Q4_0, 4.500 bits" in capsys.readouterr().out


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


def test_settings_may_hold_parts_and_are_checked() -> None:
    config = method_of("gptq", {"bits": 3, "clip": {"values": 5}}).config
    assert config.clip == ClipSearch(values=5)
    for wrong, told in (({"bits": "three"}, "Expected a <class 'int'>"), ({"bitz": 3}, "bitz")):
        with pytest.raises(ValueError, match=f"--settings of gptq.*{told}"):
            method_of("gptq", wrong)


def test_a_plain_folder_has_no_place_for_corrections(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    given = ["--model", str(model), "--calibration", str(text), "--windows", "4", "--device", "cpu"]
    settings = '{"preset": "exact", "group_size": 16}'
    given += ["--method", "d2quant", "--settings", settings, "--out", str(packed)]
    assert main(["llm", "quantize", *given]) == 0
    capsys.readouterr()
    assert main(["llm", "export", "--model", str(packed), "--out", str(plain)]) == 2
    assert "has no place in a plain LlamaForCausalLM" in capsys.readouterr().err
    assert not plain.exists()
