import errno
import json
import shutil
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from dit_qat.dit.evaluation import load_images
from dit_qat.dit.models.autoencoder import Autoencoder
from dit_qat.dit.processes import Processes
from dit_qat.dit.sampling import SamplerConfig, ShardStore, sample_images, to_uint8
from dit_qat.dit.sampling.run import Drawn, SamplingJob, draw_into
from dit_qat.export.files import locked

ALONE = Processes(0, 1, torch.device("cpu"))
SAMPLER = SamplerConfig(steps=2, batch_size=4)
ORIGIN = {"source": "random", "weights": "float"}


@dataclass(frozen=True)
class Threads(Processes):
    """A process of several that are threads here."""

    barrier_: threading.Barrier = None
    board: dict = None

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier_.wait()
        values = [self.board[rank] for rank in range(self.world_size)]
        self.barrier_.wait()
        return values


def in_threads(count, act):
    """What ``act(processes)`` returns or raises on each of so many processes."""
    barrier, board = threading.Barrier(count, timeout=300), {}

    def one(rank):
        return act(Threads(rank, count, torch.device("cpu"), barrier_=barrier, board=board))

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(one, rank) for rank in range(count)]
        return [future.exception() or future.result() for future in futures]


class StoppedError(Exception):
    pass


@pytest.fixture
def make_job(make_network):
    def make(**changed):
        options = {"num": 10, "label_of": lambda index: index % 3, "npz": True}
        options |= {"network": make_network(), "sampler": SAMPLER}
        return SamplingJob(**(options | changed))

    return make


@pytest.fixture
def calls(monkeypatch):
    """First indices of the shards that are written."""
    written, write = [], ShardStore.write

    def spy(self, first, array):
        write(self, first, array)
        written.append(first)

    monkeypatch.setattr(ShardStore, "write", spy)
    return written


@pytest.fixture
def whole(make_job, tmp_path):
    """The folder of a run that nothing interrupted."""
    out = tmp_path / "whole"
    draw_into(out, make_job(), ORIGIN, ALONE)
    return out


def interrupted_after(shards, job):
    """The job, with a network that breaks off after so many batches."""
    forward, count = job.network.forward, [0]

    def counting(*args, **kwargs):
        count[0] += 1
        if count[0] > shards * SAMPLER.steps:
            raise StoppedError
        return forward(*args, **kwargs)

    job.network.forward = counting
    return job


def contents(out):
    """What must not depend on how a folder was filled."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("metrics.json", ".lock")
    }


def test_a_folder_holds_what_sample_images_draws(whole, make_network):
    drawn = torch.cat([i for _, i in sample_images(make_network(), SAMPLER, range(10))])
    with np.load(whole / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], to_uint8(drawn).permute(0, 2, 3, 1).numpy())
        assert archive["arr_1"].tolist() == [i % 3 for i in range(10)]
    assert torch.equal(load_images(whole / "images"), to_uint8(drawn))
    names = {".lock", "images", "grid.png", "samples.npz", "sampling.json", "metrics.json"}
    assert {path.name for path in whole.iterdir()} == names
    metrics = json.loads((whole / "metrics.json").read_text())
    record = json.loads((whole / "sampling.json").read_text())
    assert record.items() <= metrics.items()
    assert record["threads"] == 1
    assert metrics["labels"] == [i % 3 for i in range(10)]
    assert metrics["images_per_second"] > 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_processes_leaves_the_same_bytes(make_job, whole, tmp_path, count):
    out = tmp_path / "shared"
    jobs = [make_job() for _ in range(count)]
    results = in_threads(count, lambda p: draw_into(out, jobs[p.rank], ORIGIN, p))
    assert [(each.found, each.drawn) for each in results] == [(0, 10)] * count
    assert contents(out) == contents(whole)
    assert json.loads((out / "metrics.json").read_text())["processes"] == count


def test_shards_are_dealt_out_in_turn(make_job, tmp_path, monkeypatch):
    written, write = {}, ShardStore.write

    def spy(self, first, array):
        written.setdefault(threading.get_ident(), []).append(first)
        write(self, first, array)

    monkeypatch.setattr(ShardStore, "write", spy)
    jobs = [make_job(num=20) for _ in range(2)]
    in_threads(2, lambda p: draw_into(tmp_path, jobs[p.rank], ORIGIN, p))
    assert sorted(written.values()) == [[0, 8, 16], [4, 12]]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("done", [1, 2])
def test_a_run_goes_on_where_it_was_interrupted(make_job, whole, tmp_path, calls, count, done):
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        draw_into(out, interrupted_after(done, make_job()), ORIGIN, ALONE)
    assert len(list((out / "shards").iterdir())) == done
    assert not (out / "metrics.json").exists()
    calls.clear()
    jobs = [make_job() for _ in range(count)]
    results = in_threads(count, lambda p: draw_into(out, jobs[p.rank], ORIGIN, p))
    assert [(each.found, each.drawn) for each in results] == [(4 * done, 10 - 4 * done)] * count
    assert sorted(calls) == list(range(4 * done, 10, 4))
    assert contents(out) == contents(whole)


def test_damage_is_drawn_again_and_lost_pictures_come_from_their_shard(
    make_job, whole, tmp_path, calls, caplog
):
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        draw_into(out, interrupted_after(2, make_job()), ORIGIN, ALONE)
    shard = out / "shards" / "00000000.npz"
    shard.write_bytes(shard.read_bytes()[:-100])
    (out / "images" / "000005.png").unlink()
    calls.clear()
    assert draw_into(out, make_job(), ORIGIN, ALONE).drawn == 6
    assert calls == [0, 8]
    assert "00000000.npz is damaged" in caplog.text
    assert contents(out) == contents(whole)


def test_a_finished_run_draws_nothing_and_tidies_up(make_job, whole, calls):
    before = contents(whole)
    store = make_job().store(whole)
    store.write(0, np.zeros((4, 8, 8, 1), np.uint8))  # what a kill at the very end leaves
    calls.clear()
    assert draw_into(whole, make_job(), ORIGIN, ALONE) == Drawn(10, 0, 0.0)
    assert (calls, contents(whole)) == ([], before)


def test_shards_stay_where_nothing_else_holds_the_images(make_job, whole, tmp_path, calls):
    out = tmp_path / "out"
    job = make_job(png=False, npz=False)
    draw_into(out, job, ORIGIN, ALONE)
    assert not (out / "images").exists()
    drawn = [np.load(path)["arr_0"] for path in sorted((out / "shards").iterdir())]
    assert np.array_equal(np.concatenate(drawn), np.load(whole / "samples.npz")["arr_0"])
    calls.clear()
    assert draw_into(out, job, ORIGIN, ALONE).drawn == 0
    (out / "shards" / "00000004.npz").unlink()
    assert draw_into(out, job, ORIGIN, ALONE).drawn == 4
    # The other forms can be made of them later.
    calls.clear()
    draw_into(out, make_job(), ORIGIN, ALONE)
    assert calls == []
    assert contents(out) == contents(whole)


def test_latents_come_as_they_are(make_job, make_network, tmp_path):
    drawn = torch.cat([i for _, i in sample_images(make_network(), SAMPLER, range(10))])
    draw_into(tmp_path, make_job(latents=True, npz=False), ORIGIN, ALONE)
    with np.load(tmp_path / "latents.npz") as archive:
        assert archive["arr_0"].tobytes() == drawn.numpy().tobytes()
    assert not (tmp_path / "grid.png").exists()
    assert not (tmp_path / "shards").exists()


def test_latents_are_decoded_in_batches_of_one_size(make_job, make_vae, tmp_path, calls):
    autoencoder = Autoencoder(make_vae(latent_channels=1), "tiny")
    job = make_job(autoencoder=autoencoder, decode_batch_size=3)
    drawn = torch.cat([i for _, i in sample_images(job.network, SAMPLER, range(10))])
    draw_into(tmp_path / "one", job, ORIGIN, ALONE)
    images = np.load(tmp_path / "one" / "samples.npz")["arr_0"]
    assert images.shape == (10, 16, 16, 3)
    for first in (0, 4, 8):  # by compute batch, as any process would
        expected = to_uint8(autoencoder.decode(drawn[first : first + 4], 3))
        shown = torch.from_numpy(images[first : first + 4]).permute(0, 3, 1, 2)
        assert torch.equal(shown, expected[: len(shown)])
    jobs = [make_job(autoencoder=autoencoder, decode_batch_size=3) for _ in range(2)]
    in_threads(2, lambda p: draw_into(tmp_path / "two", jobs[p.rank], ORIGIN, p))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_number_of_threads_is_fixed_and_given_back(make_job, whole, tmp_path):
    torch.set_num_threads(2)
    try:
        draw_into(tmp_path / "out", make_job(), ORIGIN, ALONE)
        assert torch.get_num_threads() == 2
        assert contents(tmp_path / "out") == contents(whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_call_of_a_compiled_network_is_compiled(make_job, tmp_path, monkeypatch, guidance):
    called = []

    def compile_(forward, dynamic):
        assert dynamic is False
        return lambda *args: called.append(args[0].shape[0]) or forward(*args)

    monkeypatch.setattr(torch, "compile", compile_)
    sampler = replace(SAMPLER, guidance=guidance)
    draw_into(tmp_path, make_job(compiled=True, sampler=sampler), ORIGIN, ALONE)
    assert called == [4 if guidance == 1 else 8] * 6


class TestFailures:
    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"num": 9}, "num_samples: 10 there, 9 here"),
            ({"sampler": replace(SAMPLER, seed=1)}, "sampler.seed: 0 there, 1 here"),
            ({"label_of": lambda index: 0}, "labels_sha256"),
            ({"compiled": True}, "compile: false there, true here"),
            ({"threads": 2}, "threads: 1 there, 2 here"),
        ],
    )
    def test_other_settings(self, make_job, whole, changed, named):
        before = contents(whole)
        with pytest.raises(FileExistsError, match=named):
            draw_into(whole, make_job(**changed), ORIGIN, ALONE)
        assert contents(whole) == before

    def test_other_weights_unless_overwritten(self, make_job, make_network, whole):
        before = contents(whole)
        network = make_network(timestep_shift=1)
        with pytest.raises(FileExistsError, match="weights_sha256"):
            draw_into(whole, make_job(network=network), ORIGIN, ALONE)
        assert contents(whole) == before
        draw_into(whole, make_job(network=network), ORIGIN, ALONE, overwrite=True)
        assert draw_into(whole, make_job(network=network), ORIGIN, ALONE).drawn == 0
        assert contents(whole).keys() == before.keys()

    def test_a_folder_that_is_being_written(self, make_job, tmp_path, calls):
        with locked(tmp_path), pytest.raises(BlockingIOError, match="another run is writing"):
            draw_into(tmp_path, make_job(), ORIGIN, ALONE, overwrite=True)
        assert calls == []
        assert draw_into(tmp_path, make_job(), ORIGIN, ALONE).drawn == 10

    def test_too_little_space_is_said_before_the_work(self, make_job, tmp_path, calls, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
        with pytest.raises(OSError, match=r"at least 0\.00 GB more"):
            draw_into(tmp_path, make_job(), ORIGIN, ALONE)  # 2 * 640 bytes
        assert calls == []
        assert draw_into(tmp_path, make_job(npz=False), ORIGIN, ALONE).drawn == 10

    def test_no_space_on_the_way(self, make_job, whole, tmp_path, monkeypatch):
        out, write, written = tmp_path / "out", ShardStore.write, []

        def full(self, first, array):
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(first)
            write(self, first, array)

        with monkeypatch.context() as context:
            context.setattr(ShardStore, "write", full)
            with pytest.raises(OSError, match=r"No space left.*what is finished stays"):
                draw_into(out, make_job(), ORIGIN, ALONE)
        assert draw_into(out, make_job(), ORIGIN, ALONE).found == 8
        assert contents(out) == contents(whole)

    def test_one_process_fails_and_all_say_so(self, make_job, whole, tmp_path):
        jobs = [make_job(num=20) for _ in range(2)]
        interrupted_after(1, jobs[1])
        out = tmp_path / "out"
        results = in_threads(2, lambda p: draw_into(out, jobs[p.rank], ORIGIN, p))
        assert isinstance(results[1], StoppedError)
        assert isinstance(results[0], ValueError)
        assert "process 1 failed" in str(results[0])
        # The other one has done its share.
        shards = sorted(path.stem for path in (out / "shards").iterdir())
        assert shards == ["00000000", "00000004", "00000008", "00000016"]
        assert draw_into(out, make_job(num=20), ORIGIN, ALONE).drawn == 4

    def test_processes_that_would_draw_differently(self, make_job, tmp_path):
        results = in_threads(
            2,
            lambda p: draw_into(tmp_path / "out", make_job(), ORIGIN | {"step": p.rank}, p),
        )
        for result in results:
            assert "step: 0 process 0, 1 process 1" in str(result)
        assert not (tmp_path / "out").exists()

    def test_a_process_that_outlived_its_run(self, make_job, tmp_path):
        job = make_job()
        forward = job.network.forward

        def overtaken(*args):
            (tmp_path / "sampling.json").write_text(json.dumps({"another": "run"}))
            return forward(*args)

        job.network.forward = overtaken
        with pytest.raises(ValueError, match="another run took the folder over"):
            draw_into(tmp_path, job, ORIGIN, ALONE)
        assert not (tmp_path / "shards").exists()

    def test_memory_of_the_gpu(self, make_job, tmp_path):
        job = make_job()

        def forward(*args):
            raise torch.OutOfMemoryError("tried to allocate 90 GiB")

        job.network.forward = forward
        with pytest.raises(ValueError, match=r"sampler\.batch_size \(now 4\).*90 GiB"):
            draw_into(tmp_path, job, ORIGIN, ALONE)
