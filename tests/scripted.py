"""A provider that fails on command: an HTTP server on a socket that answers as a script says, whatever it is asked."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = b'{"error":{"message":"It failed.","type":"server_error","param":null,"code":null}}'


class Scripted:
    """Answers with `status`, `headers` and `body`, or with status 0 closes the connection without a word."""

    def __init__(self) -> None:
        self.calls = 0
        self.answers_with(503)

    def answers_with(self, status: int, body: bytes = ERROR, **headers: str) -> None:
        """From now on; the names of `headers` have underscores for hyphens."""
        self.status = status
        self.body = body
        self.headers = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }


@contextmanager
def scripted_provider() -> Iterator[tuple[Scripted, str]]:
    """A running one, and its base URL."""
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            script.calls += 1
            self.rfile.read(int(self.headers["content-length"]))
            if not script.status:
                self.close_connection = True
                return
            self.send_response(script.status)
            for name, value in {"content-length": str(len(script.body)), **script.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(script.body)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield script, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
