"""Rendezvous: the key-value store through which torch's process groups are made, and who may write to it.

By default torch's TCPStore listens on every interface and lets anyone read and write. On one machine megafork uses none: the launcher hands
its ranks an unnamed file, and gloo and NCCL connect over the loopback. Across machines a TCPStore listens on rank 0's address only, and
values in it count only if they are signed with the job's secret.
"""

from __future__ import annotations

import atexit
import hmac
import os
import socket
from datetime import timedelta

import torch.distributed as dist

from megafork.joined import STORE
from megafork.recipe import RecipeError
from megafork.secret import FIX, NAME, is_loopback, secret

_GREETING = "megafork"


def join(backend: str, timeout: timedelta) -> None:
    """Create the default process group of the ranks that the environment describes; every rank must call.

    Raises RecipeError when rank 0's secret differs from this rank's.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ[STORE], world) if STORE in os.environ else _across(rank, world, timeout)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _across(rank: int, world: int, timeout: timedelta) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own store is already listening
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = signed(dist.PrefixStore(f"megafork/{restart}", dist.TCPStore(host, port, world, is_master=False, timeout=timeout)))
    elif rank == 0:
        try:
            listening = listen(host, port, world, timeout)
        except OSError as error:  # the port is taken, or the address is not this machine's
            raise RecipeError(
                f"MASTER_ADDR is {host!r} and MASTER_PORT {port}: rank 0 can't listen there ({error.strerror}); set MASTER_ADDR to an "
                "address of its machine, and MASTER_PORT to a free port"
            ) from None
        store = signed(listening)
    else:
        store = signed(dist.TCPStore(host, port, world, is_master=False, timeout=timeout))
    atexit.register(_leave, store)
    if rank == 0:
        store.set("greeting", _GREETING)
    if store.get("greeting").decode(errors="replace") != _GREETING:
        raise RecipeError(f"rank 0 has a {NAME} and rank {rank} has none: {FIX}")
    return store


def listen(host: str, port: int, world: int, timeout: timedelta) -> dist.TCPStore:
    """A store for `world` members that listens on the address of `host` only; port 0: any. Returns without waiting for the members.

    If this machine resolves its own name to the loopback (Debian), it listens on every interface, as others use another address for it.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if is_loopback(str(address[0])) and not is_loopback(host):
        family, address = socket.AF_INET, ("", port)
    listener = socket.create_server(address[:2], family=family, backlog=max(world, 16))
    port, descriptor = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(host, port, world, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor)


def signed(store: dist.Store) -> dist.Store:
    """The store, signed if the environment has a secret, so that only those who know it can write.

    Keep a reference for as long as any group made with it: torch's groups keep only its C++ half alive.
    """
    known = secret()
    return SignedStore(store, known) if known else store


def _leave(store: dist.Store) -> None:
    """NCCL's threads query the store while a group exists, and must have stopped before the interpreter shuts down."""
    if dist.is_initialized():
        dist.destroy_process_group()


class SignedStore(dist.Store):
    """A store in which every value carries an HMAC-SHA256 of key and value under the job's secret.

    Values without it are refused, so nobody else can direct a rank elsewhere. Counters (`add`) are unsigned and keys can be deleted, so an
    intruder can still make the rendezvous fail; and nothing is encrypted.
    """

    def __init__(self, store: dist.Store, secret: str) -> None:
        super().__init__()
        self._store = store
        self._secret = secret.encode()

    def _code(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self._secret, len(key).to_bytes(8, "little") + key.encode() + value, "sha256")

    def set(self, key: str, value: bytes | str) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(key, self._code(key, value) + value)  # type: ignore[arg-type]  # torch's stub allows only str

    def get(self, key: str) -> bytes:
        found = bytes(self._store.get(key))
        code, value = found[:32], found[32:]
        if not hmac.compare_digest(code, self._code(key, value)):
            raise RecipeError(f"{key!r} was written to the ranks' store without this rank's {NAME}: {FIX}")
        return value

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        if timeout is None:
            self._store.wait(keys)
        else:
            self._store.wait(keys, timeout)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        return self._store.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        super().set_timeout(timeout)
        self._store.set_timeout(timeout)
