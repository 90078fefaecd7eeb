"""What stands between the network and the routes: who may ask, how large, how slowly; and counting. Plain ASGI.

(BaseHTTPMiddleware would hide from routes that a client has gone.)
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from gfrnn_onnx.server.metrics import Metrics
from gfrnn_onnx.server.protocol import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

GONE = 499
"""nginx's number for a client that went away before its answer: no one reads it."""
_OPEN = ("/", "/healthz", "/metrics")  # to anyone, key or not


@dataclass(frozen=True)
class Limits:
    """Of a server."""

    rows: int = 64
    """Sequences stepped together."""
    max_waiting: int = 256
    """Sequences that may wait for a row; more are told to come again."""
    max_prompt_bytes: int = 65536
    """Of one prompt."""
    max_tokens: int = 16384
    """Bytes that one completion may have."""
    max_sequences: int = 128
    """Prompts times choices of one request."""
    max_values: int = 1 << 21
    """That a request may ask for: of each byte that is reported on its logprobs, its gates and two more; 100 B each."""
    max_body_bytes: int = 4 << 20
    """Of a request."""
    body_seconds: float = 30.0
    """In which a request's body must have come."""
    request_seconds: float = 600.0
    """After which a request that is still worked on is given up."""
    idle_seconds: float = 60.0
    """After which a connection is closed where no whole head of a request comes, or nothing of an answer is read."""
    cache_mb: int = 64
    """Memory for states of prompts."""
    states: int = 1024
    """Kept for clients that go on later; the longest unused go first."""
    state_seconds: float = 3600.0
    """For which such a state is kept unused."""

    @property
    def most_sequences(self) -> int:
        """Of one request: max_sequences, or as many as there is ever room for."""
        return min(self.max_sequences, self.rows + self.max_waiting)


class Gate:
    """The app, with limits on requests, an optional key, and requests counted."""

    def __init__(self, app: App, limits: Limits, metrics: Metrics, api_key: str | None, paths: set[str]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.key = api_key.encode() if api_key else None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # every body is read as JSON, whatever it is said to be: curl -d says a form
        scope = {**scope, "headers": [each for each in scope["headers"] if each[0] != b"content-type"]}
        begin, status = time.perf_counter(), 0

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_head(scope)
            await self.app(scope, self._limited(receive), counting)
        except ApiError as error:
            if status:  # it has begun to answer
                raise
            if error.status == 413:
                await self._drain(receive)
            await error_response(error)(scope, receive, counting)
        finally:
            route = scope.get("route")  # FastAPI's, once it has found one
            path = getattr(route, "path", scope["path"])
            self.metrics.requests.labels(path if path in self.paths else "other", str(status or GONE)).inc()
            self.metrics.request_seconds.observe(time.perf_counter() - begin)

    def _check_head(self, scope: MutableMapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key):
                raise ApiError(
                    401, "Incorrect API key provided: send it as Authorization: Bearer KEY", code="invalid_api_key"
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:19]) > self.limits.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self.limits.max_body_bytes} bytes", code="request_too_large")

    async def _drain(self, receive: Receive) -> None:
        """Reads what is left of a body that is too large: who is still sending it would not see the answer."""
        left = 16 * self.limits.max_body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.body_seconds):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return

    def _limited(self, receive: Receive) -> Receive:
        size, more = 0, True
        until = asyncio.get_running_loop().time() + self.limits.body_seconds

        async def limited() -> Message:
            nonlocal size, more
            if not more:  # the body is here: what comes now is the client going away, whenever that is
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the request's body had not come after {self.limits.body_seconds:g} s", code="timeout"
                ) from None
            if message["type"] == "http.disconnect":
                raise ApiError(GONE, "the client is gone")
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
                if size > self.limits.max_body_bytes:
                    if more:
                        await self._drain(receive)
                    raise self._too_large()
            return message

        return limited


def error_response(error: ApiError) -> JSONResponse:
    """The answer that an error is."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not waited for
    if error.status == 408:
        headers["x-should-retry"] = "false"  # to OpenAI's client, which would ask again what takes too long
    return JSONResponse(error.body(), error.status, headers=headers)
