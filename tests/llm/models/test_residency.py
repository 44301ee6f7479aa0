"""Models of which one block is in memory, against the whole models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration.capture import record_calls
from dit_qat.calibration.driver import drive
from dit_qat.calibration.statistics import Needs
from dit_qat.calibration.view import BlockView
from dit_qat.llm.models import (
    BlockResidency,
    load_llm,
    load_llm_by_block,
    load_llm_to_quantize,
    roles_of,
)
from dit_qat.llm.models.files import StoredTensors

Save = Callable[..., Path]

KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3", "OPT"]
IDS = torch.arange(40).remainder(37).view(4, 10)


def held(residency: BlockResidency) -> list[str]:
    """Blocks of which any matrix is in memory."""
    return [name for name in residency.blocks if matrices(residency, name)]


def matrices(residency: BlockResidency, block: str) -> set[str]:
    parameters = residency.model.get_submodule(block).named_parameters()
    return {name for name, p in parameters if p.ndim > 1 and not p.is_meta}


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_equal_bit_for_bit_with_one_block_in_memory(
    save_model: Save, kind: str
) -> None:
    folder = save_model(kind)
    assert len(list(folder.glob("*.safetensors"))) > 3
    residency, _ = load_llm_by_block(folder)
    most: list[int] = []
    for name in residency.blocks:
        block = residency.model.get_submodule(name)
        block.register_forward_hook(lambda *_: most.append(len(held(residency))))
    assert held(residency) == []
    for _ in range(2):
        assert torch.equal(logits(residency.model), logits(load_llm(folder).model))
    assert most == [1] * 8
    assert held(residency) == list(residency.resident) == [residency.blocks[-1]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_and_other_dtypes(save_model: Save, tied: bool, dtype: torch.dtype) -> None:
    folder = save_model("Qwen2", tie_word_embeddings=tied)
    residency, _ = load_llm_by_block(folder, dtype=dtype)
    model: Any = residency.model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert logits(model).dtype == dtype
    assert torch.equal(logits(model), logits(load_llm(folder, dtype=dtype).model))


def test_two_blocks_in_memory(save_model: Save) -> None:
    folder = save_model()
    small, _ = load_llm_by_block(folder)
    residency = BlockResidency(
        load_llm(folder).model.to("meta"), folder, "cpu", torch.float32, limit=2
    )
    assert torch.equal(logits(residency.model), logits(small.model))
    assert held(residency) == list(residency.blocks[-2:])
    residency.load(residency.blocks[0])
    assert held(residency) == [residency.blocks[0], residency.blocks[-1]]
    residency.drop(residency.blocks[0])
    residency.drop(residency.blocks[0])
    assert held(residency) == [residency.blocks[-1]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_are_kept(save_model: Save, mode: Callable[[], Any]) -> None:
    """In place, by another parameter, by another module; and seen in any mode of autograd."""
    folder = save_model()
    residency, _ = load_llm_by_block(folder)
    whole: Any = load_llm(folder).model
    with mode():
        for model in (residency.model, whole):
            logits(model)  # so that another block than the first is in memory
            if model is residency.model:
                residency.load(residency.blocks[0])
            layer = model.model.layers[0]  # type: ignore[union-attr]
            with torch.no_grad():
                layer.input_layernorm.weight.mul_(1.5)
            layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight + 1)
            layer.mlp.down_proj = nn.Linear(48, 32)
            nn.init.constant_(layer.mlp.down_proj.weight, 0.01)
            nn.init.zeros_(layer.mlp.down_proj.bias)
        for _ in range(2):
            assert torch.equal(logits(residency.model), logits(whole))
    assert matrices(residency, residency.blocks[0]) == {
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }


def test_state_dictionaries_are_whole(save_model: Save) -> None:
    folder = save_model()
    residency, _ = load_llm_by_block(folder)
    whole: Any = load_llm(folder).model

    def same() -> None:
        mine, other = residency.model.state_dict(), whole.state_dict()
        assert list(mine) == list(other)
        assert all(torch.equal(mine[name], other[name]) for name in other)

    same()
    logits(residency.model)
    same()
    residency.load(residency.blocks[0])
    for model in (residency.model, whole):
        layer = model.model.layers[0]  # type: ignore[union-attr]
        with torch.no_grad():
            layer.self_attn.q_proj.weight.zero_()
        layer.mlp.up_proj = nn.Linear(32, 48)
        nn.init.zeros_(layer.mlp.up_proj.weight)
        nn.init.zeros_(layer.mlp.up_proj.bias)
    same()
    residency.load(residency.blocks[1])
    same()
    inner = residency.model.get_submodule(residency.blocks[0]).state_dict()
    assert not any(tensor.is_meta for tensor in inner.values())


def test_a_replaced_linear_is_not_read_again(
    save_model: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    residency, _ = load_llm_by_block(save_model())
    first, second = residency.blocks[:2]
    read: list[str] = []
    stored = residency._stored

    def watched(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        read.extend(names)
        return StoredTensors.read(stored, names)

    monkeypatch.setattr(stored, "read", watched)
    residency.load(first)
    assert f"{first}.mlp.down_proj.weight" in read
    residency.model.set_submodule(f"{first}.mlp.down_proj", nn.Identity())
    residency.load(second)
    read.clear()
    residency.load(first)
    assert f"{first}.mlp.up_proj.weight" in read
    assert f"{first}.mlp.down_proj.weight" not in read


@pytest.mark.parametrize("prefix", ["all", "previous"])
def test_the_block_driver_needs_one_block(save_model: Save, prefix: Any) -> None:
    """Quantizing behind a quantized prefix gives the same weights as on the whole model."""
    folder = save_model()
    residency, _ = load_llm_by_block(folder)
    found: dict[str, Mapping[str, Tensor]] = {}
    names = roles_of(residency.model).linears
    floats: dict[str, Any] = {name: residency.model.get_submodule(name) for name in names}
    most = 0

    def quantize(view: BlockView) -> dict[str, nn.Module]:
        nonlocal most
        here = {name.split(".")[2] for name, own in floats.items() if not own.weight.is_meta}
        most = max(most, len(here))
        replaced: dict[str, nn.Module] = {}
        for name, linear in view.linears.items():
            moment = view.statistics[name].second_moment
            assert moment is not None
            rounded = nn.Linear(linear.in_features, linear.out_features, bias=False)
            scale = moment.matrix.diagonal().mean()
            rounded.weight.data = (linear.weight.detach() * 8).round() / 8 * (1 + scale)
            replaced[name] = rounded
        return replaced

    for key, model in (("by block", residency.model), ("whole", load_llm(folder).model)):
        store = record_calls(model, lambda m=model: logits(m), timestep_argument=None)
        roles = roles_of(model)
        blocks = [(name, model.get_submodule(name)) for name in roles.block_names]
        linears = {name: model.get_submodule(name) for name in roles.linears}
        drive(
            model,
            store,
            blocks,
            linears=linears,  # type: ignore[arg-type]
            needs=Needs(second_moment=True),
            quantize=quantize,
            prefix=prefix,
        )
        found[key] = {name: model.get_submodule(name).weight for name in roles.linears}  # type: ignore[misc]
    for name, weight in found["whole"].items():
        assert torch.equal(weight, found["by block"][name])
    assert most == 1


def test_refusals(save_model: Save) -> None:
    folder = save_model()
    residency, _ = load_llm_by_block(folder)
    with pytest.raises(ValueError, match=r"'lm_head' is no block; they are model\.layers\.0 to"):
        residency.load("lm_head")
    whole: Any = load_llm(folder).model.to("meta")
    with pytest.raises(ValueError, match="limit=0 blocks"):
        BlockResidency(whole, folder, "cpu", torch.float32, limit=0)
    whole.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False, device="meta")
    with pytest.raises(ValueError, match=r"up_proj\.weight of shape \(48, 32\).*\(40, 32\)"):
        BlockResidency(whole, folder, "cpu", torch.float32)
    whole.model.layers[1].mlp.up_proj = whole.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="shared between blocks"):
        BlockResidency(whole, folder, "cpu", torch.float32)


def test_files_that_lack_something_are_refused(save_model: Save) -> None:
    folder = save_model(num_hidden_layers=2)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.self_attn\.q_proj\.weight"):
        load_llm_by_block(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of \d+ shards"):
        load_llm_by_block(folder)


def test_quantized_folders_are_refused(save_model: Save) -> None:
    folder = save_model()
    config = folder / "config.json"
    content = config.read_text().replace("{", '{"quantization_config": {"quant_method": "x"},', 1)
    config.write_text(content)
    with pytest.raises(ValueError, match="is quantized already"):
        load_llm_by_block(folder)
    with pytest.raises(ValueError, match="is quantized already; give the float model"):
        load_llm_to_quantize(folder, residency="all")
