"""AMPN's allocation in the midst of training: killed, resumed, reloaded, and refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy

from dit_qat.dit.data import Digits
from dit_qat.dit.evaluation import kept_scores
from dit_qat.dit.evaluation.sensitivity import quantized_linears
from dit_qat.dit.methods import AMPN, RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.training import (
    EMA,
    BitAllocation,
    Checkpoints,
    DiTTraining,
    allocation,
    last_checkpoint,
)
from dit_qat.dit.training.bit_maps import read_bit_map
from dit_qat.dit.training.loading import load_checkpoint

SHORT: dict[str, Any] = {
    "rank": 2,
    "average_bits": 2.0,
    "activation_bits": 3,
    "warmup_steps": 3,
    "score_images": 4,
    "score_timesteps": 2,
    "distillation": 0.0,
}

Make = Callable[..., DiTTraining]
Fit = Callable[..., pl.Trainer]


@pytest.fixture
def fit(fit: Fit) -> Fit:
    """Without validation, which decides nothing here."""
    return partial(fit, limit_val_batches=0)


def callbacks(*more: pl.Callback, every_n_steps: int = 1) -> list[pl.Callback]:
    return [EMA(0.9), BitAllocation(), Checkpoints(every_n_steps), *more]


def bits_of(network: torch.nn.Module) -> dict[str, int]:
    return {
        name: layer.config.activation.bits
        for name, layer in quantized_linears(network).items()
        if layer.config.activation
    }


class Watch(pl.Callback):
    """The bits at the start of every step, in the network and in its average."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, int], dict[str, int]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        (ema,) = [c for c in trainer.callbacks if isinstance(c, EMA)]  # type: ignore[attr-defined]
        assert ema.averaged is not None
        self.seen.append((bits_of(pl_module.network), bits_of(ema.averaged.network)))


def test_bits_change_after_the_warm_up_everywhere_at_once(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    watch = Watch()
    module = make_module(AMPN(**SHORT))
    fit(module, tmp_path, 5, callbacks(watch))
    found = read_bit_map(tmp_path / "bit_map.json")
    warmup = dict.fromkeys(found.layers, 3)
    assert watch.seen == [(warmup, warmup)] * 3 + [(found.by_layer, found.by_layer)] * 2
    assert found.by_layer != warmup
    assert found.average_bits <= 2
    assert found.step == 3
    assert (tmp_path / "bit_map.png").stat().st_size > 1000
    assert not list(tmp_path.glob(".scores.*"))
    assert module.hparams["method"]["init_args"]["bit_map"] == found.by_layer


def test_a_checkpoint_reloads_with_its_bits(tmp_path: Path, make_module: Make, fit: Fit) -> None:
    module = make_module(AMPN(**SHORT))
    fit(module, tmp_path, 4, callbacks())
    again = load_checkpoint(last_checkpoint(tmp_path))
    assert bits_of(again.network) == read_bit_map(tmp_path / "bit_map.json").by_layer
    for ours, theirs in zip(module.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert isinstance(again.method, AMPN)
    assert again.method.bits == bits_of(again.network)


class Kill(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("step", [2, 5], ids=["before", "after"])
def test_a_run_resumes_on_either_side_of_the_allocation(
    tmp_path: Path, make_module: Make, fit: Fit, step: int
) -> None:
    distilled = AMPN(**(SHORT | {"distillation": 0.5}))
    fit(make_module(distilled), tmp_path / "straight", 7, callbacks())
    parts = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="killed"):
        fit(make_module(distilled), parts, 7, callbacks(Kill(step)))
    resumed = make_module(distilled, fresh_start=False)
    fit(resumed, parts, 7, callbacks(), ckpt_path=str(last_checkpoint(parts)))
    one, other = (
        torch.load(last_checkpoint(root), weights_only=True)
        for root in (tmp_path / "straight", parts)
    )
    for part in ("state_dict", "current_model_state"):
        for name, value in one[part].items():
            same = torch.equal if isinstance(value, torch.Tensor) else dict.__eq__
            assert same(value, other[part][name]), name
    assert one["hyper_parameters"]["method"] == other["hyper_parameters"]["method"]
    maps = [(root / "bit_map.json").read_bytes() for root in (tmp_path / "straight", parts)]
    assert maps[0] == maps[1]


def test_a_run_killed_while_it_measures_goes_on_with_the_rows_it_has(
    tmp_path: Path, make_module: Make, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(make_module(AMPN(**SHORT)), tmp_path / "straight", 4, callbacks())
    write, written = kept_scores.write_json, []

    def write_two(path: Path, content: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    root = tmp_path / "parts"
    monkeypatch.setattr(kept_scores, "write_json", write_two)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_module(AMPN(**SHORT)), root, 4, callbacks(every_n_steps=100))
    assert torch.load(last_checkpoint(root), weights_only=True)["global_step"] == 3
    kept = json.loads((root / ".scores.0.json").read_text())
    assert len(kept["rows"]) == 2
    monkeypatch.setattr(kept_scores, "write_json", write)
    passes: list[int] = []
    resumed = make_module(AMPN(**SHORT), fresh_start=False)
    resumed.network.register_forward_hook(
        lambda net, *_: None if net.training else passes.append(1)
    )
    last = str(last_checkpoint(root))
    fit(resumed, root, 4, callbacks(), ckpt_path=last)
    # Two timesteps; the reference, unchanged, and two layers at three choices besides their own.
    assert len(passes) == 2 * (1 + 1 + 2 * 3)
    maps = [(r / "bit_map.json").read_bytes() for r in (tmp_path / "straight", root)]
    assert maps[0] == maps[1]


def test_rows_of_other_weights_are_not_taken_over(tmp_path: Path, make_module: Make) -> None:
    settings = kept_scores.ScoreSettings((1, 2), timesteps=1)
    images, labels = torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    network = make_module(RobuQ(**{"rank": 2, "distillation": 0.0})).network.eval()
    layers = [*quantized_linears(network)]

    def scored() -> dict[str, list[float]]:
        return kept_scores.score_layers(network, images, labels, layers, settings, tmp_path)

    before = scored()
    assert scored() == before
    with torch.no_grad():
        network.blocks[0].attn.qkv.weight.mul_(-1)
    after = scored()
    assert all(before[name] != after[name] for name in layers)
    (tmp_path / ".scores.0.json").write_text("{")
    assert scored() == after


@pytest.mark.parametrize("processes", [2, 7])
def test_scores_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, make_module: Make, processes: int
) -> None:
    # At 3 bits, so that the reference (all of them at 4) is another than the network as it is.
    method = RobuQ(activation_bits=3, rank=2, distillation=0.0)
    network = make_module(method).network.eval()
    settings = kept_scores.ScoreSettings((1, 4), timesteps=1)
    given = (network, torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    layers = [*quantized_linears(network)]
    alone = kept_scores.score_layers(*given, layers, settings, tmp_path / "alone")
    shared: dict[str, list[float]] = {}
    for rank in range(processes):
        folder = tmp_path / f"of {processes}" / str(rank)
        share = kept_scores.score_layers(
            *given, layers, settings, folder, rank=rank, processes=processes
        )
        assert [*share] == layers[rank::processes]
        shared |= share
    assert shared == alone


def test_local_gradient_is_a_score_as_well(tmp_path: Path, make_module: Make, fit: Fit) -> None:
    fit(make_module(AMPN(**SHORT, score="local_gradient")), tmp_path, 4, callbacks())
    found = read_bit_map(tmp_path / "bit_map.json")
    assert found.score == "local_gradient"
    assert all(row == tuple(sorted(row, reverse=True)) for row in found.scores)


def test_a_frozen_map_needs_no_warm_up(tmp_path: Path, make_module: Make, fit: Fit) -> None:
    fit(make_module(AMPN(**SHORT)), tmp_path / "first", 4, callbacks())
    path = tmp_path / "first" / "bit_map.json"
    module = make_module(AMPN(**SHORT, bit_map=str(path)))
    wanted = read_bit_map(path).by_layer
    assert bits_of(module.network) == wanted
    assert module.hparams["method"]["init_args"]["bit_map"] == wanted
    fit(module, tmp_path / "second", 2, callbacks())
    path.unlink()
    again = load_checkpoint(last_checkpoint(tmp_path / "second"))
    assert bits_of(again.network) == wanted


def names(depth: int = 1) -> list[str]:
    network = DiT(8, 4, 1, 32, depth, 2, num_classes=10)
    linears = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    return [n for n in linears if n.startswith("blocks") and "adaLN" not in n]


@pytest.mark.parametrize(
    ("bit_map", "message"),
    [
        (dict.fromkeys(names(2), 2), r"another model: it has bits for blocks\.1\.attn\.qkv, "),
        (dict.fromkeys(names()[1:], 2), r"another model: it has none for blocks\.0\.attn\.qkv;"),
        (dict.fromkeys(names(), 3), "takes 3 bits on average, beyond average_bits=2"),
        (dict.fromkeys(names(), 9), "bits=9 is outside"),
    ],
)
def test_a_bit_map_of_another_model_is_refused(
    make_module: Make, bit_map: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(AMPN(**SHORT, bit_map=bit_map))


def test_a_bit_map_of_a_wider_model_is_refused(tmp_path: Path, make_module: Make, fit: Fit) -> None:
    fit(make_module(AMPN(**SHORT)), tmp_path, 4, callbacks())
    path = tmp_path / "bit_map.json"
    content = json.loads(path.read_text())
    content["layers"][0]["cost"] *= 4
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"qkv differ in size \(12,288 weights there, 3,072 here"):
        make_module(AMPN(**SHORT, bit_map=str(path)))
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        make_module(AMPN(**SHORT, bit_map=str(path)))
    with pytest.raises(FileNotFoundError, match="there is no bit map"):
        make_module(AMPN(**SHORT, bit_map=str(tmp_path / "no.json")))


def test_without_the_callback_no_run_stays_at_the_bits_of_its_warm_up(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    alone: list[pl.Callback] = [EMA(0.9), Checkpoints(1)]
    with pytest.raises(ValueError, match=r"AMPN has no bits yet.*add .*BitAllocation\(\), or"):
        fit(make_module(AMPN(**SHORT)), tmp_path / "none", 4, alone)
    assert not (tmp_path / "none" / "checkpoints").exists()
    fit(make_module(AMPN(**SHORT)), tmp_path / "run", 4, callbacks())
    bits = read_bit_map(tmp_path / "run" / "bit_map.json").by_layer
    last = str(last_checkpoint(tmp_path / "run"))
    resumed = make_module(AMPN(**SHORT), fresh_start=False)
    fit(resumed, tmp_path / "run", 5, [EMA(0.9), Checkpoints(1)], ckpt_path=last)
    assert bits_of(resumed.network) == bits
    fit(make_module(AMPN(**SHORT, bit_map=bits)), tmp_path / "given", 1, [EMA(0.9)])


def test_a_checkpoint_brings_the_bits_of_a_file_that_is_gone(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    fit(make_module(AMPN(**SHORT)), tmp_path, 4, callbacks())
    path = tmp_path / "bit_map.json"
    bits = read_bit_map(path).by_layer
    path.unlink()
    resumed = make_module(AMPN(**SHORT, bit_map=path), fresh_start=False)
    fit(resumed, tmp_path, 5, callbacks(), ckpt_path=str(last_checkpoint(tmp_path)))
    assert bits_of(resumed.network) == bits


def test_the_bits_of_a_deeper_network_are_not_taken_over(make_module: Make) -> None:
    module = make_module(AMPN(**SHORT))
    saved = {"method": {"init_args": {"bit_map": dict.fromkeys(names(2), 2)}}}
    message = (
        r"bits of another model: this network quantizes no activations in blocks\.1\.attn\.qkv"
    )
    with pytest.raises(ValueError, match=message):
        module.on_load_checkpoint({"hyper_parameters": saved})
    assert set(bits_of(module.network).values()) == {3}


class Plain(pl.LightningDataModule):
    def train_dataloader(self) -> list[Any]:
        return [(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))] * 9


@pytest.mark.parametrize(
    ("changed", "data", "message"),
    [
        ({"warmup_steps": 4}, Digits(16), r"warmup_steps=4 leaves none of trainer\.max_steps=4"),
        ({"bounds": {"*.atn.*": 2}}, Digits(16), r"'\*\.atn\.\*' matches no layer"),
        ({"bounds": {"*": 4}}, Digits(16), r"average=2 bits cannot be met"),
        ({}, Plain(), "data module of dit_qat"),
    ],
)
def test_what_cannot_be_allocated_is_refused_before_any_step(
    tmp_path: Path,
    make_module: Make,
    fit: Fit,
    changed: dict[str, Any],
    data: pl.LightningDataModule,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(make_module(AMPN(**(SHORT | changed))), tmp_path, 4, callbacks(), data=data)
    assert not (tmp_path / "checkpoints").exists()


def test_sharded_weights_are_not_scored(make_module: Make) -> None:
    class Sharded:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(ValueError, match=r"sharded by FSDPStrategy.*give the method a bit_map"):
        BitAllocation().setup(Sharded(), make_module(AMPN(**SHORT)), "fit")  # type: ignore[arg-type]


def test_the_outcome_is_said(
    tmp_path: Path, make_module: Make, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(allocation, "rank_zero_info", said.append)
    fit(make_module(AMPN(**SHORT)), tmp_path, 4, callbacks())
    before, after = said
    assert before.startswith("AMPN, process 0: 4 layers at 4 bit-widths: 26 batches, about ")
    assert "activation bits on average (attn.proj " in after
    assert str(tmp_path / "bit_map.json") in after
