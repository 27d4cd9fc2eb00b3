"""The machine: its free memory, the memory of a long run, and the folder for later runs."""

import atexit
import contextlib
import ctypes
import gc
import os
from pathlib import Path
from typing import NamedTuple


class Cgroups(NamedTuple):
    """Where a version of Linux control groups states the memory of a group."""

    root: str  # folder of the topmost group
    limit: str  # file
    usage: str  # file
    file_cache: str  # field of memory.stat: file cache that the kernel can drop


VERSION_1 = Cgroups(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
VERSION_2 = Cgroups("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate; None where it cannot be read (macOS).

    It is the smaller one of MemAvailable and of what the cgroups of the process leave (containers,
    Slurm). File cache counts as free. root: the folder that holds proc and sys.
    """
    try:
        free = [1024 * read_fields(root / "proc/meminfo")["MemAvailable"]]
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError, KeyError):
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            version = VERSION_1 if controllers else VERSION_2
            free += left_in_cgroups(root / version.root, path.strip("/"), version)
    return max(0, min(free))


def left_in_cgroups(top: Path, path: str, version: Cgroups) -> list[int]:
    """Bytes left below each limit of a cgroup and of its parents; [] if there is no limit.

    path: of the cgroup, below the topmost one.
    """
    left = []
    for folder in (top / path, *(top / path).parents):
        if not folder.is_relative_to(top):
            break
        try:
            limit = (folder / version.limit).read_text().strip()
            if limit != "max":
                used = int((folder / version.usage).read_text())
                used -= read_fields(folder / "memory.stat").get(version.file_cache, 0)
                left.append(int(limit) - used)
        except (OSError, ValueError):  # a container may not show the folders of its own cgroup
            continue
    return left


def read_fields(path: Path) -> dict[str, int]:
    """The numbers of a file with lines such as "MemAvailable: 123 kB", by name."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in fields if len(words) > 1}


def reclaim_memory() -> None:
    """Every tenth step, run the garbage collector and return free heap to the operating system.

    Each step leaves about 1,000 objects in reference cycles. Python's collector runs less often as
    the heap grows, so long-lived objects are excluded (gc.freeze). glibc does not return fragmented
    memory by itself: the heap grows although usage is constant, and malloc_trim fixes that
    (benchmarks/README.md). Returned memory must be mapped again: after every step this costs the
    toy 8 % of its CPU time, after every tenth step nothing measurable.
    """
    reclaim_memory.calls += 1
    if reclaim_memory.calls > 2 and reclaim_memory.calls % 10:
        return
    gc.collect()
    if reclaim_memory.calls <= 2:
        gc.freeze()  # safe here: no checkpoint is being written
        atexit.register(gc.unfreeze)  # else libraries report leaked objects at exit
    with contextlib.suppress(AttributeError, OSError):  # no glibc (macOS, musl)
        ctypes.CDLL(None).malloc_trim(0)


reclaim_memory.calls = 0  # in this process


def cache_folder() -> Path:
    """The folder of files that later runs use again: LITE_PPO_CACHE, or lite-ppo in ~/.cache.

    They are toy models, compiled blocks and attention kernels.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lite-ppo")
    return Path(os.environ.get("LITE_PPO_CACHE") or default).expanduser()
