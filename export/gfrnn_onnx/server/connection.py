"""uvicorn's connection with time limits on clients that stall: it has one for those that are idle between requests.

And with our words for what is no HTTP.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gfrnn_onnx.server.limits import error_response
from gfrnn_onnx.server.protocol import ApiError


class Connection(H11Protocol):
    """Closed where in `seconds` no whole head of a request comes, and cut where nothing of an answer is read."""

    seconds = 60.0
    _head: asyncio.TimerHandle | None = None
    _read: asyncio.TimerHandle | None = None
    _left = 0  # bytes that nobody has read, when last looked at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # paused: something is unread; resumed: all of it is taken
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._read):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Called when there are new data, and when a response has ended."""
        super().handle_events()
        self._await_head()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP; nothing where it comes in the body of a request that has its answer already."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # or its own answer would come after this
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error_response(ApiError(400, msg))
            headers = [*answer.raw_headers, (b"connection", b"close")]
            start = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (start, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Not said: uvicorn's advises to install WebSockets, and there are none here."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read is not None:
            self._read.cancel()
            self._read = None

    def _await_head(self) -> None:
        asked = self.cycle is not None and not self.cycle.response_complete
        if asked and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not asked and self._head is None:
            # its handler sends what is left of an answer first
            self._head = self.loop.call_later(self.seconds, self.timeout_keep_alive_handler)

    def _await_reading(self) -> None:
        self._left = self.transport.get_write_buffer_size()
        self._read = self.loop.call_later(self.seconds, self._check_reading)

    def _check_reading(self) -> None:
        if self.transport.get_write_buffer_size() >= self._left:
            self.transport.abort()  # close() would wait for the reader for ever
        else:
            self._await_reading()
