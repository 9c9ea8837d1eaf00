"""The secret of a job, in its environment: by it the ranks of several machines, and roll-out servers and their trainer, know each other."""

from __future__ import annotations

import ipaddress
import os

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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`: `localhost`, or an address of the loopback.

    Another name is not looked up: many a machine knows its own by the loopback, under which others still reach it elsewhere.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
