"""How much memory is free."""

from pathlib import Path

import torch

__all__ = ["free_bytes"]

_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_COUNTERS = ("memory.max", "memory.current", "memory.stat")


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that may still be taken on a device; None where nobody tells.

    Of the host, what the system calls available, or less if this process lives in a group (a
    container) with a limit.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _SYSTEM.is_file():
        return None
    return min([_available(_SYSTEM.read_text(encoding="ascii")), *_in_group(_GROUP)])


def _available(text: str) -> int:
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def _in_group(folder: Path) -> list[int]:
    """What the group's limit leaves (cgroups of version 2), if it has one."""
    if not all((folder / name).is_file() for name in _COUNTERS):
        return []
    limit, used, parts = ((folder / name).read_text(encoding="ascii") for name in _COUNTERS)
    if limit.strip() == "max":
        return []
    # Pages of files that nobody reads now count as used, and go when room is needed.
    idle = dict(line.split() for line in parts.splitlines()).get("inactive_file", "0")
    return [max(0, int(limit) - int(used) + int(idle))]
