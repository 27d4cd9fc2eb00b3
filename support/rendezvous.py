"""The meeting of the ranks when a run starts, also after a restart by the launcher."""

import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from support.errors import RunError


def fresh_store(store, rank: int, world: int, limit: timedelta) -> tuple[Any, int, int]:
    """The launcher's store under a fresh prefix; returns (store, rank, world).

    torchrun keeps one store across restarts (pytorch issue 135712), so ranks would dial dead
    addresses. Rank 0 picks a random prefix. Every other rank asks for it with a random token.
    RunError if a rank does not join within `limit`.
    """
    token = secrets.token_hex(8)
    try:
        if rank == 0:
            prefix = token
            answer_ranks(store, prefix, world, limit)
        else:
            store.set(f"ask/{rank}", token)
            store.wait([f"answer/{token}"], limit)
            prefix = store.get(f"answer/{token}").decode()
            store.set(f"{prefix}/joined/{rank}", "")
    except dist.DistError as error:
        reason = str(error).splitlines()[0][:200]
        raise RunError(
            f"rank {rank} of {world} did not find the others within {limit}: {reason}"
        ) from None
    return dist.PrefixStore(prefix, store), rank, world


def answer_ranks(store, prefix: str, world: int, limit: timedelta) -> None:
    """Rank 0: answer the token of each other rank with the prefix, until all have joined.

    The token of a dead rank gets an answer too. That is harmless: its successor has a new token.
    """
    end = time.monotonic() + limit.total_seconds()
    absent = set(range(1, world))
    while absent:
        for rank in absent:
            if store.check([f"ask/{rank}"]):
                store.set("answer/" + store.get(f"ask/{rank}").decode(), prefix)
        absent = {rank for rank in absent if not store.check([f"{prefix}/joined/{rank}"])}
        if time.monotonic() > end:
            raise RunError(
                f"ranks {sorted(absent)} of {world} did not join within {limit}. "
                "Check that all machines are up and can reach each other"
            )
        time.sleep(0.01)
