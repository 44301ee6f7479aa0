"""Checkpoint files: whole or not at all; EMA: parameters only."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.optim.swa_utils import AveragedModel

from dit_qat.dit.methods import RobuQ
from dit_qat.dit.training import (
    EMA,
    AtomicCheckpointIO,
    Checkpoints,
    DiTTraining,
    OnlineMetrics,
    SampleGrids,
    last_checkpoint,
)
from dit_qat.dit.training.loading import load_checkpoint, read_checkpoint
from dit_qat.dit.training.runs import claim_run, read_metrics, resume_path


class FullDisk:
    """A file object that has room for some bytes only."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1, "weight": torch.ones(1000)}, path)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: FullDisk(opened(self, mode), room=2000))
    with pytest.raises(OSError, match="free space or choose another"):
        writer.save_checkpoint({"step": 2, "weight": torch.ones(1000)}, path)
    monkeypatch.undo()
    assert writer.load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_objects_in_a_checkpoint_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "odd.ckpt"
    torch.save({"method": RobuQ()}, path)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


@pytest.mark.parametrize("damage", ["truncated", "text", "missing", "other"])
def test_damaged_checkpoints_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.ckpt"
    if damage == "truncated":
        torch.save({"state_dict": {"a": torch.ones(1000)}, "hyper_parameters": {}}, path)
        path.write_bytes(path.read_bytes()[:1500])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "other":
        torch.save({"a": torch.ones(3)}, path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"last\.ckpt"):
        load_checkpoint(path)


@pytest.fixture
def written(
    tmp_path: Path, make_module: Callable[..., DiTTraining], fit: Callable[..., pl.Trainer]
) -> Path:
    """The checkpoint of a one-step RobuQ run."""
    fit(make_module(RobuQ(rank=2)), tmp_path / "run", 1)
    return last_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [1, 2],
        {"global_step": 3, "state_dict": {}},
        {"global_step": 3, "state_dict": {}, "hyper_parameters": {"lr": 0.1}},
        {"global_step": 3, "state_dict": {}, "hyper_parameters": {"network": "resnet"}},
        {"state_dict": {}, "hyper_parameters": {"network": {}}},
    ],
)
def test_foreign_checkpoints_are_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    for read in (load_checkpoint, read_checkpoint):
        with pytest.raises(ValueError, match=r"other\.ckpt is not a checkpoint of dit-qat fit"):
            read(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colour": 1}, "colour"),
        ({"float_layers": 3}, "not iterable"),
        ({"network": {}}, "names no class_path with init_args but nothing"),
        ({"network": {"class_path": "os.path", "init_args": {}}}, "not an imported DiT"),
        (
            {"network": {"class_path": "dit_qat.dit.models.dit.DiT", "init_args": {"a": 1}}},
            "unexpected keyword",
        ),
    ],
)
def test_settings_that_build_no_module_are_named(
    written: Path, settings: dict[str, Any], message: str
) -> None:
    content = torch.load(written, weights_only=True)
    content["hyper_parameters"] |= settings
    torch.save(content, written)
    with pytest.raises(ValueError, match=rf"last\.ckpt holds hyper-parameters .*{message}"):
        load_checkpoint(written)


def test_a_checkpoint_cannot_have_float_weights_read(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(written, weights_only=True)
    content["hyper_parameters"] |= {"fresh_start": True, "float_weights": "org/name"}
    torch.save(content, written)

    def read(*_: object) -> None:
        raise AssertionError("float weights were read")

    monkeypatch.setattr("dit_qat.dit.training.module.load_weights_", read)
    assert load_checkpoint(written).float_weights == "org/name"


def test_numbered_checkpoints_are_kept(
    tmp_path: Path,
    make_module: Callable[..., DiTTraining],
    fit: Callable[..., pl.Trainer],
) -> None:
    callbacks = [EMA(0.9), Checkpoints(every_n_steps=4, keep_every_n_steps=2)]
    fit(make_module(), tmp_path, 5, callbacks)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "step_0000002.ckpt", "step_0000004.ckpt"}
    last = torch.load(last_checkpoint(tmp_path), weights_only=True)
    assert last["global_step"] == 5


def test_ema_averages_parameters_and_copies_buffers(
    tmp_path: Path,
    make_module: Callable[..., DiTTraining],
    fit: Callable[..., pl.Trainer],
) -> None:
    module = make_module(RobuQ(rank=2))
    module.register_buffer("bits", torch.tensor(4))

    class Change(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            module.bits.fill_(8 if trainer.global_step >= 2 else 4)

    weight = module.network.blocks[0].attn.qkv.weight
    start = weight.detach().clone()
    fit(module, tmp_path, 4, [Change(), EMA(0.9), Checkpoints(2)])
    content = torch.load(last_checkpoint(tmp_path), weights_only=True)
    name = "network.blocks.0.attn.qkv.weight"
    averaged, current = content["state_dict"], content["current_model_state"]
    assert int(averaged["bits"]) == 8
    moved = (current[name] - start).norm()
    assert 0 < (averaged[name] - start).norm() < moved


def test_sharded_weights_are_not_averaged_or_drawn_from(
    make_module: Callable[..., DiTTraining],
) -> None:
    from pytorch_lightning.strategies import FSDPStrategy

    class Trainer:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(ValueError, match=r"sharded by FSDPStrategy; use trainer\.strategy=ddp"):
        EMA().setup(Trainer(), None, "fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ema\.decay=1\.5"):
        EMA(decay=1.5)
    grids = SampleGrids(every_n_steps=1)
    with pytest.raises(ValueError, match=r"no grid .* sharded by FSDP.*samples\.every_n_steps=0"):
        grids.setup(Trainer(), make_module(), "fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no samples .* sharded by FSDPStrategy.*online\.num=0"):
        OnlineMetrics(60).setup(Trainer(), make_module(), "fit")  # type: ignore[arg-type]


def test_averaging_at_once_is_averaging(make_module: Callable[..., DiTTraining]) -> None:
    one_by_one, at_once = EMA(0.9), EMA(0.9)
    at_once._average_at_once()
    models = []
    for ema in (one_by_one, at_once):
        torch.manual_seed(0)
        module = make_module()
        average = AveragedModel(module, use_buffers=False, **ema._kwargs)
        for _ in range(3):
            for parameter in module.parameters():
                parameter.data.add_(torch.randn_like(parameter))
            average.update_parameters(module)
        models.append(average.module)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_a_folder_with_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"checkpoints, metrics\.json\).*--overwrite"):
        claim_run(tmp_path, overwrite=False)
    claim_run(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file"):
        claim_run(tmp_path / "notes.txt", overwrite=True)


def test_metrics_of_others_are_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    assert read_metrics(path) == {}
    path.write_text('{"validate": {"step": 3}}')
    assert read_metrics(path) == {"validate": {"step": 3}}
    for content, message in (("{", "is damaged"), ('{"fd": 1}', "not written by"), ("[]", "not w")):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"metrics\.json .*{message}.*move it away"):
            read_metrics(path)


def test_last_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="start afresh without --ckpt_path"):
        resume_path("last", tmp_path)


@pytest.mark.parametrize("every", [0, -3])
def test_intervals_are_checked(every: int) -> None:
    with pytest.raises(ValueError, match=r"checkpoints\.every_n_steps"):
        Checkpoints(every_n_steps=every)


def test_a_signal_that_comes_while_processes_agree_counts_for_the_next_step() -> None:
    checkpoints = Checkpoints()

    class Strategy:
        root_device = torch.device("cpu")

        def reduce(self, number: torch.Tensor, reduce_op: str) -> torch.Tensor:
            assert reduce_op == "max"
            if not number:
                checkpoints._on_signal(signal.SIGTERM, None)
            return number

    trainer: Any = SimpleNamespace(world_size=2, strategy=Strategy())
    checkpoints._agree(trainer)
    assert checkpoints.stopped_by is None  # the others do not know of it yet
    checkpoints._agree(trainer)
    assert checkpoints.stopped_by is signal.SIGTERM
