from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from dit_qat.calibration import BlockView, LinearStatistics, Method, Needs
from dit_qat.calibration.trees import save_tree
from dit_qat.layers import IntLinear
from dit_qat.layers.rounding import GPTQSettings, nearest_layer, round_gptq
from dit_qat.llm.quantize import llm_target, quantize_llm, record_windows
from dit_qat.primitives.integer import IntegerGrid

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LAYERS = 2 * 7


def _llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, **changes)
    return LlamaForCausalLM(config).eval()


def _windows(count: int = 6, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(64, (count, length), generator=torch.Generator().manual_seed(seed))


class Nearest(Method):
    name = "nearest"

    def __init__(self, bits: int = 4) -> None:
        self.config = bits

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> nn.Module:
        return nearest_layer(linear, IntegerGrid(self.config), None)


class Solved(Nearest):
    """GPTQ, which needs second moments."""

    name = "solved"

    @property
    def needs(self) -> Needs:
        return Needs(second_moment=True, ranges=False, probe_calls=100)

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> nn.Module:
        grid = IntegerGrid(self.config)
        rounded = round_gptq(linear.weight, statistics.second_moment, grid, GPTQSettings())
        scales, codes = rounded.scales, rounded.codes
        return IntLinear.build(linear, grid=grid, scales=scales, codes=codes, activation=None)


def _error(model: nn.Module, windows: Tensor) -> float:
    with torch.no_grad():
        exact, found = (m(input_ids=windows).logits for m in (_llama(), model))
    return float((found - exact).square().sum() / exact.square().sum())


def test_all_linears_of_the_blocks_are_quantized_and_nothing_else() -> None:
    model = _llama()
    head, windows = model.lm_head, _windows()
    result = quantize_llm(model, Nearest(), windows, batch_size=4)
    assert result.model is model
    assert len(result.table) == LAYERS
    assert {row.tokens for row in result.table} == {windows.numel()}
    assert {row.activation_bits for row in result.table} == {16.0}
    assert result.averages["weight_bits"] == 4 < result.averages["effective_weight_bits"]
    assert model.lm_head is head
    assert sum(isinstance(module, IntLinear) for module in model.modules()) == LAYERS


def test_more_bits_and_second_moments_lower_the_error() -> None:
    windows, errors = _windows(24), {}
    for method in (Nearest(2), Solved(2), Nearest(4), Nearest(8)):
        model = _llama()
        quantize_llm(model, method, windows)
        errors[method.name, method.config] = _error(model, windows)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors["nearest", 8] < 1e-3


@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_batches_and_a_folder_change_nothing_but_rounding(tmp_path: Path, batch_size: int) -> None:
    tables = []
    for size, folder in ((1, None), (batch_size, tmp_path)):
        result = quantize_llm(_llama(), Solved(4), _windows(), batch_size=size, calls_folder=folder)
        tables.append([row.error for row in result.table])
    assert tables[0] == pytest.approx(tables[1], rel=0.01)


def test_grouped_positions_and_plain_mlps_are_driven_too() -> None:
    torch.manual_seed(0)
    config = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)
    result = quantize_llm(OPTForCausalLM(config).eval(), Solved(4), _windows(), batch_size=3)
    assert len(result.table) == 2 * 6


class _Killed(BaseException):
    """What no code catches by the way."""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    class Fragile(Solved):
        fatal = 1

        def quantize_block(self, view: BlockView) -> Mapping[str, nn.Module]:
            if view.index == self.fatal:
                raise _Killed
            return super().quantize_block(view)

    with pytest.raises(_Killed):
        quantize_llm(_llama(), Fragile(3), _windows(), state_folder=tmp_path)
    again = Fragile(3)
    again.fatal = 0  # the first block is not asked for again
    resumed = quantize_llm(_llama(), again, _windows(), state_folder=tmp_path)
    straight = quantize_llm(_llama(), Solved(3), _windows())
    assert resumed.table == straight.table
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    tensors = [name for name, value in theirs.items() if isinstance(value, Tensor)]
    assert all(torch.equal(ours[name], theirs[name]) for name in tensors)
    with pytest.raises(ValueError, match="another run"):
        quantize_llm(_llama(), Fragile(3), _windows(seed=1), state_folder=tmp_path)


def _broken(model: LlamaForCausalLM) -> LlamaForCausalLM:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "windows", "options", "match"),
    [
        (_llama, _windows(length=65), {}, "at most 64"),
        (_llama, _windows() + 64, {}, "embeds 0 to 63"),
        (_llama, _windows(), {"batch_size": 0}, "batch_size=0"),
        (_llama, _windows(), {"limit_bytes": 1000}, "above the limit of 1 kB"),
        (lambda: _broken(_llama()), _windows(), {}, r"layers\.1\.mlp\.up_proj\.weight holds NaN"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    model: Callable[[], nn.Module], windows: Tensor, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        quantize_llm(model(), Nearest(), windows, **options)


def test_shared_weights_are_refused() -> None:
    model = _llama()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="up_proj"):
        quantize_llm(model, Nearest(), _windows())


def test_what_is_quantized_already_is_refused() -> None:
    model = _llama()
    quantize_llm(model, Nearest(), _windows())
    with pytest.raises(ValueError, match="quantized already; give the float model"):
        quantize_llm(model, Nearest(), _windows())


def test_a_full_disk_loses_no_finished_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tree: Any) -> None:
        if path.name.startswith("block_0001"):
            raise OSError(f"could not write {path} (no space left)")
        save_tree(path, tree)

    with monkeypatch.context() as patch:
        patch.setattr("dit_qat.calibration.state.save_tree", full)
        with pytest.raises(OSError, match=r"block_0001.*no space left"):
            quantize_llm(_llama(), Solved(3), _windows(), state_folder=tmp_path)
    before = (tmp_path / "block_0000.safetensors").stat().st_mtime_ns
    resumed = quantize_llm(_llama(), Solved(3), _windows(), state_folder=tmp_path)
    assert (tmp_path / "block_0000.safetensors").stat().st_mtime_ns == before
    assert resumed.table == quantize_llm(_llama(), Solved(3), _windows()).table


def test_dead_channels_are_no_trouble() -> None:
    """Inputs that are zero on all tokens, and outputs and columns without a weight."""
    model: Any = _llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 0
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[5] = 0
            layer.mlp.gate_proj.weight[:, 7] = 0
            layer.self_attn.o_proj.weight.zero_()
    with torch.no_grad():
        exact = model(input_ids=_windows()).logits
    result = quantize_llm(model, Solved(8), _windows())
    assert all(row.error < 1e-2 for row in result.table)
    with torch.no_grad():
        found = model(input_ids=_windows()).logits
    assert float((found - exact).square().sum() / exact.square().sum()) < 1e-3


def test_windows_are_recorded_without_running_a_model() -> None:
    store = record_windows(_windows(5), batch_size=2)
    assert [call.rows for call in store] == [2, 2, 1]
    joined = torch.cat([call.kwargs["input_ids"] for call in store])
    assert torch.equal(joined, _windows(5))


def test_the_target_names_every_linear_of_a_block() -> None:
    target = llm_target(_llama())
    assert len(target.linears()) == LAYERS
    assert target.timestep_argument is None
