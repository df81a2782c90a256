"""One client's connection, down to its TCP segments."""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import AsyncIterator

READER_BYTES = 65_536  # asyncio stops reading at twice this, so that a body can really stay unread
_FLUSH_MS_MAX = 1_000


class WatchfulReader(asyncio.StreamReader):
    """A reader that tells at once when the client closes, though nobody reads."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit=limit)
        self.left = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.left.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.left.set()


class Connection:
    """One client's connection; its methods raise ConnectionError once the client has left."""

    def __init__(self, reader: WatchfulReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._socket = writer.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer.transport.set_write_buffer_limits(high=0)  # what is drained has reached the kernel

    async def read_head(self) -> tuple[str, str, list[tuple[str, str]]] | None:
        """Method, path with its query and headers of the next request; None if the client closed instead."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        request_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = request_line.split(" ")
        pairs = (line.split(":", 1) for line in lines)
        return method, target, [(name.lower(), value.strip()) for name, value in pairs]

    async def read_body(self, size_bytes: int) -> AsyncIterator[bytes]:
        """The pieces of a body, as they come.

        Raises asyncio.IncompleteReadError if the client closes before its end.
        """
        missing_bytes = size_bytes
        while missing_bytes:
            piece = await self._reader.read(min(missing_bytes, READER_BYTES))
            if not piece:
                raise asyncio.IncompleteReadError(b"", missing_bytes)
            missing_bytes -= len(piece)
            yield piece

    async def write(self, octets: bytes, segment_bytes: int | None = None) -> None:
        """Hands `octets` to the kernel, in writes of `segment_bytes` if given; the loop runs after each."""
        step = segment_bytes or max(1, len(octets))
        for start in range(0, len(octets), step):
            if self._reader.left.is_set():
                raise ConnectionResetError
            self._writer.write(octets[start : start + step])
            await self._writer.drain()
            await asyncio.sleep(0)

    async def pause(self, duration_s: float) -> None:
        """Waits, but not for a client that leaves."""
        if duration_s <= 0:
            return
        try:
            async with asyncio.timeout(duration_s):
                await self._reader.left.wait()
        except TimeoutError:
            return
        raise ConnectionResetError

    async def reset(self) -> None:
        """Sends what was written, then a TCP reset."""
        for _ in range(_FLUSH_MS_MAX):
            if not self._unacknowledged_bytes():
                break
            await asyncio.sleep(0.001)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        """Closes without waiting for anything."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Closes cleanly, if it is still open, and waits until the socket is gone."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    def _unacknowledged_bytes(self) -> int:
        """Bytes that a reset would throw away; 0 where the kernel does not tell."""
        try:
            (size_bytes,) = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))
        except OSError:
            return 0
        return size_bytes
