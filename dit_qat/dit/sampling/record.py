"""What fixes the bytes of drawn images, written down before the first, so that a run can go on."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat import __version__
from dit_qat.export.files import check_folder, claim_folder, write_json

__all__ = [
    "METRICS",
    "RECORD",
    "RESULTS",
    "check_record",
    "claim_record",
    "differences",
    "environment",
    "network_sha256",
]

METRICS = "metrics.json"
"""The file that says that a run is finished."""

RECORD = "sampling.json"
"""The file of the record."""

RESULTS = (
    METRICS,
    RECORD,
    "shards",
    "images",
    "grid.png",
    "samples.npz",
    "latents.npz",
)
"""What a sampling run leaves in its folder, in the order in which an overwriting one removes it."""

_CURE = "choose another --out, or pass --overwrite true to replace them"
_NAMES = ("source",)  # where something came from; the same weights may have moved
_SHOWN = 5


def check_record(folder: Path, record: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a folder holds a run of this record, to go on with; changes nothing.

    Raises:
        FileExistsError: if it holds other results, and they may not be overwritten.
        NotADirectoryError: if it is a file.
        ValueError: if its record is damaged.
    """
    path = folder / RECORD
    if overwrite or not path.is_file():
        check_folder(folder, RESULTS, overwrite, _CURE)
        return False
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {_CURE}") from error
    differing = differences(saved, record, "there", "here")
    if differing:
        raise FileExistsError(
            f"{folder} holds images drawn with other settings ({differing}); to go on with them, "
            f"repeat their settings, else {_CURE}"
        )
    return True


def claim_record(folder: Path, record: Mapping[str, Any], overwrite: bool) -> bool:
    """As :func:`check_record`; a new run's folder is made, emptied of results and gets its record.

    Raises:
        OSError: as :func:`check_record`, or if the folder cannot be written.
        ValueError: as :func:`check_record`.
    """
    if check_record(folder, record, overwrite):
        return True
    claim_folder(folder, RESULTS, overwrite, _CURE)
    write_json(folder / RECORD, record)
    return False


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and library versions that the bytes of an image depend on."""
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device)
        if on_gpu
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": None if on_gpu else torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {
            "dit_qat": __version__,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
        },
    }


def network_sha256(network: nn.Module) -> str:
    """Of every tensor and every setting of a network, float or quantized."""
    digest = hashlib.sha256(json.dumps(getattr(network, "config", {}), sort_keys=True).encode())
    for name, value in sorted(network.state_dict().items()):
        if not isinstance(value, Tensor):  # a quantized layer's settings
            digest.update(f"{name} {json.dumps(value, sort_keys=True)}\n".encode())
            continue
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(saved: Any, wanted: Any, one: str, other: str) -> str:
    """What two records do not agree on, in words, calling their sides ``one`` and ``other``."""
    found = [
        f"{name}: {_short(a)} {one}, {_short(b)} {other}" for name, a, b in _pairs(saved, wanted)
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _pairs(saved: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in [*saved, *(key for key in wanted if key not in saved)]:
            if key not in _NAMES:
                inner = f"{name}.{key}" if name else key
                yield from _pairs(saved.get(key), wanted.get(key), inner)
    elif saved != wanted:
        yield name or "record", saved, wanted


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
