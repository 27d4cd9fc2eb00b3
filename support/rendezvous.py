"""The meeting of the ranks when a run starts, also after a restart by the launcher."""

import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from support.errors import RunError, UserError


def meet_ranks(limit: timedelta) -> tuple[Any, int, int]:
    """(store that all ranks share, own rank, number of ranks).

    A process without a launcher is the only rank. UserError if the port of the launcher cannot be
    used, RunError if a rank does not join within `limit`.
    """
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore(), 0, 1
    try:
        return fresh_store(*next(dist.rendezvous("env://", timeout=limit)), limit)
    except (dist.DistNetworkError, ValueError) as error:
        address = os.environ["MASTER_ADDR"]
        port = os.environ.get("MASTER_PORT")
        raise UserError(
            f"MASTER_ADDR {address}, MASTER_PORT {port}: {error}; is another run using the port? "
            "torchrun --master-port sets another"
        ) from None


def fresh_store(store, rank: int, world: int, limit: timedelta) -> tuple[Any, int, int]:
    """The launcher's store under a fresh prefix; returns (store, rank, world).

    torchrun keeps one store across restarts (pytorch issue 135712). Without a fresh prefix, ranks
    would read addresses of dead processes. Rank 0 picks a random prefix. Every other rank asks for
    it with a random token. RunError if a rank does not join within `limit`.
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
