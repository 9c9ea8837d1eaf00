"""One vLLM server over HTTP: is it well, answer this request, take these weights.

vLLM serves its weight-transfer routes under VLLM_SERVER_DEV_MODE=1 and token-in token-out under --enable-scale-out (0.32).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from megafork.rl.fork_temperature import ForkTemperature
from megafork.rollout.engine import Completion, Request, Sampling
from megafork.rollout.vllm_arguments import sampling_arguments
from megafork.secret import NAME, secret


class ServerLost(Exception):
    """A server did not answer in time, failed, or holds other weights than it should: take it out, and ask another."""


class RequestRefused(RuntimeError):
    """A server understood a request and will not serve it (HTTP 4xx): no other server would."""


class WrongSecret(RequestRefused):
    """A server was started with another secret than this process has (HTTP 401)."""


@dataclass(frozen=True)
class Limits:
    """How much to ask of a server at once, and how long to wait, in seconds."""

    in_flight: int = 256
    """Requests at one server."""
    request_s: float = 3600.0
    """One response."""
    server_s: float = 300.0
    """One step of a weight update; and how long a run goes on without any server."""
    health_s: float = 30.0
    """A sign of life. A busy server is slow to give one."""
    connect_s: float = 10.0
    poll_s: float = 1.0
    """Between two looks at a server that is gone."""


class _Token(msgspec.Struct):
    logprob: float


class _LogProbs(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    """Tokens start <= i < end of a response, and the weights that wrote them."""

    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    """What is read of a response; the rest of the JSON is skipped."""

    token_ids: list[int]
    finish_reason: str
    logprobs: _LogProbs
    weight_versions: list[_Span] | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]


class Server:
    """Coroutines that ask one server. Each raises ServerLost or RequestRefused."""

    def __init__(self, url: str, session: aiohttp.ClientSession, limits: Limits, *, fork_decoding: bool = False) -> None:
        """`fork_decoding`: whether requests ask for `Sampling.forks`, which the server must know of."""
        self.url = url.rstrip("/")
        self._fork_decoding = fork_decoding
        self._session = session
        self._limits = limits

    async def healthy(self) -> bool:
        """Whether the server and its workers say that they are well. Raises WrongSecret."""
        try:
            await self._ask("GET", "/health", self._limits.health_s)
        except WrongSecret:
            raise
        except (ServerLost, RequestRefused):
            return False
        return True

    async def until_healthy(self) -> None:
        while not await self.healthy():
            await asyncio.sleep(self._limits.poll_s)

    async def while_healthy(self) -> None:
        """Raises ServerLost once it is not: a host that loses its power closes no connection."""
        while await self.healthy():
            await asyncio.sleep(5 * self._limits.poll_s)
        raise ServerLost(f"{self.url} gives no sign of life")

    async def complete(self, request: Request, sampling: Sampling, oldest: int) -> Completion:
        """The response to one request. Raises ServerLost also when weights before version `oldest` wrote of it."""
        choice = await self._generate(request.prompt, **sampling_arguments(request, sampling))
        if choice.finish_reason not in ("stop", "length"):
            raise ServerLost(f"{self.url} ended a response with {choice.finish_reason!r}")
        spans = choice.weight_versions or []
        versions = [int(span.version) for span in spans if span.version.isdecimal() for _ in range(span.start, span.end)]
        if len(versions) != len(choice.token_ids) or min(versions, default=oldest) < oldest:
            said = ", ".join(span.version for span in spans)
            raise ServerLost(f"{self.url} answered with the weights {said} instead of {oldest}: it was started again")
        return Completion(
            tokens=choice.token_ids,
            log_probs=[token.logprob for token in choice.logprobs.content],
            truncated=choice.finish_reason == "length",
            versions=versions,
        )

    async def longest_sequence(self) -> int:
        """Tokens of a prompt and its response together."""
        models = msgspec.json.decode(await self._ask("GET", "/v1/models", self._limits.health_s))
        return int(models["data"][0]["max_model_len"])

    async def workers(self) -> int:
        """Ranks of the server's engine."""
        return int(msgspec.json.decode(await self._ask("GET", "/get_world_size", self._limits.health_s))["world_size"])

    async def weight_version(self) -> str:
        """Of the last update that was finished; "default" after a start."""
        return str(msgspec.json.decode(await self._ask("GET", "/weight_info", self._limits.health_s))["weight_version"])

    async def join(self, init_info: dict[str, Any]) -> None:
        """Have the workers join the trainer's process group; returns when they have."""
        await self._post("/init_weight_transfer_engine", {"init_info": init_info})

    async def start_update(self, *, keep: bool) -> None:
        """Make ready for new weights: hold up what is being written if `keep`, or drop what an earlier trainer left running."""
        await self._post(f"/pause?mode={'keep' if keep else 'abort'}")  # either way nothing stays cached of the old weights
        if any(state["open"] for state in await self._update_states()):  # of a trainer that died
            await self._post("/finish_weight_update")
        await self._post("/start_weight_update")

    async def receive(self, update_info: dict[str, Any]) -> None:
        """Have the workers receive and load one bucket; returns when they have."""
        await self._post("/update_weights", {"update_info": update_info})

    async def finish_update(self, version: int) -> None:
        """Make the new weights the ones that answer, and see that they do. Raises ServerLost when not every worker has all of them."""
        for state in await self._update_states():
            if state["problem"] is not None:
                await self._post("/finish_weight_update")
                raise ServerLost(f"{self.url} could not load the weights: {state['problem']}")
        await self._post("/finish_weight_update", {"weight_version": str(version)})
        await self._post("/reset_prefix_cache")  # what is cached was computed by the old weights
        await self._post("/resume")
        # With one token to choose from, the log-prob under the distribution that is sampled from is 0. That of the raw logits, which
        # vLLM gives by default, would be wrong at every temperature but 1.
        if await self._certain(top_k=1) != 0.0:
            raise ServerLost(f"{self.url} gives log-probs of raw logits: start it with --logprobs-mode processed_logprobs")
        if self._fork_decoding and await self._certain(extra_args=ForkTemperature(0.0, 0.0).arguments) != 0.0:
            raise ServerLost(f"{self.url} does not know rollout.fork_temperature: start it with this run's recipe")

    async def _certain(self, **sampling: Any) -> float:
        """The log-prob of a token under a sampling that leaves one to choose from."""
        choice = await self._generate([0], max_tokens=1, ignore_eos=True, **sampling)
        return choice.logprobs.content[0].logprob

    async def _update_states(self) -> list[dict[str, Any]]:
        """`receiver.Receiver.weight_update_state` of every worker."""
        reply = await self._ask("POST", "/collective_rpc", self._limits.server_s, {"method": "weight_update_state"})
        return list(msgspec.json.decode(reply)["results"])

    async def _generate(self, prompt: Any, **sampling: Any) -> _Choice:
        body = {"token_ids": list(prompt), "sampling_params": {"logprobs": 0, "detokenize": False, **sampling}}
        content = await self._ask("POST", "/inference/v1/generate", self._limits.request_s, body)
        try:
            return msgspec.json.decode(content, type=_Reply).choices[0]
        except (msgspec.DecodeError, IndexError) as error:
            raise ServerLost(f"{self.url} answered what is no response: {error}") from error

    async def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        await self._ask("POST", path, self._limits.server_s, body)

    async def _ask(self, method: str, path: str, limit_s: float, body: dict[str, Any] | None = None) -> bytes:
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=self._limits.connect_s)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as reply:
                content = await reply.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerLost(f"{self.url}{path}: {str(error) or f'no answer in {limit_s:g} s'}") from error
        if reply.status >= 500:
            raise ServerLost(f"{self.url}{path} failed: {_first_words(content)}")
        if reply.status == 401:
            mine = "not the one of this process" if secret() else "and this process has none"
            raise WrongSecret(f"{self.url} asks for the {NAME} that it was started with, {mine}")
        if reply.status >= 400:
            raise RequestRefused(f"{self.url}{path} refused ({reply.status}): {_first_words(content)}")
        return content


def _first_words(content: bytes) -> str:
    return " ".join(content.decode(errors="replace").split())[:300]
