"""The Lightning module: a DiT, quantized in the constructor, trained by the DiT recipe."""

from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from dit_qat.dit.diffusion import NoiseSchedule, diffusion_loss
from dit_qat.dit.methods import AMPN, Method
from dit_qat.dit.models import DiT, load_dit, load_weights_
from dit_qat.dit.randomness import derive_seed, generator_for
from dit_qat.dit.training.bit_maps import saved_bits, set_bits_, settled
from dit_qat.dit.training.optimizer import OptimizerConfig, learning_rate_factor, parameter_groups
from dit_qat.dit.training.specs import restore, spec_of
from dit_qat.layers import QuantConfig, Rule, quantize_

__all__ = ["DiTTraining", "NonFiniteLossError"]


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


class DiTTraining(pl.LightningModule):
    """Train a DiT, float or quantized; every random draw is a function of seed and step.

    Batches are ``(images, labels)``, images (N, C, H, W) in model space; labels are ignored by an
    unconditional network.

    Args:
        network: The float architecture; quantized here, in place, by ``method``.
        method: Quantization-aware method; None trains the float network.
        float_layers: Globs of layers that the method leaves float, such as ``blocks.0.*``.
        float_weights: Embedded name, file or hub id of float weights; None: a random start.
        optimizer: AdamW's learning rates, warm-up and decay.
        distillation: Weight of the squared distance to the teacher's noise; None: the method's.
        label_dropout: Share of labels replaced by the null class; None: the network's.
        seed: Seed of noise, timesteps, label dropout and data order.
        compile: Compile the network (its parameter names stay).
        gradient_checkpointing: Recompute each block in backward.
        fresh_start: False when a checkpoint will supply the values: ``float_weights`` is not read.

    Raises:
        ValueError: for settings that do not fit together, or a layer that the method cannot
            quantize; errors of :func:`~dit_qat.dit.models.load_dit` for the weights.
    """

    def __init__(
        self,
        network: DiT,
        method: Method | None = None,
        float_layers: list[str] | None = None,
        float_weights: str | None = None,
        optimizer: OptimizerConfig | None = None,
        distillation: float | None = None,
        label_dropout: float | None = None,
        seed: int = 0,
        compile: bool = False,
        gradient_checkpointing: bool = False,
        fresh_start: bool = True,
    ) -> None:
        super().__init__()
        network, method = restore(network, DiT), restore(method, Method)
        if fresh_start:
            method = settled(method, network, float_layers or [])
        optimizer = restore(optimizer, OptimizerConfig) or OptimizerConfig()
        self._keep_hyperparameters(locals())
        self.seed, self.method = seed, method
        self.optimizer_config = optimizer
        self.float_weights = float_weights
        method_distillation = method.distillation if method is not None else 0.0
        self.distillation = method_distillation if distillation is None else distillation
        if self.distillation < 0:
            raise ValueError(f"distillation={self.distillation} must not be negative")
        if label_dropout is not None and not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout={label_dropout} is outside [0, 1)")
        if self.distillation and float_weights is None:
            raise ValueError(
                f"distillation={self.distillation} needs a teacher; set model.float_weights"
            )
        dropout = network.class_dropout_prob if label_dropout is None else label_dropout
        self.label_dropout = dropout if network.num_classes else 0.0
        self.schedule = NoiseSchedule()
        self._teacher: tuple[DiT, ...] = ()
        self._logged: list[dict[str, Tensor]] = []
        self._evaluated: list[Tensor] = []
        if fresh_start and float_weights is not None:
            load_weights_(network, float_weights)
        if method is not None:
            quantize_(network, _rules(method, float_layers or []), initialize=fresh_start)
        network.gradient_checkpointing = gradient_checkpointing
        self.network = network
        if compile:
            self.network.compile()

    def _keep_hyperparameters(self, arguments: dict[str, Any]) -> None:
        plain = {
            "network": spec_of(arguments["network"]),
            "method": spec_of(arguments["method"]),
            "optimizer": spec_of(arguments["optimizer"]),
            "fresh_start": False,
        }
        kept = (
            "float_layers",
            "float_weights",
            "distillation",
            "label_dropout",
            "seed",
            "compile",
            "gradient_checkpointing",
        )
        self.save_hyperparameters(plain | {name: arguments[name] for name in kept})

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's prediction (see :meth:`DiT.forward`)."""
        result: Tensor = self.network(x, t, y)
        return result

    @property
    def teacher(self) -> DiT | None:
        """The float network that is distilled from, during a fit."""
        return self._teacher[0] if self._teacher else None

    def change_method(self, method: Method) -> None:
        """Have checkpoints rebuild by another form of the method, which the layers have already."""
        self.method = method
        self.hparams["method"] = spec_of(method)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the bits that were allocated in the course of the run."""
        bits = saved_bits(checkpoint)
        if bits is not None and isinstance(self.method, AMPN) and self.method.bits is None:
            set_bits_(self.network, bits)
            self.change_method(self.method.with_bits(bits))

    def on_fit_start(self) -> None:
        """Load the teacher, outside the registered modules: checkpoints and EMA do not see it.

        Raises:
            ValueError: for AMPN without a bit map, where no callback allocates one.
        """
        self._check_allocated()
        if self.distillation and self.float_weights is not None and not self._teacher:
            teacher = load_dit(self.float_weights).eval().requires_grad_(False)
            self._teacher = (teacher.to(self.device),)

    def _check_allocated(self) -> None:
        """Refuse to train a whole run at the bits of a warm-up."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not isinstance(self.method, AMPN) or self.method.bits is not None:
            return
        if not any(getattr(callback, "allocates_bits", False) for callback in callbacks):
            raise ValueError(
                f"AMPN has no bits yet, and none of the trainer's callbacks allocates them after "
                f"the warm-up of {self.method.config.warmup_steps} steps; add "
                "dit_qat.dit.training.BitAllocation(), or give the method a bit_map"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make other random draws (dropout of a custom network) depend on the step as well."""
        torch.manual_seed(derive_seed(self.seed, "step", self.global_step, self._slot(batch_idx)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The objective: DiT's loss, plus the weighted distance to the teacher."""
        x_0, labels = batch
        generator = generator_for(self.seed, "train", self.global_step, device=self.device)
        slots = self.trainer.world_size * self.trainer.accumulate_grad_batches
        draws = self._draw(x_0, generator, self._slot(batch_idx), slots)
        total, values = self._loss(x_0, labels, draws, self.label_dropout)
        self._logged.append({"objective": total.detach(), **values})
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step, and refuse what would spoil the weights and the next checkpoint.

        All processes agree on it, in one exchange: one that stopped alone would leave the others
        waiting.
        """
        means = [torch.stack([each[name] for each in self._logged]) for name in self._logged[0]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        numbers = torch.stack([*(each.mean() for each in means), norm.to(self.device)])
        numbers = self.trainer.strategy.reduce(numbers, reduce_op="mean")
        values = dict(zip([*self._logged[0], "norm"], numbers, strict=True))
        self._logged = []
        self._check_finite(numbers, values)
        norm = values.pop("norm")
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")

    def _check_finite(self, numbers: Tensor, values: dict[str, Tensor]) -> None:
        if numbers.isfinite().all():
            return
        if not values["objective"].isfinite():
            raise NonFiniteLossError(f"the loss is {values['objective'].item()} {self._cure()}")
        # A loss scaler (16-mixed) meets such gradients on its way and skips their step.
        if self.trainer.precision != "16-mixed":
            raise NonFiniteLossError(f"the gradient norm is {values['norm'].item()} {self._cure()}")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """DiT's loss, without distillation or label dropout, on fixed noise and timesteps."""
        self._evaluate(batch, batch_idx, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the means over all images and processes."""
        self._log_means("val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """DiT's loss, without distillation or label dropout, on fixed noise and timesteps."""
        self._evaluate(batch, batch_idx, "test")

    def on_test_epoch_end(self) -> None:
        """Log the means over all images and processes."""
        self._log_means("test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, stage: str) -> None:
        x_0, labels = batch
        count = len(x_0)
        if not count:  # another process has the last batch; sharded weights need all of them
            x_0, labels = x_0.new_zeros(1, *x_0.shape[1:]), labels.new_zeros(1)
        number = batch_idx * self.trainer.world_size + self.global_rank
        generator = generator_for(self.seed, stage, number, device=self.device)
        _, values = self._loss(x_0, labels, self._draw(x_0, generator), label_dropout=0.0)
        row = torch.stack([torch.ones_like(values["loss"]), *(values[n] for n in self._scores)])
        self._evaluated.append(row * count)

    @property
    def _scores(self) -> tuple[str, ...]:
        return ("loss", "mse", "vb", *("teacher" for _ in self._teacher))

    def _log_means(self, stage: str) -> None:
        # Not by Lightning's mean over processes, which rounds the number of images per process.
        nothing = torch.zeros(1 + len(self._scores), device=self.device)
        sums = torch.stack([nothing, *self._evaluated]).sum(dim=0)
        self._evaluated = []
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        if sums[0] == 0:
            return
        for name, value in zip(self._scores, sums[1:], strict=True):
            self.log(f"{stage}/{name}", value / sums[0], prog_bar=True)

    def _draw(
        self, x_0: Tensor, generator: torch.Generator, slot: int = 0, slots: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps (N,), noise like x_0 and uniform numbers (N,) of the step's ``slot``-th part.

        The numbers of the whole step are drawn, so that they do not depend on who draws which.
        """
        count = x_0.shape[0]
        draw: dict[str, Any] = {"generator": generator, "device": x_0.device}
        t = torch.randint(0, self.schedule.steps, (slots * count,), **draw)
        noise = torch.randn((slots * count, *x_0.shape[1:]), **draw)
        uniform = torch.rand(slots * count, **draw)
        rows = slice(slot * count, (slot + 1) * count)
        return t[rows], noise[rows], uniform[rows]

    def _loss(
        self,
        x_0: Tensor,
        labels: Tensor,
        draws: tuple[Tensor, Tensor, Tensor],
        label_dropout: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t, noise, uniform = draws
        y: Tensor | None = None
        if self.network.num_classes:
            y = labels
            if label_dropout:
                y = torch.where(uniform < label_dropout, self.network.null_class, labels)
        x_t = self.schedule.add_noise(x_0, noise, t)
        output = self(x_t, t, y)
        loss = diffusion_loss(output, x_0, x_t, noise, t, self.schedule)
        total = loss.total.mean()
        logged = {"mse": loss.mse.mean().detach(), "vb": loss.vb.mean().detach()}
        logged["loss"] = logged["mse"] + logged["vb"]
        for teacher in self._teacher:
            channels = x_0.shape[1]
            with torch.no_grad():
                target = teacher(x_t, t, y)[:, :channels].float()
            distance = (output[:, :channels].float() - target).square().mean()
            total = total + self.distillation * distance
            logged["teacher"] = distance.detach()
        return total, logged

    def _cure(self) -> str:
        return (
            f"at step {self.global_step}; lower the learning rates (model.optimizer), lengthen the "
            "warm-up or clip gradients (trainer.gradient_clip_val); the last checkpoint is from "
            "before this step"
        )

    def _slot(self, batch_idx: int) -> int:
        """Which part of the optimizer step's batch this one is, as ``StepBatchSampler`` deals."""
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        return micro_batch * self.trainer.world_size + self.global_rank

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a learning rate per kind of parameter, warm-up and decay by step."""
        config, steps = self.optimizer_config, self.trainer.max_steps
        if steps < 0:
            raise ValueError(
                f"trainer.max_steps={steps}: dit_qat counts optimizer steps, not epochs; "
                "set trainer.max_steps"
            )
        optimizer = torch.optim.AdamW(
            parameter_groups(self.network, config),
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, steps, config)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def _rules(method: Method, float_layers: list[str]) -> QuantConfig:
    # Where a file of bits was not read, a checkpoint is to bring them.
    config = (method.without_file() if isinstance(method, AMPN) else method).quant_config()
    return replace(config, rules=(*config.rules, *(Rule(pattern) for pattern in float_layers)))
