"""``dit-qat cache-latents``: pictures to sharded moments of an autoencoder, in both mirrors."""

from pathlib import Path
from typing import Literal

from dit_qat.dit.data.cache_job import CacheJob, size_text
from dit_qat.dit.data.caching import Cached, write_cache
from dit_qat.dit.data.pictures import Pictures
from dit_qat.dit.data.sources import CIFAR10, Folder, HuggingFace, ImageFolder
from dit_qat.dit.models.autoencoder import load_autoencoder
from dit_qat.dit.processes import launch
from dit_qat.export.files import write_json

__all__ = ["SOURCES", "cache_latents"]

SOURCES = (ImageFolder, Folder, CIFAR10, HuggingFace)
"""What --images takes by name."""


def cache_latents(
    images: Pictures,
    vae: str,
    out: Path,
    size: int = 256,
    batch_size: int = 32,
    dtype: Literal["float16", "float32"] = "float16",
    shard_images: int = 4096,
    skip_broken: bool = False,
    num_workers: int = 4,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> None:
    """Encode pictures, once and for all, for training in latent space.

    Writes shards of moments (mean and log-variance of each picture and of its mirror image), and
    index.json when all are there. The same command continues an interrupted run, on any number of
    processes, and mends damaged shards.

    Args:
        images: Source: ImageFolder or Folder (with --images.root), CIFAR10, HuggingFace.
        vae: Folder of an AutoencoderKL or of a pipeline with vae/, or a hub id.
        out: Folder for the cache; several machines must share it.
        size: Pixels a side, after the centre crop.
        batch_size: Images per call of the encoder.
        dtype: Of the moments on disk.
        shard_images: Pictures per shard.
        skip_broken: Leave out pictures that cannot be decoded, on record, rather than stop.
        num_workers: Processes that decode pictures, per process that encodes; the bottleneck.
        device: auto, cpu, cuda, cuda:1, ...
        devices: Processes on this machine, one per device; torchrun and SLURM set their own number.
        num_nodes: Machines, where neither torchrun nor SLURM says how many.

    Raises:
        ValueError: for options that do not fit together, or a folder of other settings.
        OSError: if something is not there, or there is not enough space.
    """
    len(images)  # lists them, so that a wrong path is said before anything is loaded
    processes = launch(device, devices, num_nodes)
    autoencoder = load_autoencoder(vae, processes.device)
    job = CacheJob(
        images, autoencoder, size, batch_size, dtype, shard_images, skip_broken, num_workers
    )
    if processes.is_zero:
        print(job.describe(), flush=True)
    cached = write_cache(out, job, processes, progress=True)
    if processes.is_zero:
        _report(out, cached)


def _report(out: Path, cached: Cached) -> None:
    shards = cached.index.shards
    skipped = [name for shard in shards for name in shard.skipped]
    total = sum(shard.bytes for shard in shards)
    print(f"{cached.index.num_images:,} images, {size_text(total)}, in {out}")
    if skipped:
        print(f"{len(skipped)} broken pictures left out, the first: {skipped[0]}")
    if not cached.encoded:
        return
    speed = cached.encoded / cached.seconds
    print(f"{cached.encoded:,} of them in {cached.seconds:.1f} s ({speed:.1f} images/s)")
    metrics = {
        "num_images": cached.index.num_images,
        "encoded": cached.encoded,
        "skipped": skipped,
        "seconds": cached.seconds,
        "images_per_second": speed,
        "bytes": total,
    }
    write_json(out / "metrics.json", metrics)
