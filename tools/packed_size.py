"""What a packed DiT takes: bytes on disk and resident, memory to write it, time to load it.

    python tools/packed_size.py [--variant DiT-XL/2] [--rank 16] [--runs 3] [--out results.json]

Weights are random codes, since sizes do not depend on values: W1.58 with a low-rank branch on every
block linear and adaLN linear, embedders and final layer float32, 1.6-bit storage. Once with a
float32 branch, once with a bfloat16 one. Every number is of a real file or a real tensor. "cold"
follows after the file's pages were dropped from the cache (posix_fadvise, that file only); reading
means reading all its bytes once, loading means ``load_quantized``. Linux only.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from dit_qat import load_quantized, quantize_
from dit_qat.dit.convert.difference import fixed_inputs
from dit_qat.dit.methods import RobuQ
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
    path = folder / TENSOR_FILE
    times = {
        "read_cold": _median(runs, lambda: _read(path), lambda: _drop(path)),
        "load_cold": _median(runs, lambda: load_quantized(folder), lambda: _drop(path)),
        "read_warm": _median(runs, lambda: _read(path), lambda: _read(path)),
        "load_warm": _median(runs, lambda: load_quantized(folder), lambda: _read(path)),
    }
    model = load_quantized(folder)
    x, t, y = fixed_inputs(model)
    with torch.inference_mode():
        model(x[:1], t[:1], y[:1])
    sizes = measure(model, packed_disk(folder))
    return {
        "files": {name: (folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE)},
        "float_parameters": sizes.float_numbers,
        "times_smaller_than_float32_on_disk": 4 * sizes.float_numbers / sizes.disk_bytes,
        "times_smaller_than_bfloat16_resident": 2 * sizes.float_numbers / sizes.resident_bytes,
        "seconds": times,
        "load_over_read_cold": times["load_cold"] / times["read_cold"],
        "load_over_read_warm": times["load_warm"] / times["read_warm"],
        "measured": {k: v for k, v in sizes.as_dict().items() if k != "layers"},
    }


def _median(runs: int, what: Callable[[], object], before: Callable[[], object]) -> float:
    seconds = []
    for _ in range(runs):
        before()
        started = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


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
