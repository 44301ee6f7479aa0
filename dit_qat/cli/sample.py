"""``dit-qat sample``: images from a checkpoint, a packed folder or float weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dit_qat.cli.sources import Source, load_source
from dit_qat.dit.models.autoencoder import (
    Autoencoder,
    LatentSpace,
    check_channels,
    load_autoencoder,
)
from dit_qat.dit.processes import launch
from dit_qat.dit.sampling import SamplerConfig, sample_images
from dit_qat.dit.sampling.run import Drawn, SamplingJob, draw_into

__all__ = ["sample"]

_DEFAULT_SAMPLER = SamplerConfig()
_PIXEL_CHANNELS = (1, 3)


def sample(
    out: Path,
    checkpoint: Path | None = None,
    weights: str | None = None,
    num: int = 64,
    classes: list[int] | None = None,
    sampler: SamplerConfig = _DEFAULT_SAMPLER,
    png: bool = True,
    npz: bool = False,
    latents: bool = False,
    vae: str | None = None,
    any_vae: bool = False,
    decode_batch_size: int = 8,
    compile: bool = False,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    threads: int = 1,
    overwrite: bool = False,
) -> None:
    """Draw images 0 to num - 1, each a function of its index, the seed and the network alone.

    Writes images/000000.png and so on, grid.png, sampling.json and metrics.json. The same command
    goes on after a kill: batches are kept in shards as they come, on any number of processes.

    Args:
        out: Folder for the results; several machines must share it.
        checkpoint: A .ckpt of dit-qat fit, whose EMA weights are used.
        weights: Other weights instead: a packed folder of dit-qat export, or float ones: digits, a
            .safetensors file, a published .pt, a diffusers folder (DiTTransformer2DModel or
            DiTPipeline), a hub id.
        num: Number of images.
        classes: Labels, dealt out to the images in turn; all classes in turn by default.
        sampler: How to sample.
        png: Write the images as PNGs; with neither these nor --npz, the shards are what is left.
        npz: Also write samples.npz, as the ADM evaluator reads it.
        latents: Write what the network draws as float32, latents.npz, and no images.
        vae: Decoder of latents: a folder of an AutoencoderKL or of a pipeline with vae/, or a hub
            id; by default the one that the checkpoint was trained with, or of the same pipeline.
        any_vae: Decode by --vae even if the checkpoint was trained with another one.
        decode_batch_size: Latents per call of the decoder.
        compile: Compile the network.
        device: auto, cpu, cuda, cuda:1, ...
        devices: Processes on this machine, one per device; torchrun and SLURM set their own number.
        num_nodes: Machines, where neither torchrun nor SLURM says how many.
        threads: CPU threads of a process without a GPU; more rounds differently, so that speed
            comes from --devices.
        overwrite: Replace the results in the folder.

    Raises:
        ValueError: for options that do not fit together or the network.
        FileExistsError: if the folder holds results of other settings.
    """
    _check_numbers(num=num, decode_batch_size=decode_batch_size, threads=threads)
    if latents and (npz or vae is not None):
        other = "--npz holds images" if npz else "--vae decodes latents into images"
        raise ValueError(f"{other} and --latents writes none; choose one of them")
    source = load_source(checkpoint, weights)
    label_of = _labels(source, classes)
    # Nothing is drawn before the iterator is asked; labels and guidance are checked now.
    sample_images(source.network, sampler, range(num), label_of)
    autoencoder = None if latents else _autoencoder(source, vae, any_vae)
    job = SamplingJob(source.network, sampler, num, label_of, autoencoder, decode_batch_size)
    job = replace(job, latents=latents, png=png, npz=npz, compiled=compile, threads=threads)
    origin = {"source": source.name, "weights": source.weights, "checkpoint_step": source.step}
    processes = launch(device, devices, num_nodes)
    drawn = draw_into(out, job, origin | {"classes": classes}, processes, overwrite, progress=True)
    if processes.is_zero:
        _say(drawn, out)


def _say(drawn: Drawn, out: Path) -> None:
    if not drawn.drawn:
        print(f"all {drawn.found} images were there already, in {out}")
        return
    already = f" ({drawn.found} were there already)" if drawn.found else ""
    rate = drawn.drawn / drawn.seconds
    print(f"{drawn.drawn} images in {drawn.seconds:.1f} s ({rate:.2f} images/s){already}, in {out}")


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")


def _labels(source: Source, classes: list[int] | None) -> Callable[[int], int] | None:
    """The label of any index; None for an unconditional network."""
    if classes is not None:
        if not classes:
            raise ValueError("--classes is an empty list; name a class, or leave the option out")
        dealt = classes
        return lambda index: dealt[index % len(dealt)]
    count = source.network.num_classes
    return (lambda index: index % count) if count else None


def _autoencoder(source: Source, vae: str | None, any_vae: bool) -> Autoencoder | None:
    """What decodes the network's latents; None for a network of pixels."""
    trained, channels = source.latent_space, source.network.in_channels
    name = _pipeline(source) if vae is None else vae
    if name is None and trained is not None:
        name = trained.source
    if name is None:
        if channels in _PIXEL_CHANNELS:
            return None
        raise ValueError(
            f"this network draws latents of {channels} channels; name what decodes them, --vae "
            "SOURCE, or let --latents true write them as they are, to latents.npz"
        )
    try:
        autoencoder = load_autoencoder(name)
    except FileNotFoundError as error:
        if vae is not None:
            raise
        raise FileNotFoundError(
            f"{source.name} was trained with an autoencoder that is not here any more; name it by "
            f"--vae: {error}"
        ) from error
    check_channels(autoencoder.space, source.network)
    if trained is not None and not any_vae:
        _check_trained(name, autoencoder.space, trained)
    return autoencoder


def _pipeline(source: Source) -> str | None:
    """A diffusers pipeline brings its autoencoder along."""
    return source.name if (Path(source.name) / "vae" / "config.json").is_file() else None


def _check_trained(name: str, space: LatentSpace, trained: LatentSpace) -> None:
    for what in ("sha256", "scaling_factor", "shift_factor"):
        here, there = getattr(space, what), getattr(trained, what)
        if here != there:
            raise ValueError(
                f"--vae {name} is not the autoencoder that the checkpoint was trained with, "
                f"{trained.source} ({what} {here} here, {there} there); use that one, or "
                "--any_vae true to decode by this one all the same"
            )
