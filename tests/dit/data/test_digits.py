import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from dit_qat.dit.data import Digits, digit_images
from dit_qat.dit.models import DiT


class Probe(pl.LightningModule):
    """A linear classifier that notes the labels of every batch it is trained on."""

    def __init__(self, seed=3):
        super().__init__()
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(64, 10)
        self.seen = []
        self.global_states = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append(labels)
        self.global_states.append(torch.get_rng_state())
        return F.cross_entropy(self.linear(images.flatten(1)), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Unseeded(pl.LightningModule):
    pass


def make_trainer(max_steps, accumulate=1, **options):
    return pl.Trainer(
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def train(max_steps, accumulate=1, checkpoint=None, data=None):
    trainer, module = make_trainer(max_steps, accumulate), Probe()
    trainer.fit(module, data or Digits(batch_size=50), ckpt_path=checkpoint)
    return trainer, module


def test_images_are_the_seventeen_levels_between_minus_one_and_one():
    images, labels = digit_images()
    assert images.shape == (1797, *Digits.image_shape)
    assert images.dtype == torch.float32
    assert torch.equal(images.unique(), torch.arange(17) / 8 - 1)
    assert labels.shape == (1797,)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(Digits.num_classes))


def test_validation_and_test_batches_are_all_images_in_order():
    images, labels = digit_images()
    for loader in (Digits().val_dataloader(), Digits().test_dataloader()):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(isinstance(batch, tuple) for batch in batches)
        assert torch.equal(torch.cat([batch[0] for batch in batches]), images)
        assert torch.equal(torch.cat([batch[1] for batch in batches]), labels)


def test_an_epoch_of_training_batches_holds_every_image_once():
    _, module = train(max_steps=3, data=Digits(batch_size=599))
    assert torch.equal(torch.cat(module.seen).sort().values, digit_images()[1].sort().values)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("first_run", [4, 10], ids=["finished", "interrupted"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, accumulate, first_run):
    class StopAtFour(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 4 and not (tmp_path / "half.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    trainer = make_trainer(first_run, accumulate, callbacks=[StopAtFour()], min_steps=4)
    trainer.fit(Probe(), Digits(batch_size=50))
    _, resumed = train(10, accumulate, checkpoint=tmp_path / "half.ckpt")
    _, straight = train(10, accumulate)
    assert len(straight.seen) == 10 * accumulate
    assert torch.equal(torch.cat(resumed.seen), torch.cat(straight.seen[4 * accumulate :]))
    assert torch.equal(resumed.linear.weight, straight.linear.weight)


def test_the_seed_of_the_data_overrides_the_seed_of_the_run():
    _, by_run = train(1, data=Digits(batch_size=50))
    _, by_data = train(1, data=Digits(batch_size=50, seed=3))
    _, other = train(1, data=Digits(batch_size=50, seed=4))
    assert torch.equal(by_run.seen[0], by_data.seen[0])
    assert not torch.equal(by_run.seen[0], other.seen[0])


def test_loaders_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    _, module = train(2)
    next(iter(Digits().val_dataloader()))
    assert all(torch.equal(state, before) for state in module.global_states)
    assert torch.equal(torch.get_rng_state(), before)


def test_worker_processes_serve_the_same_batches():
    _, here = train(2)
    _, there = train(2, data=Digits(batch_size=50, num_workers=1))
    assert torch.equal(torch.cat(here.seen), torch.cat(there.seen))


def test_a_run_without_max_steps_is_refused():
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        trainer.fit(Probe(), Digits())


def test_a_module_without_a_seed_is_refused():
    data, trainer = Digits(), make_trainer(1)
    data.trainer, trainer.strategy._lightning_module = trainer, Unseeded()
    with pytest.raises(ValueError, match=r"Unseeded .*Digits\(seed="):
        data.train_dataloader()


def test_processes_share_the_batch_of_one(monkeypatch):
    def batches(rank, world_size):
        data, trainer = Digits(batch_size=30, seed=0), make_trainer(3)
        data.trainer = trainer
        monkeypatch.setattr(pl.Trainer, "world_size", world_size)
        monkeypatch.setattr(pl.Trainer, "global_rank", rank)
        return list(data.train_dataloader())

    whole = batches(0, 1)
    shares = [batches(rank, 3) for rank in range(3)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), labels)


def test_processes_that_do_not_divide_the_batch_are_refused(monkeypatch):
    data, trainer = Digits(batch_size=50, seed=0), make_trainer(1)
    data.trainer = trainer
    monkeypatch.setattr(pl.Trainer, "world_size", 3)
    with pytest.raises(ValueError, match=r"batch_size=50 .* 3 processes .* multiple of 3"):
        data.train_dataloader()


def test_a_network_that_does_not_fit_is_refused():
    tiny = {"hidden_size": 8, "depth": 1, "num_heads": 1}
    with pytest.raises(ValueError, match=r"set its in_channels and input_size"):
        Digits().check_network(DiT(32, 2, 4, num_classes=10, **tiny))
    with pytest.raises(ValueError, match="num_classes=9"):
        Digits().check_network(DiT(8, 2, 1, num_classes=9, **tiny))
    Digits().check_network(DiT(8, 2, 1, num_classes=0, **tiny))


def test_training_batches_without_a_trainer_are_refused():
    with pytest.raises(RuntimeError, match="Digits has no trainer"):
        Digits().train_dataloader()


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"num_workers": -1}])
def test_impossible_arguments_are_named(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Digits(**arguments)
