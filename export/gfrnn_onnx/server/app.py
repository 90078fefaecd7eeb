"""The routes, and errors as OpenAI words them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from gfrnn_onnx.runner import Step
from gfrnn_onnx.server.completions import Run, States, built, check_ends, check_values, read_texts, size, submit
from gfrnn_onnx.server.engine import Engine, Job, finished
from gfrnn_onnx.server.limits import GONE, Gate, Limits, error_response
from gfrnn_onnx.server.metrics import Metrics
from gfrnn_onnx.server.protocol import (
    START,
    START_TEXT,
    UNKNOWN,
    ApiError,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    Given,
    Health,
    Model,
    Models,
    ScoreAnswer,
    ScoreRequest,
    Text,
    TextScore,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
    encode,
    texts,
)
from gfrnn_onnx.server.text import decode

T = TypeVar("T")

_TYPES = {"str", "int", "float"}
"""pydantic's names in the place of a mistake for what a field may be; others, such as list[int], are no identifiers."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 405, 408, 413, 429, 500, 503)
}
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


class Service:
    """One model, its engine, and what is kept for clients."""

    def __init__(self, step: Step, name: str, limits: Limits):
        self.step, self.name, self.limits = step, name, limits
        self.metrics = Metrics()
        self.engine = Engine(
            step,
            limits.rows,
            max_waiting=limits.max_waiting,
            cache_bytes=limits.cache_mb << 20,
            metrics=self.metrics,
        )
        self.states = States(limits.states, limits.state_seconds)
        self.created = int(time.time())
        self.stopping = False

    def check(self) -> None:
        """Raises ApiError where no request can be worked on."""
        if self.stopping:
            raise ApiError(503, "the server is stopping; try another, or again later", code="stopping")
        if not self.engine.healthy:
            raise ApiError(503, "the server's stepping thread failed; its log says why", code="failed")

    def model(self) -> Model:
        """As /v1/models has it."""
        metadata, (layers, hidden) = self.step.metadata, self.step.shape
        return Model(
            id=self.name,
            created=self.created,
            precision=metadata.precision,
            layers=layers,
            hidden_size=hidden,
            gates=self.step.has_gates,
            bpc=metadata.bpc,
        )


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of work, or None (and the work cancelled) if the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()


def make_app(service: Service, api_key: str | None = None) -> Gate:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            service.engine.close()

    app = FastAPI(
        title="gfrnn",
        description="A gated-feedback RNN of bytes behind OpenAI's completions interface.",
        lifespan=lifespan,
        responses=_ERRORS,
        strict_content_type=False,  # a Gate lets no type through
        redoc_url=None,
        docs_url=None,  # its page loads scripts from elsewhere
    )
    _handle_errors(app)
    _add_completions(app, service)
    _add_tokenizer(app)
    _add_state_of_things(app, service)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    return Gate(app, service.limits, service.metrics, api_key, paths)


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=Completion, responses={200: _STREAM})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue one or more prompts; with `stream` as server-sent events."""
        service.check()
        begin = time.perf_counter()
        run = Run(body, service.engine, service.limits, service.states, service.name)
        if not body.stream:
            try:
                answer = await _unless_gone(request, run.whole())
            finally:
                run.cancel()
            if answer is None:
                return Response(status_code=GONE)
            return Response(answer, media_type="application/json")

        async def events() -> AsyncIterator[str]:
            first = True
            try:
                async for event in run.pieces():
                    if first and run.begun:
                        service.metrics.first_seconds.observe(time.perf_counter() - begin)
                        first = False
                    yield event
            finally:
                run.cancel()

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    @app.post("/v1/score", response_model=ScoreAnswer)
    async def score(request: Request, body: ScoreRequest) -> Response:
        """Bits that the model needs for each byte of texts."""
        service.check()
        limits = service.limits
        pieces = [given.symbols for given in read_texts(body.text, "text", limits)]
        check_values(sum(map(len, pieces)), 0, "text", limits)
        deadline = time.monotonic() + limits.request_seconds
        changed = asyncio.Event()
        jobs = [Job(piece, 0, top=0, prompt_tokens=True, deadline=deadline, changed=changed) for piece in pieces]
        submit(service.engine, jobs, limits)

        async def done() -> bytes:
            await finished(jobs)
            check_ends(jobs)
            return await built(lambda: _scores(jobs), size(jobs))

        try:
            answer = await _unless_gone(request, done())
        finally:
            service.engine.cancel(jobs)
        if answer is None:
            return Response(status_code=GONE)
        return Response(answer, media_type="application/json")

    @app.delete("/v1/states/{state}", status_code=204)
    async def forget(state: str) -> Response:
        """Keep a state no longer."""
        service.states.remove(state)
        return Response(status_code=204)


def _scores(jobs: list[Job]) -> bytes:
    return ScoreAnswer(scores=[_score(job) for job in jobs]).model_dump_json().encode()


def _score(job: Job) -> TextScore:
    bits = [max(0.0, -token.log_probability / float(np.log(2))) for token in job.tokens]
    total = float(sum(bits))
    return TextScore(bits=bits, total_bits=total, bpc=total / len(bits) if bits else None)


def _add_tokenizer(app: FastAPI) -> None:
    """At the root, where lm-eval's remote tokenizer looks for them."""

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Every byte is a token."""
        return TokenizerInfo()

    @app.post("/tokenize", response_model=Tokens)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Text to the ids of its bytes."""
        answer = await built(lambda: _tokens(body.prompt), len(body.prompt))
        return Response(answer, media_type="application/json")

    @app.post("/detokenize", response_model=Text)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Ids to text."""
        answer = await built(lambda: _text(body.tokens), len(body.tokens))
        return Response(answer, media_type="application/json")


def _tokens(given: str) -> bytes:
    text = given.removeprefix(START_TEXT)
    found = [START] * (text != given) + list(encode(text, "prompt"))
    # not looked through again: there may be millions
    return Tokens.model_construct(tokens=found, count=len(found), max_model_len=2**31 - 1).model_dump_json().encode()


def _text(ids: list[int]) -> bytes:
    given = texts(ids, "tokens")[0] if ids else Given(b"", False)
    return Text(prompt=START_TEXT * given.marked + decode(given.symbols)).model_dump_json().encode()


def _add_state_of_things(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Models:
        """The one model that is served."""
        return Models(data=[service.model()])

    @app.get("/v1/models/{model:path}")  # --name may have a slash
    async def model(model: str) -> Model:
        """The same by its name."""
        if model != service.name:
            raise ApiError(404, f"The model {model!r} does not exist", param="model", code="model_not_found")
        return service.model()

    @app.get("/healthz", responses={503: {"model": Health}})
    async def healthz() -> Response:
        """Whether requests can be worked on."""
        engine = service.engine
        status: Literal["ok", "stopping", "failed"] = "ok" if engine.healthy else "failed"
        if service.stopping:
            status = "stopping"
        health = Health(
            status=status,
            model=service.name,
            provider=service.step.provider,
            rows=engine.capacity,
            rows_in_use=len(engine.running),
            waiting=engine.waiting,
        )
        return JSONResponse(health.model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        file = resources.files("gfrnn_onnx.server") / "page.html"
        return HTMLResponse(file.read_text(encoding="utf-8"))


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        response = error_response(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_in_words(error))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return error_response(ApiError(500, f"a fault of the server ({type(error).__name__}); its log has more"))


def _in_words(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request."""
    found = error.errors()
    # of a field that may be one of several things, the complaint that came closest: the deepest
    worst = max(found, key=lambda each: len(each["loc"]))
    parts = [part for part in worst["loc"] if isinstance(part, int) or (part.isidentifier() and part not in _TYPES)]
    place = [str(part) for part in parts if part != "body"]
    param = place[0] if place else None
    if worst["type"] == UNKNOWN:
        name = worst["ctx"]["name"]
        return ApiError(400, f"{worst['msg']}: {name}", param=param or name)
    if worst["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {worst.get('ctx', {}).get('error', '')}")
    return ApiError(400, f"{'.'.join(place) or 'the body'}: {worst['msg']}", param=param)
