"""Middleware in front of every route of a roll-out server: requests without the job's secret get 401 and reach nothing.

vLLM installs it through `--middleware`, outside its own middleware. vLLM's `--api-key` leaves most routes open, including those that
transfer weights.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megafork.secret import NAME, secret

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Scope]]
_Send = Callable[[_Scope], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


def credentials() -> dict[str, str]:
    """The HTTP header that carries this process's secret; empty if it has none."""
    known = secret()
    return {"Authorization": f"Bearer {known}"} if known else {}


class Guard:
    """An ASGI application that wraps another. Without a secret in the environment, every request passes: the server is then on loopback."""

    def __init__(self, app: _App) -> None:
        self._app = app
        self._wanted = [value.encode() for value in credentials().values()]

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan" or self._is_known(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = f"this server asks for the {NAME} that it was started with".encode()
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": text})

    def _is_known(self, scope: _Scope) -> bool:
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        return not self._wanted or (len(shown) == 1 and hmac.compare_digest(shown[0], self._wanted[0]))
