"""``dit-qat fit | validate | test``: LightningCLI with our module, callbacks and defaults."""

import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities import rank_zero_only

from dit_qat.cli.checkpoint import check_fits, check_goes_on, step_of
from dit_qat.cli.quiet import silence_worker_advice
from dit_qat.cli.verbs import spell_out
from dit_qat.dit.data import Digits
from dit_qat.dit.training import (
    EMA,
    BitAllocation,
    Checkpoints,
    DiTTraining,
    OnlineMetrics,
    QuantStatistics,
    SampleGrids,
    Throughput,
    last_checkpoint,
)
from dit_qat.dit.training.runs import check_run, claim_run, read_metrics, resume_path
from dit_qat.dit.training.slurm import goes_on, sign
from dit_qat.export.files import locked, write_json

__all__ = ["TrainingCLI", "run_training"]

_SEED_LIMIT = 2**32
_GRACE = 5.0  # seconds that processes get to end by themselves, and to say why


class SaveConfig(SaveConfigCallback):
    """Write the parsed configuration beside the checkpoints, at a fresh start only."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``<root>/config.yaml``."""
        path = Path(trainer.default_root_dir) / self.config_filename
        if stage == "fit" and not path.exists():
            self.parser.save(self.config, path, skip_none=False)


class TrainingCLI(LightningCLI):
    """Lightning's command line, with the run's folder guarded and resuming made explicit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self.held:  # Lightning's constructor does the whole run
            self.held.push(self._end_others)
            super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs without ``predict``: ``dit-qat sample`` draws."""
        verbs = LightningCLI.subcommands()
        return {verb: verbs[verb] for verb in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our callbacks under short keys, and ``--overwrite``."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(SampleGrids, "samples")
        parser.add_lightning_class_args(QuantStatistics, "statistics")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(OnlineMetrics, "online")
        parser.add_lightning_class_args(BitAllocation, "allocation")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Replace the results of an earlier run."
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_run_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, without Lightning's warning that a program's own arguments are ignored."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Keep Lightning from merging a checkpoint's hyper-parameters over the user's file."""

    def before_instantiate_classes(self) -> None:
        """Resolve ``--ckpt_path``; refuse to write over results, or to train without an end."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and config.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={config.trainer.max_steps}: dit_qat counts optimizer steps, "
                "not epochs; set trainer.max_steps to at least 1"
            )
        root = Path(config.trainer.default_root_dir)
        if self.subcommand == "fit" and goes_on(root):
            self._go_on(config, root)
        inside = False
        if config.ckpt_path is not None:
            path = resume_path(config.ckpt_path, root)
            inside = root.resolve() in path.resolve().parents
            config.ckpt_path = str(path)
            config.weights_only = True
            config.model.fresh_start = False
        self.starts_anew = self.subcommand == "fit" and not inside
        if self.starts_anew and _is_first():
            check_run(root, config.overwrite)
        if self.subcommand != "fit":
            read_metrics(root / "metrics.json")  # refused now, rather than after the work

    def _go_on(self, config: Any, root: Path) -> None:
        """Where a cluster gave the command a second time, its first time left the results."""
        if last_checkpoint(root).is_file():
            config.ckpt_path = "last"
        else:
            config.overwrite = True

    def _end_others(self, kind: type[BaseException] | None, *_: object) -> None:
        """When the first process fails, end those that it started: they may wait for it forever."""
        trainer = getattr(self, "trainer", None)
        launcher = None if trainer is None else trainer.strategy.launcher
        if kind is None or not isinstance(launcher, _SubprocessScriptLauncher):
            return
        deadline = time.monotonic() + _GRACE
        for process in launcher.procs:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def instantiate_classes(self) -> None:
        """Build everything; only when that went well, old results make room for new ones."""
        super().instantiate_classes()
        if isinstance(self.datamodule, Digits):
            silence_worker_advice()
        config = self.config[self.subcommand]
        if config.ckpt_path is not None:
            path, continues = Path(config.ckpt_path), self.subcommand == "fit"
            check_fits(path, self.model.hparams, continues)
            if continues:
                check_goes_on(path, self.trainer)
        root = Path(config.trainer.default_root_dir)
        # The other processes of a run find the folder of the first one claimed, and rightly so.
        if self.trainer.is_global_zero and self.subcommand == "fit":
            self.held.enter_context(locked(root))
            if self.starts_anew:
                claim_run(root, config.overwrite)
                sign(root)
        self.started = time.perf_counter()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Log to TensorBoard in the run's folder by default; leave EMA out if it is not wanted."""
        config = self.config_init[self.subcommand].trainer
        if config.logger in (None, True):
            kwargs["logger"] = (
                TensorBoardLogger(config.default_root_dir, name="tensorboard", version="")
                if self.subcommand == "fit"
                else False
            )
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks = [  # type: ignore[attr-defined]
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if not isinstance(callback, EMA) or callback.enabled
        ]
        return trainer

    def after_fit(self) -> None:
        """Write metrics.json, without those of an older checkpoint."""
        self._write_metrics({})

    def after_validate(self) -> None:
        """Add to metrics.json."""
        self._write_metrics(read_metrics(self._metrics_path))

    def after_test(self) -> None:
        """Add to metrics.json."""
        self._write_metrics(read_metrics(self._metrics_path))

    @property
    def _metrics_path(self) -> Path:
        return Path(self.trainer.default_root_dir) / "metrics.json"

    def _write_metrics(self, others: dict[str, Any]) -> None:
        if not self.trainer.is_global_zero:
            return
        ckpt_path = self.config[self.subcommand].ckpt_path
        own = {
            "checkpoint": ckpt_path,
            "step": self.trainer.global_step if self.subcommand == "fit" else step_of(ckpt_path),
            "seconds": time.perf_counter() - self.started,
            "metrics": {name: float(v) for name, v in self.trainer.callback_metrics.items()},
        }
        write_json(self._metrics_path, others | {str(self.subcommand): own})


def run_training(arguments: list[str]) -> int:
    """Run a training verb; return the exit code (128 + signal when one ended the run)."""
    parser_kwargs: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
    verbs = {verb: dict(parser_kwargs) for verb in TrainingCLI.subcommands()}
    cli = TrainingCLI(
        DiTTraining,
        pl.LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        trainer_defaults={
            "default_root_dir": "runs/default",
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 10,
            "use_distributed_sampler": False,
        },
        parser_kwargs={"prog": "dit-qat", **parser_kwargs, **verbs},
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
        args=spell_out(arguments, {"overwrite": bool}),
    )
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Checkpoints) and callback.stopped_by is not None:
            if cli.trainer.is_global_zero:
                print(
                    f"stopped by {callback.stopped_by.name} at step {cli.trainer.global_step}; "
                    "continue with --ckpt_path last"
                )
            return 128 + callback.stopped_by
    return 0


def _is_first() -> bool:
    """Whether this is the process that writes, as far as that shows before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


def _run_seed(seed: bool | int) -> int:
    """The seed of our own draws: true and false, which leave Lightning's global one open, are 0.

    Raises:
        ValueError: for a seed that Lightning would replace by another.
    """
    if isinstance(seed, bool):
        return 0
    if not 0 <= seed < _SEED_LIMIT:
        raise ValueError(f"seed_everything={seed} is outside 0..{_SEED_LIMIT - 1}")
    return seed
