"""The machine: host memory that is still free, and the folder for what later runs need again."""

import os
from pathlib import Path

CGROUPS = {  # version: folder, limit, usage, and in memory.stat the part that is only file cache
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


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
            free += left_in_cgroups(root, path.strip("/"), 1 if controllers else 2)
    return max(0, min(free))


def left_in_cgroups(root: Path, path: str, version: int) -> list[int]:
    """What the limits of a cgroup and of its parents leave, in bytes. No limit: nothing."""
    home, limit, usage, cache = CGROUPS[version]
    top = root / home
    left = []
    for folder in (top / path, *(top / path).parents):
        if not folder.is_relative_to(top):
            break
        try:
            largest = (folder / limit).read_text().strip()
            if largest != "max":
                used = int((folder / usage).read_text())
                used -= read_fields(folder / "memory.stat").get(cache, 0)
                left.append(int(largest) - used)
        except (OSError, ValueError):  # a container may not show the folders of its own cgroup
            continue
    return left


def read_fields(path: Path) -> dict[str, int]:
    """The numbers of a file with lines such as "MemAvailable: 123 kB", by name."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in fields if len(words) > 1}


def cache_folder() -> Path:
    """Where what is made once stays for later runs: LITE_PPO_CACHE, or lite-ppo in ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lite-ppo")
    return Path(os.environ.get("LITE_PPO_CACHE") or default).expanduser()
