"""Models quantized with one block in memory, against runs with everything in memory."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView, Method, RunResult
from dit_qat.calibration.footprint import Footprint
from dit_qat.llm.hf.folder import save_quantized
from dit_qat.llm.methods import AWQ, GPTAQ, PBS2P, PT2, RTN, STBLLM, D2Quant
from dit_qat.llm.models import load_llm_to_quantize, loading
from dit_qat.llm.models.files import StoredTensors
from dit_qat.llm.models.residency import _Slot
from dit_qat.llm.quantize import quantize_llm

Save = Callable[..., Path]
WINDOWS = torch.randint(60, (4, 24), generator=torch.Generator().manual_seed(0))

METHODS: Mapping[str, Callable[[], Method]] = {
    "awq": lambda: AWQ(bits=4, group_size=16),
    "gptaq": lambda: GPTAQ(bits=4, group_size=16),
    "pbs2p": lambda: PBS2P(block_size=32, iterations=1, search_kept=False),
    "pt2": lambda: PT2(group_size=16),
    "d2quant": lambda: D2Quant(preset="exact", group_size=16),
}


def quantized(folder: Path, residency: Any, method: Method, **options: Any) -> RunResult:
    """A run, and its model written beside the float one."""
    dtype = options.pop("dtype", torch.float32)
    model, tokenizer = load_llm_to_quantize(folder, "cpu", dtype, residency)
    result = quantize_llm(model, method, WINDOWS, **options)
    out = folder.with_name(f"{folder.name}.{residency}")
    save_quantized(result.model, out, WINDOWS[:1], tokenizer=tokenizer, overwrite=True)
    return result


def written(folder: Path, residency: str) -> dict[str, bytes]:
    place = folder.with_name(f"{folder.name}.{residency}")
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of parameters that were read and are alive, now and at most."""
    counted = [0, 0]

    def gone(size: int) -> None:
        counted[0] -= size

    inner, seen = _Slot.fill, set[int]()

    def fill(slot: _Slot, parameter: nn.Parameter) -> None:
        inner(slot, parameter)
        if id(parameter) not in seen:
            seen.add(id(parameter))
            counted[0] += parameter.nbytes
            counted[1] = max(counted)
            weakref.finalize(parameter, seen.discard, id(parameter))
            weakref.finalize(parameter, gone, parameter.nbytes)

    monkeypatch.setattr(_Slot, "fill", fill)
    return counted


@pytest.mark.parametrize("name", METHODS)
def test_the_same_files_with_one_block_in_memory(
    save_model: Save, live: list[int], name: str
) -> None:
    folder = save_model(num_hidden_layers=3)
    whole = quantized(folder, "all", METHODS[name]())
    layers = list(load_llm_to_quantize(folder).model.get_submodule("model.layers"))  # type: ignore[call-overload]
    block = sum(parameter.nbytes for parameter in layers[0].parameters())
    inside = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    vectors = sum(p.nbytes for layer in layers for p in layer.parameters() if p.ndim == 1)
    outside = (
        sum(
            4 * tensor.numel()
            for tensor in load_llm_to_quantize(folder).model.state_dict().values()
        )
        - inside
    )
    assert live == [0, 0]
    found = quantized(folder, "block", METHODS[name]())
    assert live[1] <= outside + vectors + block < outside + inside / 2
    assert found.table == whole.table
    assert written(folder, "block") == written(folder, "all")


def test_a_model_of_16_bits_and_one_that_is_tied(save_model: Save) -> None:
    folder = save_model("Qwen2", tie_word_embeddings=True, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        for residency in ("all", "block"):
            quantized(folder, residency, RTN(bits=4, group_size=16), dtype=dtype)
        assert written(folder, "block") == written(folder, "all")


class _Killed(BaseException):
    """What no code catches by the way."""


def test_a_killed_run_goes_on_and_reads_no_quantized_block_again(
    save_model: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fatal, read = save_model(), 2, list[str]()

    class Fragile(RTN):
        def quantize_block(self, view: BlockView) -> Mapping[str, nn.Module]:
            if view.index == fatal:
                raise _Killed
            if not read:
                monkeypatch.setattr(StoredTensors, "read", watched)
            return super().quantize_block(view)

    inner = StoredTensors.read

    def watched(stored: StoredTensors, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        read.extend(names)
        return inner(stored, names)

    state = tmp_path / "state"
    with pytest.raises(_Killed):
        quantized(folder, "block", Fragile(bits=4, group_size=16), state_folder=state)
    assert len(list(state.glob("block_*"))) == 2
    monkeypatch.setattr(StoredTensors, "read", inner)
    fatal = -1
    read.clear()
    quantized(folder, "block", Fragile(bits=4, group_size=16), state_folder=state)
    assert read
    assert not [name for name in read if "layers.0." in name or "layers.1." in name]
    quantized(folder, "all", Fragile(bits=4, group_size=16))
    assert written(folder, "block") == written(folder, "all")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: D2Quant(preset="paper", group_size=16), "rotation needs all weights in memory"),
        (lambda: STBLLM(strength=2.0), "not in memory"),
    ],
)
def test_what_needs_all_weights_is_refused_before_the_work(
    save_model: Save, method: Callable[[], Method], message: str
) -> None:
    held = load_llm_to_quantize(save_model(), residency="block")
    with pytest.raises(ValueError, match=message):
        quantize_llm(held.model, method(), WINDOWS)


def test_a_change_of_what_is_not_in_memory_is_no_silent_loss(save_model: Save) -> None:
    class Doubling(RTN):
        def start(self, run: Any) -> None:
            with torch.no_grad():
                run.model.model.layers[2].mlp.up_proj.weight.mul_(2)

    held = load_llm_to_quantize(save_model(), residency="block")
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight was changed while it"):
        quantize_llm(held.model, Doubling(bits=4, group_size=16), WINDOWS)


def test_a_damaged_weight_is_named_before_the_work(save_model: Save) -> None:
    folder = save_model(dtype=torch.float32)
    model: Any = load_llm_to_quantize(folder).model
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    held = load_llm_to_quantize(folder, residency="block")
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up_proj\.weight holds NaN"):
        quantize_llm(held.model, RTN(bits=4, group_size=16), WINDOWS)


def test_the_stated_peak_is_one_and_smaller(save_model: Save) -> None:
    folder, stated, counted = save_model(), {}, 0
    for residency in ("all", "block"):
        model = load_llm_to_quantize(folder, residency=residency).model  # type: ignore[arg-type]
        own = [p for p in model.parameters() if not p.is_meta]
        with Footprint([*own, *model.buffers()]) as footprint:
            result = quantize_llm(model, RTN(bits=4, group_size=16), WINDOWS)
        stated[residency] = result.plan
        if residency == "block":
            counted = footprint.peak + sum(p.nbytes for p in own)
    assert stated["block"].weights < stated["all"].weights / 2
    assert counted <= stated["block"].total
    assert {**vars(stated["all"]), "weights": 0} == {**vars(stated["block"]), "weights": 0}


@pytest.mark.parametrize(
    ("free", "limit", "whole"),
    [(None, None, True), (10**9, None, True), (100, None, False), (10**9, 100, False)],
)
def test_auto_goes_by_what_is_free(
    save_model: Save,
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    limit: int | None,
    whole: bool,
) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda device: free)
    model = load_llm_to_quantize(save_model(), limit_bytes=limit).model
    assert any(parameter.is_meta for parameter in model.parameters()) != whole


def test_an_unknown_residency_is_refused(save_model: Save) -> None:
    with pytest.raises(ValueError, match="residency='half' is unknown"):
        load_llm_to_quantize(save_model(), residency="half")  # type: ignore[arg-type]
