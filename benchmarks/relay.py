"""A relay on loopback that counts the bytes at its sockets, in both directions."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from fedclip.deploy.addresses import Address

PIECE = 1 << 16


@dataclass
class Counted:
    """Bytes of payload that TCP has carried: TLS, HTTP, Flower and what is sent by it."""

    up: int = 0
    down: int = 0

    def since(self, before: Counted) -> Counted:
        """What has come on top of an earlier count."""
        return Counted(self.up - before.up, self.down - before.down)


class Relay:
    """Listens on `here` and hands all on to `there`; use it as a context manager."""

    def __init__(self, here: Address, there: Address) -> None:
        self._here, self._there = here, there
        self._counted = Counted()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def counted(self) -> Counted:
        """The count at this moment."""
        return Counted(self._counted.up, self._counted.down)

    def __enter__(self) -> Self:
        self._thread.start()
        listening = asyncio.start_server(self._serve, self._here.host, self._here.port)
        asyncio.run_coroutine_threadsafe(listening, self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, site: asyncio.StreamReader, to_site: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_connection(self._there.host, self._there.port)
        except OSError:
            to_site.close()
            return
        await asyncio.gather(
            self._hand_on(site, to_server, "up"), self._hand_on(server, to_site, "down")
        )

    async def _hand_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str
    ) -> None:
        with suppress(OSError):
            while piece := await source.read(PIECE):
                setattr(self._counted, way, getattr(self._counted, way) + len(piece))
                sink.write(piece)
                await sink.drain()
        sink.close()
