"""Files against the models that they were written from, by names and orders spelled out here."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_qat.llm.gguf import Options, write_gguf
from dit_qat.llm.gguf import writer as writer_module
from dit_qat.llm.methods.pt2 import PT2
from dit_qat.llm.methods.rtn import RTN

gguf = pytest.importorskip("gguf")

Quantized = Callable[..., Any]

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def original(name: str) -> tuple[str, str]:
    """Module and leaf of a tensor."""
    stem, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None:
        return OUTSIDE[stem], leaf
    return f"model.layers.{match[1]}.{PARTS[match[2]]}", leaf


def unpaired(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k as transformers has them: the two halves of a head one behind the other."""
    pairs = rows.unflatten(0, (heads, -1, 2))
    return torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).flatten(0, 1)


def read(path: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.tensor(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(path).tensors
    }


def field(path: Path, name: str) -> Any:
    return gguf.GGUFReader(path).fields[name].contents()


def expected(module: Any, leaf: str) -> Tensor:
    quantized = leaf == "weight" and hasattr(module, "to_float")
    return getattr(module.to_float() if quantized else module, leaf).detach()


@pytest.mark.parametrize(
    ("kind", "settings", "paired"),
    [
        ("Llama", {}, True),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 128}, True),
        ("Mistral", {"tie_word_embeddings": True}, True),
        ("Qwen2", {}, False),
        ("Qwen3", {"tie_word_embeddings": True, "head_dim": 128}, False),
    ],
)
def test_every_number_is_the_models_bit_for_bit(
    quantized: Quantized, tokenizer: Any, tmp_path: Path, kind: str, settings: Any, paired: bool
) -> None:
    model = quantized(kind, **settings)
    saved = write_gguf(model, tokenizer, tmp_path / "m.gguf", Options(dtype="float32"))
    assert saved.types == {"TQ2_0": 14}
    assert saved.bits == 2.0625
    assert saved.bytes == (tmp_path / "m.gguf").stat().st_size
    found = read(saved.path)
    names = {name for name in model.state_dict() if not name.endswith("_extra_state")}
    tied = model.config.tie_word_embeddings
    assert ("output.weight" in found) == (not tied)
    seen = set()
    for name, tensor in found.items():
        module, leaf = original(name)
        seen.add(module)
        heads = 4 if ".attn_q." in name else 2 if ".attn_k." in name else 0
        back = unpaired(tensor, heads) if heads and paired else tensor
        assert torch.equal(back, expected(model.get_submodule(module), leaf)), name
    assert seen == {name.rpartition(".")[0] for name in names} - ({"lm_head"} if tied else set())


def test_sizes(quantized: Quantized, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(quantized("Mistral", head_dim=32, sliding_window=16), tokenizer, path, name="small")
    sizes = {
        "block_count": 2,
        "context_length": 16,
        "embedding_length": 256,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "vocab_size": 260,
    }
    assert {key: field(path, f"llama.{key}") for key in sizes} == sizes
    assert field(path, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert field(path, "general.architecture") == "llama"
    assert field(path, "general.name") == "small"
    assert field(path, "general.file_type") == gguf.LlamaFileType.MOSTLY_TQ2_0


def test_rotary_positions(quantized: Quantized, tokenizer: Any, tmp_path: Path) -> None:
    """A reader divides the plain frequencies by the factors."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = quantized("Llama", rope_parameters=rope)
    write_gguf(model, tokenizer, tmp_path / "3.gguf")
    factors = read(tmp_path / "3.gguf")["rope_freqs.weight"]
    plain = 500.0 ** -(torch.arange(0, 64, 2) / 64)
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    linear = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    write_gguf(quantized("Qwen2", rope_parameters=linear), tokenizer, tmp_path / "l.gguf")
    assert field(tmp_path / "l.gguf", "qwen2.rope.scaling.type") == "linear"
    assert field(tmp_path / "l.gguf", "qwen2.rope.scaling.factor") == 4.0
    with pytest.raises(ValueError, match=r"rotary positions .*llama3.* of qwen2; there are def"):
        write_gguf(quantized("Qwen2", rope_parameters=rope), tokenizer, tmp_path / "x.gguf")


def test_other_floats(quantized: Quantized, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized()
    write_gguf(model, tokenizer, tmp_path / "b.gguf", Options("bfloat16", ternary="tq1_0"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] == "TQ1_0"
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 1e6
    with pytest.raises(ValueError, match=r"token_embd.weight holds numbers beyond F16.*--dtype"):
        write_gguf(model, tokenizer, tmp_path / "h.gguf")
    assert not (tmp_path / "h.gguf").exists()


def test_codes_that_gguf_does_not_hold(
    quantized: Quantized, tokenizer: Any, tmp_path: Path
) -> None:
    model = quantized(method=PT2())
    with pytest.raises(ValueError, match=r"14 of 14 .*q_proj: its ternary code is asymm"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    saved = write_gguf(model, tokenizer, tmp_path / "m.gguf", Options("float32", dequantize=True))
    assert saved.types == {"F32": 14}
    decoded = model.model.layers[1].mlp.up_proj.to_float().weight
    assert torch.equal(read(saved.path)["blk.1.ffn_up.weight"], decoded)


def test_what_no_reader_computes(quantized: Quantized, tokenizer: Any, tmp_path: Path) -> None:
    opt = {"ffn_dim": 256, "word_embed_proj_dim": 256}
    with pytest.raises(ValueError, match="GGUF of 'opt' models is not written"):
        write_gguf(quantized("OPT", **opt), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        write_gguf(quantized(hidden_act="gelu"), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"q_proj has a bias, .* in qwen3 models"):
        write_gguf(quantized("Qwen3", attention_bias=True), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_reads_back_otherwise_is_not_left(
    quantized: Quantized, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "m.gguf", quantized(method=RTN(bits=4))
    path.write_text("old")
    plan = writer_module.plan_tensors

    def damaged(*arguments: Any) -> Any:
        stored = plan(*arguments)
        first = stored[-1]
        bent = lambda: first.packed().bitwise_xor_(1)  # noqa: E731
        stored[-1] = type(first)(**{**vars(first), "packed": bent})
        return stored

    monkeypatch.setattr(writer_module, "plan_tensors", damaged)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down.weight reads back from Q5_0 with"):
        write_gguf(model, tokenizer, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
