import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from dit_qat.dit.data.caching import write_cache
from dit_qat.dit.data.latents import LatentCache, Latents
from dit_qat.dit.data.sampler import Draw, StepBatchSampler
from dit_qat.dit.data.shards import (
    DamagedShardError,
    Index,
    Settings,
    ShardFile,
    read_index,
    shard_name,
    write_index,
    write_shard,
)
from dit_qat.dit.data.sources import Folder
from dit_qat.dit.models.autoencoder import LatentSpace

SPACE = LatentSpace("synthetic", "ab" * 32, 0.5, 0.25, 2, 2)


def write_synthetic(root, log_variance, images=12, classes=4, space=SPACE):
    """A cache whose means say which image and mirror they are of: ``image + mirror / 2``."""
    source = {"kind": "test", "num_images": images, "num_classes": classes, "sha256": "cd"}
    settings = Settings(space, 8, "adm-center", "float32", 5, source)
    shards = []
    for number, first in enumerate(range(0, images, 5)):
        count = min(5, images - first)
        moments = torch.zeros(count, *settings.image_shape)
        moments[:, :, 0] += torch.arange(first, first + count)[:, None, None, None, None]
        moments[:, 1, 0] += 0.5
        moments[:, :, 1] = log_variance
        labels = torch.arange(first, first + count) % max(classes, 1)
        shard = write_shard(root / shard_name(number), moments, labels, settings, [])
        shards.append(replace(shard, first=first))
    write_index(root, Index(settings, tuple(shards)))
    return root


@pytest.fixture
def certain(tmp_path):
    """A cache without variance: a latent is the mean."""
    return write_synthetic(tmp_path / "certain", log_variance=-60.0)


@pytest.fixture
def uncertain(tmp_path):
    return write_synthetic(tmp_path / "uncertain", log_variance=2 * np.log(3.0))


def drawn_from(latents):
    """The images and mirrors that latents without variance are of."""
    means = latents.mean((1, 2, 3)) / SPACE.scaling_factor + SPACE.shift_factor
    return means.floor().int().tolist(), (means % 1 == 0.5).int().tolist()


def test_latents_are_of_the_images_asked_for_and_scaled(certain):
    dataset = Latents(str(certain), seed=0).train_dataset()
    asked = [11, 0, 4, 5, 9, 10, 3, 3]
    latents, labels = dataset[Draw(asked, 0)]
    assert latents.shape == (8, 2, 4, 4)
    assert latents.dtype == torch.float32
    assert drawn_from(latents)[0] == asked
    assert labels.tolist() == [image % 4 for image in asked]


def test_both_mirrors_are_drawn_about_equally_often(certain):
    dataset = Latents(str(certain), seed=0).train_dataset()
    mirrors = drawn_from(dataset[Draw([7] * 400, 0)][0])[1]
    assert 150 < sum(mirrors) < 250


def test_latents_have_the_mean_and_spread_of_the_posterior(uncertain):
    dataset = Latents(str(uncertain), seed=0).train_dataset()
    latents = dataset[Draw([6] * 2000, 0)][0]
    # A mean of 6 or 6.5 and a standard deviation of 3, then minus 0.25 and times 0.5.
    assert latents.mean().item() == pytest.approx((6.25 - 0.25) * 0.5, abs=0.03)
    assert latents.std().item() == pytest.approx(0.5 * np.hypot(3, 0.25), abs=0.02)
    pixels = latents.flatten(1)
    correlation = np.corrcoef(pixels[:, 0], pixels[:, 1])[0, 1]
    assert abs(correlation) < 0.1


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 39])
@pytest.mark.parametrize("first", [0, 5, 160])
def test_a_latent_depends_on_its_place_and_not_on_its_batch(uncertain, first, cut):
    dataset = Latents(str(uncertain), seed=0).train_dataset()
    indices = [index % 12 for index in range(40)]
    whole, labels = dataset[Draw(indices, first)]
    parts = [dataset[Draw(indices[:cut], first)], dataset[Draw(indices[cut:], first + cut)]]
    assert torch.equal(torch.cat([latents for latents, _ in parts]), whole)
    assert torch.equal(torch.cat([found for _, found in parts]), labels)


def test_places_and_seeds_give_other_latents(uncertain):
    dataset = Latents(str(uncertain), seed=0).train_dataset()
    latents = dataset[Draw([3] * 50, 0)][0].flatten(1)
    assert (torch.cdist(latents, latents) + torch.eye(50)).min() > 0.1
    other = Latents(str(uncertain), seed=1).train_dataset()[Draw([3] * 50, 0)][0]
    assert not torch.equal(other.flatten(1), latents)


@pytest.mark.parametrize(("world", "accumulated"), [(2, 1), (1, 2), (2, 2)])
def test_processes_and_micro_batches_see_the_latents_of_one_process(uncertain, world, accumulated):
    dataset = Latents(str(uncertain), seed=0).train_dataset()

    def steps(rank, world, accumulated):
        sampler = StepBatchSampler(12, 8, 0, 0, 5, rank, world, accumulated)
        return [dataset[draw][0] for draw in sampler]

    alone = torch.cat(steps(0, 1, 1))
    ranks = [steps(rank, world, accumulated) for rank in range(world)]
    shared = torch.cat([batch for turn in zip(*ranks, strict=True) for batch in turn])
    assert torch.equal(shared, alone)


def test_loader_processes_change_nothing(cached):
    def batches(workers):
        data = Latents(str(cached), batch_size=6, seed=0, num_workers=workers)
        data.trainer = pl.Trainer(max_steps=4, logger=False, accelerator="cpu")
        return list(data.train_dataloader())

    for one, other in zip(batches(0), batches(2), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_validation_is_the_scaled_mean_of_fixed_images(uncertain):
    first = Latents(str(uncertain), seed=0, validation_images=5).validation_dataset()
    again = Latents(str(uncertain), seed=1, validation_images=5).validation_dataset()
    assert len(first) == 5
    latents, labels = first[Draw([0, 1, 2, 3, 4], 0)]
    assert torch.equal(latents, again[Draw([0, 1, 2, 3, 4], 99)][0])
    images, mirrors = drawn_from(latents)
    assert len(set(images)) == 5
    assert mirrors == [0] * 5
    assert labels.tolist() == [image % 4 for image in images]
    assert len(Latents(str(uncertain), seed=0).validation_dataset()) == 12
    assert len(Latents(str(uncertain), seed=0, validation_images=0).validation_dataset()) == 0


def test_validation_may_have_a_cache_of_its_own(certain, tmp_path):
    other = write_synthetic(tmp_path / "other", -60.0, images=3)
    data = Latents(str(certain), val_root=str(other), seed=0)
    latents, _ = data.validation_dataset()[Draw([0, 1, 2], 0)]
    assert sorted(drawn_from(latents)[0]) == [0, 1, 2]
    space = replace(SPACE, sha256="ef" * 32)
    wrong = write_synthetic(tmp_path / "wrong", -60.0, images=3, space=space)
    with pytest.raises(ValueError, match=r"another autoencoder or size .*sha256"):
        Latents(str(certain), val_root=str(wrong), seed=0).validation_dataset()


def test_float16_moments_come_out_as_they_were_encoded(cached):
    cache = LatentCache(cached)
    stored = np.concatenate([ShardFile(cached / s.name).moments for s in cache.index.shards])
    found = cache.moments([13, 0, 7], [1, 0, 1])
    assert found.dtype == torch.float32
    assert (found.numpy() == stored[[13, 0, 7], [1, 0, 1]]).all()


@pytest.mark.parametrize("harm", ["missing", "short", "swapped"])
def test_a_damaged_shard_is_named_and_skipped_on_request_only(certain, harm):
    path = certain / shard_name(1)
    match harm:
        case "missing":
            path.unlink()
        case "short":
            path.write_bytes(path.read_bytes()[:-7])
        case "swapped":
            path.write_bytes((certain / shard_name(2)).read_bytes())
    data = Latents(str(certain), seed=0)
    with pytest.raises(DamagedShardError, match=r"moments-00001\..*cache-latents.*skip_damaged"):
        data.train_dataset()
    skipping = Latents(str(certain), seed=0, skip_damaged=True)
    with pytest.warns(UserWarning, match=r"moments-00001.* 5 of 12 images are left out"):
        dataset = skipping.train_dataset()
    images, _ = drawn_from(dataset[Draw(list(range(len(dataset))), 0)][0])
    assert images == [0, 1, 2, 3, 4, 10, 11]


def test_a_flipped_bit_is_found_when_verifying(certain):
    path = certain / shard_name(2)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert len(LatentCache(certain)) == 12
    with pytest.raises(DamagedShardError, match="its sha256"):
        LatentCache(certain, verify=True)
    with pytest.warns(UserWarning, match="2 of 12 images"):
        assert len(LatentCache(certain, skip_damaged=True, verify=True)) == 10


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_a_cache_of_which_nothing_is_left_is_refused(certain):
    for path in certain.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="no image is left"):
        LatentCache(certain, skip_damaged=True)


def test_an_unfinished_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="an unfinished one"):
        Latents(str(tmp_path), seed=0).train_dataset()


def test_a_network_that_fits_is_accepted(certain, make_dit):
    data = Latents(str(certain), seed=0)
    data.check_network(make_dit(num_classes=4))
    data.check_network(make_dit(num_classes=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 4}, r"are \(2, 4, 4\), the network takes \(4, 4, 4\).*in_channels=2"),
        ({"input_size": 8}, r"are \(2, 4, 4\), the network takes \(2, 8, 8\).*input_size=4"),
        ({"num_classes": 3}, "labels up to 3, the network num_classes=3; set that to at least 4"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(certain, make_dit, arguments, message):
    with pytest.raises(ValueError, match=message):
        Latents(str(certain), seed=0).check_network(make_dit(**arguments))


def test_a_conditional_network_needs_labels(tmp_path, make_dit, make_job, class_folders, alone):
    write_cache(tmp_path, make_job(pictures=Folder(class_folders)), alone)
    data = Latents(str(tmp_path), seed=0)
    shape = {"in_channels": 4, "input_size": 8}
    with pytest.raises(ValueError, match=r"no labels, .* set its num_classes: 0"):
        data.check_network(make_dit(**shape))
    data.check_network(make_dit(num_classes=0, **shape))
    assert data.train_dataset()[Draw([0, 13], 0)][1].tolist() == [0, 0]


def test_the_state_says_what_the_latents_mean(certain):
    state = Latents(str(certain), seed=0).state_dict()
    assert state["latent_space"] == asdict(SPACE)
    assert (state["image_size"], state["num_images"]) == (8, 12)


def test_another_latent_space_is_refused_on_resume(certain, tmp_path):
    state = Latents(str(certain), seed=0).state_dict()
    for name, value in {"sha256": "ef" * 32, "scaling_factor": 0.13025}.items():
        space = replace(SPACE, source="another", **{name: value})
        other = write_synthetic(tmp_path / name, -60.0, space=space)
        with pytest.raises(ValueError, match=f"of synthetic, .* of another .*{name}"):
            Latents(str(other), seed=0).load_state_dict(state)


def test_a_moved_cache_continues_and_other_images_are_told(certain, tmp_path, recwarn):
    state = Latents(str(certain), seed=0).state_dict()
    moved = shutil.copytree(certain, tmp_path / "moved")
    Latents(str(moved), seed=0).load_state_dict(state)
    assert not recwarn.list
    other = write_synthetic(tmp_path / "other", -60.0, images=11)
    with pytest.warns(UserWarning, match="other images"):
        Latents(str(other), seed=0).load_state_dict(state)


class Probe(pl.LightningModule):
    """Learns one number, and notes the latents that it is shown."""

    seed = 3

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        latents, _ = batch
        self.seen.append(latents)
        return (self.factor * latents - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, steps, checkpoint=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        enable_checkpointing=False,
        limit_val_batches=0,
        **quiet,
        **options,
    )
    probe = Probe()
    trainer.fit(probe, data, ckpt_path=checkpoint)
    return trainer, probe


def test_a_checkpoint_holds_the_latent_space_and_resumes_on_it_alone(uncertain, tmp_path, make_dit):
    trainer, _ = fit(Latents(str(uncertain), batch_size=5), 3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    content = torch.load(tmp_path / "three.ckpt", weights_only=True)
    assert content["Latents"]["latent_space"] == asdict(SPACE)
    _, straight = fit(Latents(str(uncertain), batch_size=5), 6)
    _, resumed = fit(Latents(str(uncertain), batch_size=5), 6, tmp_path / "three.ckpt")
    assert torch.equal(torch.stack(resumed.seen), torch.stack(straight.seen[3:]))
    other = write_synthetic(tmp_path / "other", 0.0, space=replace(SPACE, shift_factor=0.0))
    with pytest.raises(ValueError, match="shift_factor"):
        fit(Latents(str(other), batch_size=5), 6, tmp_path / "three.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"validation_images": -1}, "validation_images=-1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Latents("nowhere", **options)


def test_labels_and_counts_are_those_of_the_index(cached):
    cache = LatentCache(cached)
    assert len(cache) == len(cache.labels) == read_index(cached).num_images == 14
