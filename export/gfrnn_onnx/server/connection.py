"""uvicorn's connection with time limits on clients that stall: it has one for those that are idle between requests."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


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
