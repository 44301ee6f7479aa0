"""What one watches during training: sample grids, quantizer statistics, throughput."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from dit_qat.dit.evaluation.images import image_grid, save_png
from dit_qat.dit.models import DiT
from dit_qat.dit.models.autoencoder import Autoencoder
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8
from dit_qat.dit.training.decoders import load_decoder
from dit_qat.dit.training.ema import ema_network, refuse_sharded
from dit_qat.layers import QuantLinear
from dit_qat.layers.statistics import layer_statistics

__all__ = ["QuantStatistics", "SampleGrids", "Throughput"]


class SampleGrids(pl.Callback):
    """Sample a grid on EMA weights with fixed seeds, to ``<root>/samples`` and TensorBoard.

    Args:
        every_n_steps: Optimizer steps between grids; 0 for none.
        count: Images in the grid; labels count up through the classes.
        columns: Images per row.
        sampler: How to sample.
        vae: Autoencoder that turns latents into pictures (see ``load_autoencoder``); it visits the
            GPU for the time of a grid only.

    Raises:
        ValueError: for a negative interval, no images or no columns.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        count: int = 50,
        columns: int = 10,
        sampler: SamplerConfig | None = None,
        vae: str | None = None,
    ) -> None:
        if every_n_steps < 0 or count < 1 or columns < 1:
            raise ValueError(
                f"samples.every_n_steps={every_n_steps} must not be negative, count={count} and "
                f"columns={columns} at least 1"
            )
        self.every_n_steps = every_n_steps
        self.count = count
        self.columns = columns
        self.sampler = SamplerConfig(batch_size=count) if sampler is None else sampler
        self.vae = vae
        self._decoder: Autoencoder | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse, before any work, what could not be drawn.

        Raises:
            ValueError: for sharded weights, guidance without a null class, or latents without an
                autoencoder; as ``load_decoder``.
        """
        network = pl_module.network
        if not self.every_n_steps or stage != "fit":
            return
        refuse_sharded(trainer, "no grid can be drawn from", "samples.every_n_steps=0")
        if self.sampler.guidance != 1:
            _ = network.null_class  # guidance needs one
        if self.vae is None and network.in_channels not in (1, 3):
            raise ValueError(
                f"samples.every_n_steps={self.every_n_steps}: this network draws latents of "
                f"{network.in_channels} channels; name the autoencoder that shows them, "
                "samples.vae, or set samples.every_n_steps to 0"
            )
        if self.vae is not None and trainer.is_global_zero:
            self._decoder = load_decoder(self.vae, network, trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw a grid when due, on rank zero."""
        step = trainer.global_step
        if _due(trainer, batch_idx, step, self.every_n_steps) and trainer.is_global_zero:
            self._draw(trainer, ema_network(trainer, pl_module), step)

    def _draw(self, trainer: pl.Trainer, network: DiT, step: int) -> None:
        batches = sample_images(network, self.sampler, range(self.count))
        drawn = torch.cat([images for _, images in batches])
        if self._decoder is not None:
            drawn = self._decoder.to(drawn.device).decode(drawn)
            self._decoder.to("cpu")
        images = to_uint8(drawn)
        grid = image_grid(images, self.columns, scale=max(1, 32 // images.shape[-1]))
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_png(folder / f"step_{step:07d}.png", grid)
        if isinstance(trainer.logger, TensorBoardLogger):
            layout = "HW" if grid.ndim == 2 else "HWC"
            trainer.logger.experiment.add_image("samples", grid, step, dataformats=layout)


class QuantStatistics(pl.Callback):
    """Log clip rate, zero fraction and errors of every quantized layer on a training batch.

    Args:
        every_n_steps: Optimizer steps between measurements; 0 for none.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        self.every_n_steps = every_n_steps
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._measured: dict[str, dict[str, float]] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Listen in on the layers for the step that is due."""
        if _due(trainer, batch_idx, trainer.global_step + 1, self.every_n_steps):
            for name, module in pl_module.network.named_modules():
                if isinstance(module, QuantLinear):
                    self._handles.append(module.register_forward_pre_hook(self._listener(name)))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Log what was heard."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if not self._measured:
            return
        values = {
            f"quant/{layer}/{name}": value
            for layer, numbers in self._measured.items()
            for name, value in numbers.items()
        }
        for name in ("clip_rate", "zero_fraction", "output_error"):
            column = [numbers[name] for numbers in self._measured.values()]
            values[f"quant/mean_{name}"] = sum(column) / len(column)
        # Straight to the loggers: through the module, they would wait for its next logged step.
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
        self._measured = {}

    def _listener(self, name: str) -> Any:
        def listen(layer: QuantLinear, inputs: tuple[Tensor, ...]) -> None:
            self._measured[name] = asdict(layer_statistics(layer, inputs[0].detach()))

        return listen


class Throughput(pl.Callback):
    """Log images per second, over the steps between two logs.

    Args:
        every_n_steps: Optimizer steps between logs; 0 for none.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._images = 0
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._images, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log when due."""
        self._images += batch[0].shape[0] * trainer.world_size
        if _due(trainer, batch_idx, trainer.global_step, self.every_n_steps):
            now = time.perf_counter()
            pl_module.log("images_per_second", self._images / (now - self._since))
            self._images, self._since = 0, now


def _due(trainer: pl.Trainer, batch_idx: int, step: int, every_n_steps: int) -> bool:
    """Whether a batch is the last of optimizer step ``step``, and that step is due."""
    last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return bool(every_n_steps) and last and step % every_n_steps == 0
