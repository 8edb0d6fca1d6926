"""What the tests of federations over machines share: a server with TLS like a SuperLink's."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedclip.deploy.addresses import Address
from fedclip.deploy.keys.folder import SERVER, SERVER_KEY


class Health(http.server.BaseHTTPRequestHandler):
    """Answers `GET /health`."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Makes no noise about clients that break off a handshake."""

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def health_server(keys: Path | None) -> Iterator[Address]:
    """A server on loopback with the coordinator's certificate, or without TLS."""
    server = Server(("127.0.0.1", 0), Health)
    if keys is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys / SERVER, keys / SERVER_KEY)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield Address("127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
