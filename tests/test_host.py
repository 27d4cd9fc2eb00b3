"""support/host.py: the free memory, from files as Linux writes them, and what depends on it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import checkpoints, host

GIB = 2**30
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable:  8388608 kB\nHugePages_Total: 0\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def v2(folder: str, limit, usage, cache=0) -> dict[str, str]:
    top = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon 7\ninactive_file {cache}\n"
    return {
        f"{top}/memory.max": f"{limit}\n",
        f"{top}/memory.current": f"{usage}\n",
        f"{top}/memory.stat": stat,
    }


def v1(folder: str, limit, usage, cache=0) -> dict[str, str]:
    top = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    stat = f"total_inactive_file {cache}\n"
    return {
        f"{top}/memory.limit_in_bytes": f"{limit}\n",
        f"{top}/memory.usage_in_bytes": f"{usage}\n",
        f"{top}/memory.stat": stat,
    }


V1_GROUPS = "9:name=systemd:/\n4:cpu,memory:/job/step\n0::/\n"
CASES = {  # name: /proc/self/cgroup, other files, free GiB
    "no limit": ("0::/\n", {}, 8),
    "no limit in the file": ("0::/a\n", v2("a", "max", GIB), 8),
    "own limit": ("0::/a/b\n", v2("a/b", 4 * GIB, 3 * GIB), 1),
    "cache is free": ("0::/a/b\n", v2("a/b", 4 * GIB, 3 * GIB, cache=2 * GIB), 3),
    "limit of the parent": (
        "0::/a/b\n",
        v2("a/b", 4 * GIB, GIB) | v2("a", 4 * GIB, 2 * GIB),
        2,
    ),
    "container": ("0::/not/shown\n", v2("", 4 * GIB, 3 * GIB), 1),
    "over the limit": ("0::/a\n", v2("a", GIB, 2 * GIB), 0),
    "large limit": ("0::/a\n", v2("a", 64 * GIB, GIB), 8),
    "version 1": (V1_GROUPS, v1("job/step", 4 * GIB, 3 * GIB, cache=GIB), 2),
    "version 1, parent": (V1_GROUPS, v1("job", 4 * GIB, 3 * GIB) | v1("", 2**63 - 4096, 0), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_free_memory_is_what_machine_and_cgroups_leave(name, tmp_path):
    groups, files, expected = CASES[name]
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups} | files)
    assert host.free_memory(tmp_path) == expected * GIB


@pytest.mark.parametrize("meminfo", [None, "", "MemAvailable: many kB", "MemFree: 1 kB"])
def test_memory_that_cannot_be_read_is_none(meminfo, tmp_path):
    files = {"proc/self/cgroup": "0::/\n"} | ({} if meminfo is None else {"proc/meminfo": meminfo})
    write(tmp_path, files)
    assert host.free_memory(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_of_this_machine():
    assert 2**20 < host.free_memory() < 2**50


# ---- checkpoints in the background ---------------------------------------------------------------

PARAMETERS = 1000  # of a rank; two ranks of a machine need 2 * 2 * 12 bytes for each
NEED = 48000


class Saver(checkpoints.Checkpoints):
    """Checkpoints without a folder: has_room() and what it prints."""

    def __init__(self):
        self.noted = False
        self.texts = []
        self.print = self.texts.append


class Policy:
    def parameters(self):
        shard = torch.zeros(PARAMETERS // 2)
        return [SimpleNamespace(to_local=shard.clone)] * 2


MACHINES = [  # free bytes on this machine and on another one; room or not
    (NEED, None, True),
    (NEED - 1, None, False),
    (None, None, True),
    (NEED, NEED, True),
    (NEED, NEED - 1, False),
    (NEED - 1, NEED, False),
    (None, 0, False),
]


@pytest.mark.parametrize("here,there,room", MACHINES)
def test_all_machines_must_have_room_for_the_copies_of_their_ranks(here, there, room, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(checkpoints, "free_memory", lambda: here)
    monkeypatch.setattr(checkpoints, "gather", lambda mine: [*mine, (there, NEED)])
    saver = Saver()
    for _ in range(2):
        assert saver.has_room(Policy()) == room
    assert len(saver.texts) == (not room)  # told once


def test_note_says_how_much_memory_is_missing(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2**21))
    monkeypatch.setattr(checkpoints, "free_memory", lambda: 3 * GIB)
    saver = Saver()
    assert not saver.has_room(Policy())
    need = 2 * 12 * PARAMETERS * 2**21 / GIB
    assert f"takes {need:.2f} GiB of host memory per machine, and 3.00 are free" in saver.texts[0]
