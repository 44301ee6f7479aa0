"""Packed folders read back: strictly, one tensor at a time, never as floats."""

import gc
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_qat.export.digests import digest_for, digest_of
from dit_qat.export.entry import owned
from dit_qat.export.finite import check_finite
from dit_qat.export.manifest import (
    FIRST_BIASES,
    TENSOR_FILE,
    Manifest,
    file_header,
    read_manifest_and_digest,
)
from dit_qat.export.registry import architecture_named, timestep_argument
from dit_qat.export.skeleton import (
    add_biases,
    build_skeleton,
    check_names,
    check_tensors,
    listed,
)
from dit_qat.export.tensor_file import Place, TensorFile, open_tensors
from dit_qat.layers import follow_timesteps_

__all__ = ["check_header", "load_quantized"]

_MOST_THREADS = 4
_RUN, _ALONE = 4 << 20, 1 << 20  # bytes
_INDEX = f"{TENSOR_FILE}.index.json"  # of transformers, beside shards


def load_quantized(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Load a packed model, in evaluation mode, without gradients.

    Codes stay codes: storage of five per byte becomes four per byte, tensor by tensor. A model
    whose layers have bits by timestep finds the timestep in the arguments of its calls.

    Args:
        folder: What ``dit-qat export`` wrote.
        device: Where the model goes.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the folder is damaged, changed, incomplete, of an unknown version or
            architecture, or cut into shards.
    """
    folder = Path(folder)
    manifest, digest = read_manifest_and_digest(folder)
    if (folder / _INDEX).is_file() and not (folder / TENSOR_FILE).is_file():
        raise ValueError(
            f"{folder} is cut into shards, which transformers reads: load it with "
            "AutoModelForCausalLM.from_pretrained after import dit_qat.llm"
        )
    with open_tensors(folder / TENSOR_FILE) as file, _nothing_collected():
        try:
            check_header(file.metadata, file_header(manifest, digest))
            check_names("the file", file.places, manifest.tensors, "config.json lists")
            with file.fetched_meanwhile():
                model = _built(manifest, file.places)
            _fill(model, file, manifest, device)
            finished = _finished(model, manifest)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    return finished.to(device).eval().requires_grad_(False)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Keep Python from looking for garbage among thousands of objects that are about to be used.

    One full collection takes longer than building a model.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _fill(
    model: nn.Module, file: TensorFile, manifest: Manifest, device: torch.device | str
) -> None:
    """Put every tensor of a file into its place in a model that has none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in _loading(file, manifest):
        owner, _, leaf = name.rpartition(".")
        own = tensor if owned(name, manifest.layers) else _computing(tensor)
        _install(modules[owner], leaf, own.to(device))


def _finished(model: nn.Module, manifest: Manifest) -> nn.Module:
    """Check every packed layer as a whole, and let the architecture add what belongs to it."""
    for name, entry in manifest.layers.items():
        try:
            entry.check(model.get_submodule(name))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    finish = architecture_named(manifest.architecture).finish
    if finish is not None:
        finish(model, manifest.carried())
    return model


def _built(manifest: Manifest, places: Mapping[str, Place]) -> nn.Module:
    """The model without its tensors, which those of the file fit; it follows the timestep."""
    model = build_skeleton(
        manifest.architecture, manifest.arguments, manifest.layers, manifest.attention_bits
    )
    if manifest.version >= FIRST_BIASES:
        add_biases(model, manifest.tensors)
    check_tensors(model, manifest, places)
    _check_complete(model, manifest)
    if any(entry.by_timestep for entry in manifest.layers.values()):
        architecture = architecture_named(manifest.architecture)
        follow_timesteps_(model, timestep_argument(architecture, model))
    return model


def _loading(file: TensorFile, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Read, check and unpack all tensors in several threads, which share the processor's cores.

    They come in the order of the file; what is wrong with one is raised instead of it.
    """
    room = _Room()
    with ThreadPoolExecutor(min(_MOST_THREADS, _cores())) as pool:
        coming = deque(
            pool.submit(_resident, run, file, manifest, room) for run in _runs(file, manifest)
        )
        try:
            while coming:
                yield from coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _runs(file: TensorFile, manifest: Manifest) -> Iterator[list[str]]:
    """What a thread takes at a time: a tensor that is large or takes another form, or small ones.

    Of these a few megabytes, for threads take turns at the Python in between.
    """
    run: list[str] = []
    for name, place in file.places.items():
        alone = place.end - place.begin > _ALONE or _passes(name, manifest)
        if run and (alone or place.end - file.places[run[0]].begin > _RUN):
            yield run
            run = []
        if alone:
            yield [name]
        else:
            run.append(name)
    if run:
        yield run


def _passes(name: str, manifest: Manifest) -> bool:
    """Whether a tensor takes another form in memory."""
    place = owned(name, manifest.layers)
    return place is not None and manifest.layers[place.layer].is_passing(place.leaf)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_header(metadata: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Refuse a file of tensors that was written with another ``config.json``.

    Args:
        metadata: What its header says.
        expected: What a writer would have put there.

    Raises:
        ValueError: if they differ.
    """
    digest = next(key for key in expected if key.endswith("_sha256"))
    if metadata.get(digest) != expected[digest]:
        raise ValueError(
            f"config.json is not the one that was written with {TENSOR_FILE} (its sha256 "
            "differs), so it was damaged, changed or mixed with another export; copy the whole "
            "folder again, or export it again"
        )
    if metadata.get("version") != expected["version"]:
        raise ValueError(
            f"the header of {TENSOR_FILE} has version {metadata.get('version')!r}, and config.json "
            f"{expected['version']}; export it again"
        )


class _Room(threading.local):
    """Memory that a thread uses again and again: new pages cost more than filling them."""

    _bytes = torch.empty(0, dtype=torch.uint8)

    def of(self, place: Place) -> Tensor:
        """As many bytes as a tensor has in the file, or more."""
        count = place.end - place.begin
        if self._bytes.numel() < count:
            self._bytes = torch.empty(count, dtype=torch.uint8)
        return self._bytes


def _resident(
    run: Sequence[str], file: TensorFile, manifest: Manifest, room: _Room
) -> list[tuple[str, Tensor]]:
    """Tensors as they are in memory; what takes another form there passes through ``room``."""
    first = run[0]
    if _passes(first, manifest):
        stored = {first: file.read(first, room.of(file.places[first]))}
    else:
        stored = file.read_run(run)
    return [(name, _checked(name, tensor, manifest)) for name, tensor in stored.items()]


def _checked(name: str, tensor: Tensor, manifest: Manifest) -> Tensor:
    digest = digest_for(manifest.version)
    if digest_of(tensor, digest) != manifest.tensors[name].digest:
        raise ValueError(
            f"the bytes of {name} are not those that were written (their {digest} differs); the "
            "file is damaged, so copy or export it again"
        )
    place = owned(name, manifest.layers)
    try:
        if place is not None:
            return manifest.layers[place.layer].resident(place.leaf, tensor)
        if tensor.is_floating_point():
            check_finite(tensor)
        return tensor
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _computing(tensor: Tensor) -> Tensor:
    """A tensor outside the packed layers, which computes in float32 whatever it is stored in."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _install(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Fill what a module has registered, without the questions that setting an attribute asks."""
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _check_complete(model: nn.Module, manifest: Manifest) -> None:
    """Refuse what no file can fill: buffers that are not saved with a model."""
    own = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    known = {*manifest.tensors, *architecture_named(manifest.architecture).tied(model)}
    rest = [name for name, t in own if t.is_meta and name not in known]
    if rest:
        raise ValueError(
            f"the builder of {manifest.architecture!r} leaves {listed(rest)} without values; it "
            "must make what a state dict does not hold on the CPU"
        )
