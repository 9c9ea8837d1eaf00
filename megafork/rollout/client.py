"""Client of one vLLM server over HTTP: health checks, generation requests and weight updates.

vLLM (0.32) serves its weight-transfer routes under VLLM_SERVER_DEV_MODE=1 and token-in, token-out generation under --enable-scale-out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgspec

from megafork.compat import vllm_entropy
from megafork.rl.fork_temperature import ForkTemperature
from megafork.rollout.engine import Completion, Request, Sampling
from megafork.rollout.vllm_arguments import sampling_arguments
from megafork.secret import NAME, secret

_T = TypeVar("_T")


class ServerLost(Exception):
    """A server did not answer in time, failed, or holds the wrong weights: take it out of service and ask another."""


class RequestRefused(RuntimeError):
    """A server understood a request and rejected it (HTTP 4xx), as any other server would."""


class WrongSecret(RequestRefused):
    """A server was started with a secret other than this process's (HTTP 401)."""


@dataclass(frozen=True)
class Limits:
    """Concurrency limit per server, and timeouts in seconds."""

    in_flight: int = 256
    """Concurrent requests per server."""
    request_s: float = 3600.0
    """Timeout of one response."""
    server_s: float = 300.0
    """Timeout of one step of a weight update, and how long a run survives without any server."""
    health_s: float = 30.0
    """Timeout of a health check. A busy server is slow to answer one."""
    connect_s: float = 10.0
    poll_s: float = 1.0
    """Interval between checks on a lost server."""


class _Value(msgspec.Struct):
    token_id: int
    logprob: float


class _Token(msgspec.Struct):
    logprob: float
    top_logprobs: list[_Value] = []
    """The token's own and, if asked for, its entropy (`compat.vllm_entropy`)."""

    @property
    def entropy(self) -> float | None:
        return next((value.logprob for value in self.top_logprobs if value.token_id == vllm_entropy.MARK), None)


class _LogProbs(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    """Tokens start <= i < end of a response, and the version of the weights that generated them."""

    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    """The fields of a response that are read; the rest of the JSON is skipped."""

    token_ids: list[int]
    finish_reason: str
    logprobs: _LogProbs
    weight_versions: list[_Span] | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]


class Server:
    """Coroutines that query one server. Each may raise ServerLost or RequestRefused."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, limits: Limits, *, fork_decoding: bool = False, entropies: bool = False
    ) -> None:
        """`fork_decoding`, `entropies`: whether requests use `Sampling.forks` and `Sampling.entropies`, which the server must support."""
        self.url = url.rstrip("/")
        self._fork_decoding = fork_decoding
        self._entropies = entropies
        self._session = session
        self._limits = limits

    async def healthy(self) -> bool:
        """Whether the server and its workers report that they are healthy. Raises WrongSecret."""
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
        """Raise ServerLost once the server is unhealthy: a host that loses power closes no connection."""
        while await self.healthy():
            await asyncio.sleep(5 * self._limits.poll_s)
        raise ServerLost(f"{self.url} gives no sign of life")

    async def complete(self, request: Request, sampling: Sampling, oldest: int) -> Completion:
        """The response to one request. Also raises ServerLost if weights older than version `oldest` generated any of it."""
        choice = await self._generate(request.prompt, **sampling_arguments(request, sampling))
        if choice.finish_reason not in ("stop", "length"):
            raise ServerLost(f"{self.url} ended a response with {choice.finish_reason!r}")
        spans = choice.weight_versions or []
        versions = [int(span.version) for span in spans if span.version.isdecimal() for _ in range(span.start, span.end)]
        if len(versions) != len(choice.token_ids) or min(versions, default=oldest) < oldest:
            said = ", ".join(span.version for span in spans)
            raise ServerLost(f"{self.url} answered with the weights {said} instead of {oldest}: it was started again")
        entropies = [token.entropy for token in choice.logprobs.content] if sampling.entropies else []
        if None in entropies:
            raise ServerLost(self._without_entropies)
        return Completion(
            tokens=choice.token_ids,
            log_probs=[token.logprob for token in choice.logprobs.content],
            truncated=choice.finish_reason == "length",
            versions=versions,
            entropies=[value for value in entropies if value is not None],
        )

    @property
    def _without_entropies(self) -> str:
        return f"{self.url} returns no entropies, which forks.entropy_from=rollout needs: start it by megafork.rollout.serve"

    async def longest_sequence(self) -> int:
        """Maximum number of tokens in a prompt and its response together."""
        return await self._told(lambda models: int(models["data"][0]["max_model_len"]), "GET", "/v1/models", self._limits.health_s)

    async def workers(self) -> int:
        """Number of ranks in the server's engine."""
        return await self._told(lambda size: int(size["world_size"]), "GET", "/get_world_size", self._limits.health_s)

    async def weight_version(self) -> str:
        """Weight version of the last finished update; "default" after a start."""
        return await self._told(lambda info: str(info["weight_version"]), "GET", "/weight_info", self._limits.health_s)

    async def join(self, init_info: dict[str, Any]) -> None:
        """Make the workers join the trainer's process group; returns once they have."""
        await self._post("/init_weight_transfer_engine", {"init_info": init_info})

    async def start_update(self, *, keep: bool) -> None:
        """Prepare for new weights: suspend running requests if `keep`, else abort those that an earlier trainer left behind."""
        await self._post(f"/pause?mode={'keep' if keep else 'abort'}")  # either way, nothing computed by the old weights stays cached
        if any(state["open"] for state in await self._update_states()):  # left open by a trainer that died
            await self._post("/finish_weight_update")
        await self._post("/start_weight_update")

    async def receive(self, update_info: dict[str, Any]) -> None:
        """Make the workers receive and load one bucket; returns once they have."""
        await self._post("/update_weights", {"update_info": update_info})

    async def finish_update(self, version: int) -> None:
        """Switch to the new weights and check that they are in use. Raises ServerLost unless every worker has all of them."""
        for state in await self._update_states():
            if state["problem"] is not None:
                await self._post("/finish_weight_update")
                raise ServerLost(f"{self.url} could not load the weights: {state['problem']}")
        await self._post("/finish_weight_update", {"weight_version": str(version)})
        await self._post("/reset_prefix_cache")  # its contents were computed by the old weights
        await self._post("/resume")
        # With only one token to choose from, the log-prob under the sampled distribution is 0. The log-prob of the raw logits, which
        # vLLM returns by default, would be wrong at every temperature except 1.
        if await self._certain(top_k=1) != 0.0:
            raise ServerLost(f"{self.url} gives log-probs of raw logits: start it with --logprobs-mode processed_logprobs")
        if self._fork_decoding and await self._certain(extra_args=ForkTemperature(0.0, 0.0).arguments) != 0.0:
            raise ServerLost(f"{self.url} does not know rollout.fork_temperature: start it with this run's recipe")

        if self._entropies:
            choice = await self._generate([0], max_tokens=1, ignore_eos=True, logprobs=vllm_entropy.ASKED)
            if choice.logprobs.content[0].entropy is None:
                raise ServerLost(self._without_entropies)

    async def _certain(self, **sampling: Any) -> float:
        """The log-prob of a token drawn with sampling parameters that leave only one candidate."""
        choice = await self._generate([0], max_tokens=1, ignore_eos=True, **sampling)
        return choice.logprobs.content[0].logprob

    async def _update_states(self) -> list[dict[str, Any]]:
        """`receiver.Receiver.weight_update_state` of every worker."""
        body = {"method": "weight_update_state"}
        return await self._told(lambda reply: list(reply["results"]), "POST", "/collective_rpc", self._limits.server_s, body)

    async def _generate(self, prompt: Any, **sampling: Any) -> _Choice:
        body = {"token_ids": list(prompt), "sampling_params": {"logprobs": 0, "detokenize": False, **sampling}}
        content = await self._ask("POST", "/inference/v1/generate", self._limits.request_s, body)
        try:
            return msgspec.json.decode(content, type=_Reply).choices[0]
        except (msgspec.DecodeError, IndexError) as error:
            raise ServerLost(f"{self.url} answered what is no response: {error}") from error

    async def _told(self, read: Callable[[Any], _T], method: str, path: str, limit_s: float, body: dict[str, Any] | None = None) -> _T:
        """What `read` finds in a reply's JSON. Anything may listen at an address, and answer with a page."""
        content = await self._ask(method, path, limit_s, body)
        try:
            return read(msgspec.json.decode(content))
        except (ValueError, TypeError, LookupError) as error:  # msgspec's are ValueErrors
            raise ServerLost(f"{self.url}{path} is not a roll-out server's: it answers {_first_words(content)!r}") from error

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
