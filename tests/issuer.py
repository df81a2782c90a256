"""An issuer of tokens on a socket: it publishes its keys, falls silent, and counts who asks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Issuer:
    """Answers `body` with `status`; `url` is that of its keys."""

    def __init__(self) -> None:
        self.status = 200
        self.body = b'{"keys": []}'
        self.asked = 0
        self.url = ""


@contextmanager
def publishing() -> Iterator[Issuer]:
    """A running issuer on 127.0.0.1, ended with the block."""
    issuer = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.asked += 1
            self.send_response(issuer.status)
            self.send_header("Content-Length", str(len(issuer.body)))
            self.end_headers()
            self.wfile.write(issuer.body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    issuer.url = f"http://127.0.0.1:{server.server_port}/jwks"
    try:
        yield issuer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
