"""``dit-qat fit | validate | test``: LightningCLI with our module, callbacks and defaults."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger

from dit_qat.dit.training import (
    EMA,
    Checkpoints,
    DiTTraining,
    QuantStatistics,
    SampleGrids,
    Throughput,
)
from dit_qat.dit.training.runs import claim_folder, resume_path

__all__ = ["TrainingCLI", "run_training"]


class SaveConfig(SaveConfigCallback):
    """Write the parsed configuration beside the checkpoints, at a fresh start only."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``<root>/config.yaml``."""
        path = Path(trainer.default_root_dir) / self.config_filename
        if stage == "fit" and not path.exists():
            self.parser.save(self.config, path, skip_none=False)


class TrainingCLI(LightningCLI):
    """Lightning's command line, with the run's folder guarded and resuming made explicit."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our callbacks under short keys, and ``--overwrite``."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(SampleGrids, "samples")
        parser.add_lightning_class_args(QuantStatistics, "statistics")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Replace the results of an earlier run."
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Keep Lightning from merging a checkpoint's hyper-parameters over the user's file."""

    def before_instantiate_classes(self) -> None:
        """Resolve ``--ckpt_path``; refuse to write over results, before any work."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir)
        if config.ckpt_path is not None:
            config.ckpt_path = str(resume_path(config.ckpt_path, root))
            config.model.fresh_start = False
        elif self.subcommand == "fit":
            claim_folder(root, config.overwrite)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Log to TensorBoard in the run's folder unless the configuration says otherwise."""
        config = self.config_init[self.subcommand].trainer
        if config.logger in (None, True):
            kwargs["logger"] = (
                TensorBoardLogger(config.default_root_dir, name="tensorboard", version="")
                if self.subcommand == "fit"
                else False
            )
        return super().instantiate_trainer(**kwargs)


def run_training(arguments: list[str]) -> int:
    """Run a training verb; return the exit code (128 + signal when one ended the run)."""
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
        },
        parser_kwargs={"prog": "dit-qat", "allow_abbrev": False},
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
        args=arguments,
    )
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Checkpoints) and callback.stopped_by is not None:
            print(
                f"stopped by {callback.stopped_by.name} at step {cli.trainer.global_step}; "
                "continue with --ckpt_path last"
            )
            return 128 + callback.stopped_by
    return 0
