"""Serve an exported model over HTTP: gfrnn-serve, python export/serve.py MODEL."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gfrnn.cli import parse, run, say
from gfrnn.config import UserError
from gfrnn_onnx.names import ModelError, find_model, is_utf8
from gfrnn_onnx.server.limits import Limits

if TYPE_CHECKING:
    import uvicorn

    from gfrnn_onnx.server.app import Service

_QUEUE = 2048  # connections that may wait to be taken


@dataclass(frozen=True)
class ServeSettings:
    """Serve an exported model of text: OpenAI's completions interface, scores, and a page to try it."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A step.onnx that to_onnx.py has written, or the name of a model that ships."""
    host: str = "127.0.0.1"
    """Address to listen at. Another than the loopback opens it to the network: then give a key too."""
    port: int = 8000
    """0 takes a free one."""
    name: str | None = None
    """Of the model, for clients. Default: the file's, without .onnx."""
    api_key: str | None = None
    """Answer only requests with this key. Default: the environment's GFRNN_API_KEY, if it is set."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where it works, else (and for int8) the CPU."""
    threads: int = 0
    """Of a CPU's products; 0: one a core."""
    limits: Limits = field(default_factory=Limits)


def main() -> None:
    """gfrnn-serve."""
    run(_main)


def _main() -> None:
    settings = parse(ServeSettings, sys.argv[1:])
    model = _validate(settings)
    import uvicorn

    from gfrnn_onnx.runner import Step
    from gfrnn_onnx.server.app import Service, make_app
    from gfrnn_onnx.server.connection import Connection

    key = os.environ.get("GFRNN_API_KEY") if settings.api_key is None else settings.api_key
    if key is not None and not key.strip():  # of a variable that is not set, most likely
        raise UserError("the key (--api-key, or GFRNN_API_KEY) is empty: leave it out to serve without one")
    if key is not None and not is_utf8(key):
        raise UserError("the key (--api-key, or GFRNN_API_KEY) is not UTF-8; give another")
    listener = _listen(settings.host, settings.port)
    provider = None if settings.provider == "auto" else settings.provider
    try:
        step = Step(model, provider, threads=settings.threads or None)
        if step.metadata.kind != "text":
            raise ModelError(f"{settings.model} is half of a model of programs: only models of text are served")
        service = Service(step, settings.name or settings.model.stem, settings.limits)
    except ModelError as error:
        raise UserError(str(error)) from error
    app = make_app(service, key)
    config = uvicorn.Config(
        app,
        http=type("Connection", (Connection,), {"seconds": settings.limits.idle_seconds}),
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="on",
        backlog=1,  # that asyncio takes at a time: where descriptors run out, it tries each of them, and says so
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.limits.request_seconds),  # a client may read its answer slowly
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server = _server(config, service)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    layers, hidden = step.shape
    say(
        f"serving {service.name} ({layers} x {hidden}, {step.metadata.precision}) on {step.provider} at "
        f"http://{shown}:{port} , {settings.limits.rows} rows{', with a key' if key else ''}"
    )
    server.run(sockets=[listener])
    say("stopped")


def _server(config: uvicorn.Config, service: Service) -> uvicorn.Server:
    """Ends on SIGTERM and Ctrl-C once what runs is finished, at a second one at once; and then returns."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().set_exception_handler(_complain)
            await super().startup(sockets)
            for each in sockets or ():
                each.listen(_QUEUE)  # asyncio has made it the backlog

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn's own raises the signal again at the end: a clean stop would look like a kill
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                os._exit(128 + sig)
            service.stopping = True
            self.should_exit = True
            say("stopping: what runs is finished first; a second signal ends at once")

    return Server(config)


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """In a line where a connection cannot be taken (no descriptor is left, say): asyncio tries again each second."""
    error = context.get("exception")
    if "socket" in context and isinstance(error, OSError):
        say(f"new clients wait: {error.strerror}")
    else:
        loop.default_exception_handler(context)


def _validate(settings: ServeSettings) -> Path:
    """Refuses what cannot work before anything is loaded; the model's file. Raises UserError."""
    if not 0 <= settings.port < 65536:
        raise UserError(f"--port is {settings.port}; it must be from 0 to 65535")
    if settings.name is not None and not is_utf8(settings.name):
        raise UserError(f"--name {settings.name}: is not UTF-8; give another name")
    if settings.threads < 0:
        raise UserError(f"--threads is {settings.threads}; it must not be negative")
    limits = settings.limits
    for name, least, most in (
        ("rows", 1, 4096),
        ("max_waiting", 0, 10**6),
        ("max_prompt_bytes", 1, 1 << 30),
        ("max_tokens", 1, 1 << 30),
        ("max_sequences", 1, 10**6),
        ("max_values", 2, 1 << 31),
        ("max_body_bytes", 1, 1 << 31),
        ("body_seconds", 0.001, 86400),
        ("request_seconds", 0.001, 864000),
        ("idle_seconds", 0.001, 86400),
        ("cache_mb", 0, 1 << 20),
        ("states", 1, 10**7),
        ("state_seconds", 0.001, 10**9),
    ):
        value = getattr(limits, name)
        if not least <= value <= most:  # nor nan
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be from {least} to {most}")
    if settings.model.is_dir():
        raise UserError(f"{settings.model} is a folder: only models of text are served, which are one file")
    try:
        return find_model(settings.model)
    except ModelError as error:
        raise UserError(str(error)) from error


def _listen(host: str, port: int) -> socket.socket:
    """A socket there; raises UserError if that cannot be."""
    with suppress(ImportError, ValueError, OSError):  # a thousand clients are a thousand files
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # by its name, or asyncio takes it for something else and leaves small packets to wait for each other (40 ms)
        listener = socket.socket(found[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # of connections: that a client reads is seen only once a third of it is free
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        listener.bind(found[4])
        listener.listen(_QUEUE)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no host can have
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot listen at {host}:{port} ({why}); give another --host or --port") from error
    return listener
