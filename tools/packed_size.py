"""What a packed DiT takes: bytes on disk and resident, memory to write it, time to load it.

    python tools/packed_size.py [--variant DiT-XL/2] [--rank 16] [--runs 3] [--out results.json]

Weights are random codes, since sizes do not depend on values: W1.58 with a low-rank branch on every
block linear and adaLN linear, embedders and final layer float32, 1.6-bit storage. Once with a
float32 branch, once with a bfloat16 one. Every number is of a real file or a real tensor. "cold"
follows after the file's pages were dropped from the cache (posix_fadvise, that file only); reading
means reading all its bytes once into one small buffer, loading means ``load_quantized``; the two
take turns. The first load of a fresh process comes apart: it alone pays for every page of memory.
Linux only.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from dit_qat import load_quantized, quantize_
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.models.variants import dit_variant
from dit_qat.export import write_packed
from dit_qat.export.files import write_json
from dit_qat.export.layer_entry import Storage
from dit_qat.export.manifest import CONFIG_FILE, TENSOR_FILE
from dit_qat.export.sizes import measure, packed_disk
from dit_qat.layers import QuantLinear
from dit_qat.layers.linear import BranchDtype

_CHUNK = 1 << 22
_BRANCHES: tuple[BranchDtype, ...] = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variant", default="DiT-XL/2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3, help="loads to take the median of")
    parser.add_argument("--storage", choices=get_args(Storage), default="ternary_1.6")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        results = run(chosen.variant, chosen.rank, chosen.storage, chosen.runs, Path(root))
    if chosen.out is not None:
        write_json(chosen.out, results)
    print(json.dumps(results, indent=2))


def run(variant: str, rank: int, storage: Storage, runs: int, root: Path) -> dict[str, Any]:
    """Write both forms, then load both, so that no trained model stands beside a loaded one."""
    written = _write(variant, rank, storage, root)
    results = {branch: written[branch] | _load(root / branch, runs) for branch in written}
    return {
        "variant": variant,
        "rank": rank,
        "storage": storage,
        "threads": torch.get_num_threads(),
        "branch": results,
    }


def _write(variant: str, rank: int, storage: Storage, root: Path) -> dict[str, dict[str, Any]]:
    model, found = random_model(variant, rank), {}
    for branch in _BRANCHES:
        _reset_peak()
        before, started = _memory("VmRSS"), time.perf_counter()
        write_packed(model, root / branch, branch_dtype=branch, storage=storage)
        found[branch] = {
            "write_seconds": time.perf_counter() - started,
            "write_peak_bytes_beside_the_model": _memory("VmHWM") - before,
        }
    return found


def random_model(variant: str, rank: int) -> nn.Module:
    """A quantized DiT of random codes; latents in bfloat16, which holds codes exactly."""
    with torch.device("meta"):
        model = dit_variant(variant)
        quantize_(model, RobuQ(activation_bits=2, rank=rank).quant_config(), initialize=False)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_latent = isinstance(module, QuantLinear) and name == "weight"
            make = _random_codes if is_latent else _random_floats
            setattr(
                module, name, nn.Parameter(make(parameter.shape, generator), requires_grad=False)
            )
    return model.eval()


def _random_codes(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    codes = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    return codes.to(torch.bfloat16).mul_(0.02)


def _random_floats(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).mul_(0.02)


def _load(folder: Path, runs: int) -> dict[str, Any]:
    first_load = _in_fresh_process(_first_load, folder)
    timed = _timed(folder, runs)
    model = load_quantized(folder)
    assert isinstance(model, DiT)
    first = torch.zeros(1, dtype=torch.long)  # timestep and label of one image
    with torch.inference_mode():
        model(torch.zeros(1, model.in_channels, *2 * (model.input_size,)), first, first)
    sizes = measure(model, packed_disk(folder))
    return {
        "files": {name: (folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE)},
        "float_parameters": sizes.float_numbers,
        "times_smaller_than_float32_on_disk": 4 * sizes.float_numbers / sizes.disk_bytes,
        "times_smaller_than_bfloat16_resident": 2 * sizes.float_numbers / sizes.resident_bytes,
        **timed,
        "first_load_of_a_process": first_load,
        "measured": {k: v for k, v in sizes.as_dict().items() if k != "layers"},
    }


def _in_fresh_process(function: Callable[[Path], dict[str, float]], path: Path) -> dict[str, float]:
    """What a function finds in a process that has imported this package and done nothing else.

    They are forked from one that has only imported it, once for all of them: that takes seconds.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["dit_qat.dit.methods", "dit_qat.dit.models", "dit_qat.export"])
    with ProcessPoolExecutor(1, context) as fresh:
        return fresh.submit(function, path).result()


def _first_load(folder: Path) -> dict[str, float]:
    """What one load costs a process that has loaded nothing before."""
    _drop(folder / TENSOR_FILE)
    _reset_peak()
    before, started = _memory("VmRSS"), time.perf_counter()
    model = load_quantized(folder)
    return {
        "seconds": time.perf_counter() - started,
        "peak_bytes": _memory("VmHWM") - before,
        "held_bytes": _memory("VmRSS") - before,
        "tensor_bytes": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
    }


def _timed(folder: Path, runs: int) -> dict[str, Any]:
    """Reading and loading in turn, so that whatever else the machine does slows both.

    Medians of seconds, and of the ratios within a round.
    """
    path = folder / TENSOR_FILE
    rounds: dict[str, list[float]] = {}
    for _ in range(runs):
        for state, prepare in (("cold", _drop), ("warm", _read)):
            for what, act in (("read", _read), ("load", lambda path: load_quantized(path.parent))):
                prepare(path)
                rounds.setdefault(f"{what}_{state}", []).append(_seconds(act, path))
    ratios = {
        state: [
            load / read
            for load, read in zip(rounds[f"load_{state}"], rounds[f"read_{state}"], strict=True)
        ]
        for state in ("cold", "warm")
    }
    return {
        "seconds": {name: statistics.median(seconds) for name, seconds in rounds.items()},
        "load_over_read": {state: statistics.median(found) for state, found in ratios.items()},
    }


def _seconds(act: Callable[[Path], object], path: Path) -> float:
    started = time.perf_counter()
    result = act(path)
    seconds = time.perf_counter() - started
    del result  # which takes time as well
    return seconds


def _read(path: Path) -> None:
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _drop(path: Path) -> None:
    """Have the system forget the pages of a file that is on the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(what: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


if __name__ == "__main__":
    main()
