"""The secret of a job, in its environment: by it the ranks of several machines, and roll-out servers and their trainer, know each other."""

from __future__ import annotations

import functools
import ipaddress
import os
import socket

from megafork.recipe.kinds import RecipeError

NAME = "MEGAFORK_SECRET"
FIX = f"export {NAME}=$(openssl rand -hex 32), the same in every process of the job"
_SHORTEST = 16


def secret() -> str | None:
    """That of this process; None without one. Raises RecipeError for one that is soon guessed, or that no HTTP header can carry."""
    found = os.environ.get(NAME)
    if not found:
        return None
    if len(found) < _SHORTEST or not (found.isascii() and found.isprintable()) or " " in found:
        raise RecipeError(f"{NAME} has {len(found)} characters: it needs {_SHORTEST} or more, of ASCII and without spaces; {FIX}")
    return found


@functools.cache
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address. False for a name that nobody knows."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
