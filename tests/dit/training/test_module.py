"""The training module: what it builds, what it keeps, what it refuses."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dit_qat.dit.data import digit_images
from dit_qat.dit.diffusion import NoiseSchedule
from dit_qat.dit.methods import BitNetV2, MinMax, RobuQ
from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.training import (
    EMA,
    Checkpoints,
    DiTTraining,
    NonFiniteLossError,
    OptimizerConfig,
    last_checkpoint,
)
from dit_qat.dit.training.loading import load_checkpoint
from dit_qat.dit.training.specs import restore, spec_of
from dit_qat.layers import QuantAttention, QuantLinear

Make = Callable[..., DiTTraining]
Fit = Callable[..., pl.Trainer]


def quantized_names(network: DiT) -> set[str]:
    return {name for name, module in network.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("method", [RobuQ(rank=2), MinMax(rank=2), BitNetV2()])
def test_methods_quantize_the_blocks_and_nothing_else(make_module: Make, method: Any) -> None:
    network = make_module(method).network
    linears = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"}
    assert quantized_names(network) == {f"blocks.0.{name}" for name in linears}
    assert isinstance(network.blocks[0].attn, QuantAttention)


def test_float_layers_stay_float(make_module: Make) -> None:
    network = make_module(RobuQ(rank=2), float_layers=["*.mlp.*", "*adaLN*"]).network
    assert quantized_names(network) == {"blocks.0.attn.qkv", "blocks.0.attn.proj"}
    with pytest.raises(
        ValueError, match=r"'\*\.mpl\.\*' matches no module to quantize; near names"
    ):
        make_module(RobuQ(rank=2), float_layers=["*.mpl.*"])


def test_float_part_of_the_network_is_that_of_the_file(make_module: Make, float_file: Path) -> None:
    network, source = make_module(RobuQ(rank=2)).network, load_dit(float_file)
    for name in ("x_embedder.proj", "t_embedder.mlp.0", "final_layer.linear"):
        assert torch.equal(network.get_submodule(name).weight, source.get_submodule(name).weight)
    assert not network.pos_embed.requires_grad


def test_fresh_start_false_reads_no_float_weights(make_module: Make) -> None:
    module = make_module(RobuQ(rank=2), float_weights="nowhere.safetensors", fresh_start=False)
    assert quantized_names(module.network)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_module(RobuQ(rank=2), float_weights="nowhere.safetensors")


def test_float_weights_of_another_architecture_are_refused(float_file: Path) -> None:
    with pytest.raises(ValueError, match="hidden_size=32 in the file, 64 here"):
        DiTTraining(DiT(8, 4, 1, 64, 1, 2, num_classes=10), float_weights=str(float_file))


def test_checkpoint_holds_plain_types_and_reloads_by_itself(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    method = RobuQ(preset="paper", activation_bits=2, rank=2)
    module = make_module(method, distillation=0.5)
    fit(module, tmp_path / "run", 3)
    content = torch.load(last_checkpoint(tmp_path / "run"), weights_only=True)
    json.dumps(content["hyper_parameters"])
    teacher_copies = [key for key in content["state_dict"] if "teacher" in key]
    assert teacher_copies == []
    reloaded = load_checkpoint(last_checkpoint(tmp_path / "run"))
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([5, 500, 999]), torch.tensor([0, 5, 9])
    # After a fit the module holds the averaged weights, as the checkpoint's state dict does.
    assert torch.equal(reloaded(x, t, y), module.eval()(x, t, y))
    current = load_checkpoint(last_checkpoint(tmp_path / "run"), weights="current")
    assert not torch.equal(current(x, t, y), reloaded(x, t, y))
    assert DiTTraining.load_from_checkpoint(last_checkpoint(tmp_path / "run")).seed == module.seed


def test_no_float_weight_outlives_the_quantized_model(make_module: Make) -> None:
    gc.collect()
    older = [tensor for tensor in gc.get_objects() if isinstance(tensor, nn.Parameter)]
    others = {id(tensor) for tensor in older}  # of other tests
    module = make_module(RobuQ(rank=2))
    gc.collect()
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes = {
        tuple(layer.weight.shape) for layer in module.modules() if isinstance(layer, QuantLinear)
    }
    strays = [
        tuple(tensor.shape)
        for tensor in gc.get_objects()
        if isinstance(tensor, nn.Parameter)
        and id(tensor) not in others
        and tuple(tensor.shape) in sizes
        and tensor.device.type == "cpu"
        and tensor.untyped_storage().data_ptr() not in own
    ]
    assert strays == []


def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                module.network.final_layer.linear.bias.data.fill_(torch.nan)

    callbacks = [EMA(0.9), Checkpoints(every_n_steps=5), Poison()]
    with pytest.raises(NonFiniteLossError, match="nan at step 6; lower the learning rates"):
        fit(make_module(RobuQ(rank=2)), tmp_path / "run", 10, callbacks)
    kept = load_checkpoint(last_checkpoint(tmp_path / "run"))
    assert all(p.isfinite().all() for p in kept.parameters())


def test_gradients_that_are_not_finite_stop_the_run_before_the_step(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    class Poison(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
            if trainer.global_step == 3:
                module.network.final_layer.linear.bias.grad.fill_(torch.inf)

    module = make_module(RobuQ(rank=2))
    with pytest.raises(NonFiniteLossError, match="gradient norm is inf at step 3"):
        fit(module, tmp_path / "run", 10, [Checkpoints(every_n_steps=1), Poison()])
    assert all(p.isfinite().all() for p in module.parameters())


def test_distillation_moves_the_student_to_the_teacher(
    tmp_path: Path, make_module: Make, fit: Fit, float_file: Path
) -> None:
    images, labels = digit_images()
    noise = torch.randn(images[:64].shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 999, 64).long()
    x_t = NoiseSchedule().add_noise(images[:64], noise, t)
    target = load_dit(float_file)(x_t, t, labels[:64])[:, :1].detach()

    @torch.no_grad()
    def distance(module: DiTTraining) -> float:
        return float((module(x_t, t, labels[:64])[:, :1] - target).norm())

    gentle = OptimizerConfig(lr_ternary=1e-3, lr_low_rank=1e-3, lr_float=1e-3, warmup_steps=3)
    method = RobuQ(activation_bits=2, rank=2)
    module = make_module(method, distillation=100.0, optimizer=gentle)
    before = distance(module)
    fit(module, tmp_path / "run", 40)
    assert distance(module) < 0.9 * before


def test_distillation_without_a_teacher_is_refused(make_module: Make) -> None:
    with pytest.raises(ValueError, match=r"distillation=0\.5 needs a teacher"):
        make_module(RobuQ(rank=2), float_weights=None, distillation=0.5)


def test_label_dropout_share(make_module: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(None, label_dropout=0.25)
    seen: list[Tensor] = []

    def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return torch.zeros(x.shape[0], 2, 8, 8)

    monkeypatch.setattr(module, "forward", forward)
    images = torch.zeros(4000, 1, 8, 8)
    labels = torch.full((4000,), 3)
    draws = module._draw(images, torch.Generator().manual_seed(0))
    module._loss(images, labels, draws, 0.25)
    dropped = (seen[0] == module.network.null_class).float().mean()
    assert abs(float(dropped) - 0.25) < 0.03
    assert set(seen[0].tolist()) == {3, module.network.null_class}


def test_validation_is_the_same_twice(tmp_path: Path, make_module: Make) -> None:
    from dit_qat.dit.data import Digits

    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    module = make_module(RobuQ(rank=2))
    first, second = (trainer.validate(module, Digits(), verbose=False)[0] for _ in range(2))
    assert first == second
    assert first["val/loss"] == pytest.approx(first["val/mse"] + first["val/vb"])


def test_a_process_without_images_takes_part_and_counts_for_nothing(
    tmp_path: Path, make_module: Make
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    module, calls = make_module(RobuQ(rank=2)), []
    module.network.register_forward_hook(lambda *_: calls.append(1))
    images, labels = (part[:8] for part in digit_images())
    batches = [(images, labels), (images[:0], labels[:0])]
    whole, same = (
        trainer.validate(module, DataLoader(part, batch_size=None), verbose=False)  # type: ignore[arg-type]
        for part in (batches[:1], batches)
    )
    assert same == whole
    assert len(calls) == 3  # where weights are sharded, all processes gather them together


def test_compiled_network_keeps_its_names_and_trains(
    make_module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler's front end, without the minutes of its code generation.
    compile_module = nn.Module.compile
    monkeypatch.setattr(DiT, "compile", lambda self: compile_module(self, backend="aot_eager"))
    plain, compiled = make_module(RobuQ(rank=2)), make_module(RobuQ(rank=2), compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    outputs = [module(x, t, y) for module in (plain, compiled)]
    torch.testing.assert_close(*outputs)
    gradients = []
    for module, output in zip((plain, compiled), outputs, strict=True):
        output.square().mean().backward()
        gradients.append(module.network.blocks[0].mlp.fc2.weight.grad)
    torch.testing.assert_close(*gradients)


def test_specs_are_inverse_and_import_nothing() -> None:
    for value in (RobuQ(rank=3), OptimizerConfig(betas=(0.8, 0.9))):
        spec = spec_of(value)
        again = restore(json.loads(json.dumps(spec)), type(value))
        assert spec_of(again) == spec
    foreign: Any = {"class_path": "os.system", "init_args": {"command": "true"}}
    with pytest.raises(ValueError, match=r"os\.system"):
        restore(foreign, DiT)
    with pytest.raises(ValueError, match="import its module"):
        restore({"class_path": "antigravity.Joke", "init_args": {}}, DiT)  # type: ignore[arg-type]


def test_steps_must_be_counted(tmp_path: Path, make_module: Make, fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        fit(make_module(), tmp_path, -1)
