"""One forked worker: it answers from the models that it was forked with, until others come in its place.

The supervisor tells it what goes on outside, and when it is to end: with the service (`stop`, as SIGTERM says it), or
because a newer generation answers (`leave`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, override

from app.channel import Channel, Closed, Message
from app.direct import protocol_for
from app.protocol import POLL_SECONDS, DrainingServer, configuration
from app.refresher import Outcome
from app.spans import Span

if TYPE_CHECKING:
    import uvicorn

    from app.limits import Limits
    from app.registry import Registry
    from app.tracing import Exporter
    from app.view import View

GREETING_SECONDS = 10.0
LISTENERS_SECONDS = 1.0  # for the other processes to let go of the listening socket, before this one does


class WorkerServer(DrainingServer):
    """A draining server that tells the supervisor how far it is, and ends when that says so, or is gone."""

    def __init__(
        self,
        config: uvicorn.Config,
        registry: Registry,
        view: View,
        channel: Channel,
        *,
        limits: Limits,
        drain_seconds: float,
        exporter: Exporter | None = None,
    ) -> None:
        super().__init__(config, registry, limits=limits, drain_seconds=drain_seconds)
        self._exporter = exporter
        self._view = view
        self._channel = channel
        self._leaving = False
        self._greeted = asyncio.Event()
        self._stop_told = asyncio.Event()
        self._asks: dict[str, asyncio.Future[Outcome]] = {}
        self._numbers = itertools.count()
        self._telling: asyncio.Task[None] | None = None
        view.ask = self._ask

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept once the supervisor has told what there is to tell, and say so."""
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._hear)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._greeted.wait(), GREETING_SECONDS)
        await super().startup(sockets)
        self._channel.send_now("ready")

    @property
    @override
    def _is_last(self) -> bool:
        return self._stop_told.is_set()

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was accepted; what waits to be is for those who stay, if there are any."""
        if self._leaving:
            self._telling = asyncio.create_task(self._tell_when_drained())
            await super().shutdown(None)
            return
        # Who has the socket open but does not accept would keep new callers waiting in vain.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop_told.wait(), LISTENERS_SECONDS)
        await super().shutdown(sockets)

    def _hear(self) -> None:
        try:
            messages = self._channel.receive()
        except Closed:  # the supervisor is gone, and with it who would replace and stop this process
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._stop_told.set()
            self.handle_exit(signal.SIGTERM, None)
            return
        for message in messages:
            self._follow(message)

    def _follow(self, message: Message) -> None:
        match message["kind"]:
            case "view":
                self._view.follow(message["view"])
            case "service":
                self._view.hear(message["service"])
                self._greeted.set()
            case "spans":
                if self._exporter is not None:
                    self._exporter.add([Span(*span) for span in message["spans"]])
            case "looked":
                for ask in message["asks"]:
                    if (future := self._asks.get(ask)) is not None and not future.done():
                        future.set_result(outcome_from(message["outcome"]))
            case "leave":
                self._leaving = self._leaving or not self.should_exit
                self.leave()
            case "stop":
                self._stop_told.set()
                self.handle_exit(signal.SIGTERM, None)

    async def _ask(self) -> Outcome:
        ask = f"{os.getpid()}-{next(self._numbers)}"
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._asks[ask] = future
        self._channel.send_now("look", ask=ask)
        try:
            return await future
        finally:
            del self._asks[ask]

    async def _tell_when_drained(self) -> None:
        """Tell when nobody is left to be answered but those who wait for what comes after this."""
        while len(self.server_state.connections) > len(self._asks):
            await asyncio.sleep(POLL_SECONDS)
        self._channel.send_now("drained")


def outcome_from(fields: dict[str, Any]) -> Outcome:
    """Return an outcome as another process has had it."""
    return Outcome(**fields | {"loaded": tuple(fields["loaded"]), "retired": tuple(fields["retired"])})


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON has it."""
    return asdict(outcome)


def prepared(app: Any) -> uvicorn.Config:
    """Return the server's configuration with all that serving imports: made before the fork, the workers share it."""
    config = configuration(app, protocol_for(app))
    config.load()
    config.get_loop_factory()
    return config


def serve(
    config: uvicorn.Config,
    registry: Registry,
    view: View,
    sock: socket.socket,
    channel: Channel,
    *,
    limits: Limits,
    drain_seconds: int,
    exporter: Exporter | None = None,
) -> None:
    """Serve an application on a listening socket that others share, until the supervisor ends it, or a signal does.

    What the process that looks at the bucket tells of that, `exporter` sends.
    """

    async def run() -> None:
        server = WorkerServer(
            config, registry, view, channel, limits=limits, drain_seconds=drain_seconds, exporter=exporter
        )
        await server.serve(sockets=[sock])

    asyncio.run(run(), loop_factory=config.get_loop_factory())
