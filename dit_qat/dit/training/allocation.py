"""AMPN's turning point: after the warm-up, score every layer, allocate bits, train on with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from dit_qat.allocation import BitMap, make_bit_map
from dit_qat.dit.data import StepBatchSampler, StepData
from dit_qat.dit.evaluation.kept_scores import ScoreSettings, kept_files, score_layers
from dit_qat.dit.evaluation.sensitivity import quantized_linears
from dit_qat.dit.methods import AMPN
from dit_qat.dit.models import DiT
from dit_qat.dit.processes import Processes
from dit_qat.dit.report import bit_map_plot
from dit_qat.dit.training.bit_maps import set_bits_
from dit_qat.dit.training.checkpoints import Checkpoints
from dit_qat.dit.training.ema import ema_network, refuse_sharded
from dit_qat.dit.training.module import DiTTraining
from dit_qat.export.files import write_json, written_whole

__all__ = ["BIT_MAP", "PICTURE", "BitAllocation", "allocate_by", "first_images", "write_bit_map"]

BIT_MAP, PICTURE = "bit_map.json", "bit_map.png"

Rows = dict[str, list[float]]


class BitAllocation(pl.Callback):
    """Allocate AMPN's bits once its warm-up is over; idle under other methods.

    At the start of step ``warmup_steps`` the layers are scored on the weights in training (their
    average lags behind by thousands of steps), against the float teacher or, without one, the
    network at the highest choice. The bits go into the network, its average and the
    hyper-parameters, from which checkpoints rebuild; scores and bits into ``<root>/bit_map.json``
    and ``bit_map.png``. Images and noise are functions of the run's seed. Processes deal the
    layers out. Rows are kept on disk as they are found, and ``Checkpoints`` write one when the
    warm-up is over, so that a run killed meanwhile goes on with these rows.

    Attributes:
        allocates_bits: What ``DiTTraining`` looks for, AMPN being nothing without it.
    """

    allocates_bits: ClassVar[bool] = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before any work, what could not be allocated.

        Raises:
            ValueError: for a warm-up as long as the run, bounds that match no layer or cannot be
                met, data without draws, or sharded weights.
        """
        method = _to_allocate(pl_module)
        if stage != "fit" or method is None:
            return
        config = method.config
        refuse_sharded(trainer, "AMPN cannot score layers of", "give the method a bit_map")
        if 0 <= trainer.max_steps <= config.warmup_steps:
            raise ValueError(
                f"method.warmup_steps={config.warmup_steps} leaves none of trainer.max_steps="
                f"{trainer.max_steps} to train with the allocated bits; lower it, or score a "
                "checkpoint with dit-qat allocate"
            )
        _data_of(trainer)
        network: DiT = pl_module.network  # type: ignore[assignment]
        names = [*quantized_linears(network, method.layers)]
        # The errors of the budget and its bounds, now rather than after the warm-up.
        allocate_by(method, network, dict.fromkeys(names, [0.0] * len(config.choices)), step=0)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.also_after.add(config.warmup_steps)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Score, allocate and switch when the warm-up is over."""
        method = _to_allocate(pl_module)
        if method is None or trainer.global_step < method.config.warmup_steps:
            return
        assert isinstance(pl_module, DiTTraining)
        root = Path(trainer.default_root_dir)
        rows = _scored(trainer, pl_module, method, root)
        found = allocate_by(method, pl_module.network, rows, trainer.global_step)
        for network in (pl_module.network, ema_network(trainer, pl_module)):
            set_bits_(network, found.by_layer)
        pl_module.change_method(method.with_bits(found.by_layer))
        zero = trainer.is_global_zero
        _processes(trainer).together(lambda: write_bit_map(root, found) if zero else None)
        rank_zero_info(_summary(found, root))
        for path in kept_files(root):
            path.unlink(missing_ok=True)


def allocate_by(method: AMPN, network: nn.Module, rows: Rows, step: int | None) -> BitMap:
    """Allocate bits by scores of every layer, under the method's budget and bounds.

    Raises:
        ValueError: as :func:`~dit_qat.allocation.make_bit_map`.
    """
    layers, config = quantized_linears(network, method.layers), method.config
    return make_bit_map(
        [*layers],
        [layer.weight.numel() for layer in layers.values()],
        config.choices,
        [rows[name] for name in layers],
        average=config.average_bits,
        bounds=config.bounds,
        score=config.score,
        step=step,
    )


def write_bit_map(folder: Path, found: BitMap) -> None:
    """Write ``bit_map.json`` and ``bit_map.png``."""
    with written_whole(folder / PICTURE) as temporary:
        temporary.write_bytes(bit_map_plot(found))
    write_json(folder / BIT_MAP, found.as_dict())


def first_images(data: StepData, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The first training images of a run of that seed, with their labels."""
    dataset = data.train_dataset()
    draw = next(iter(StepBatchSampler(len(dataset), count, seed, start=0, stop=1)))
    return dataset[draw]


def _to_allocate(module: pl.LightningModule) -> AMPN | None:
    """AMPN, while its bits are to be allocated in this run and are not yet."""
    method = module.method if isinstance(module, DiTTraining) else None
    return method if isinstance(method, AMPN) and method.config.bit_map is None else None


def _data_of(trainer: pl.Trainer) -> StepData:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, StepData):
        raise ValueError(
            f"AMPN scores layers on the first images of a data module of dit_qat.dit.data, not of "
            f"{type(data).__name__}; use one of those, or give the method a bit_map"
        )
    return data


def _scored(trainer: pl.Trainer, module: DiTTraining, method: AMPN, root: Path) -> Rows:
    """Scores of all layers, on every process alike."""
    config, network, processes = method.config, module.network, _processes(trainer)
    settings = ScoreSettings(config.choices, config.score, config.score_timesteps, module.seed)

    def score() -> Rows:
        data = _data_of(trainer)
        images, labels = first_images(data, config.score_images, data.run_seed())
        with _measuring(trainer, network):
            return score_layers(
                network,
                images,
                labels if network.num_classes else None,
                [*quantized_linears(network, method.layers)],
                settings,
                root,
                reference=module.teacher,
                rank=processes.rank,
                processes=processes.world_size,
                progress=processes.is_zero and trainer.progress_bar_callback is not None,
                say=_say if processes.is_zero else None,
            )

    return {name: row for part in processes.together(score) for name, row in part.items()}


def _processes(trainer: pl.Trainer) -> Processes:
    """The processes of a run: what one of them fails at here, all of them report."""
    return Processes(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)


def _say(text: str) -> None:
    rank_zero_info(f"AMPN, process 0: {text}")


def _summary(found: BitMap, root: Path) -> str:
    means = ", ".join(f"{kind} {mean:.2f}" for kind, mean in found.mean_by_type.items())
    return f"{found.average_bits:.4g} activation bits on average ({means}): {root / BIT_MAP}"


@contextmanager
def _measuring(trainer: pl.Trainer, network: nn.Module) -> Iterator[None]:
    """Evaluation mode, the precision of the training, and no compiling for every bit-width."""
    network.eval()
    try:
        with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        network.train()
