"""A job's secret, read from the environment: it authenticates ranks on several machines, and roll-out servers and their trainer."""

from __future__ import annotations

import ipaddress
import os

from megafork.recipe.kinds import RecipeError

NAME = "MEGAFORK_SECRET"
FIX = f"export {NAME}=$(openssl rand -hex 32), the same in every process of the job"
_SHORTEST = 16


def secret() -> str | None:
    """This process's secret, or None. Raises RecipeError for one that is too short or that an HTTP header cannot carry."""
    found = os.environ.get(NAME)
    if not found:
        return None
    if len(found) < _SHORTEST or not (found.isascii() and found.isprintable()) or " " in found:
        raise RecipeError(f"{NAME} has {len(found)} characters: it needs {_SHORTEST} or more, all ASCII and no spaces; {FIX}")
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`: `localhost` or a loopback address.

    Other names are not looked up: many machines resolve their own name to the loopback, though others reach them at another address.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
