"""Structured logs: one line an event, as JSON or for the console, on standard error.

Never a secret, a prompt or an answer: `_redact` is the last line of defence for keys, tokens and hashes that slip into
a message.
"""

import asyncio
import atexit
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from functools import lru_cache
from threading import Lock
from typing import Any, Literal, TextIO

import msgspec
import structlog

_SECRETS = re.compile(
    r"\b(sk-[A-Za-z0-9_-]{4})[A-Za-z0-9_-]{8,}|(?<=Bearer )\S+|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"
    r"|\$argon2\S+"
)
log = structlog.get_logger(__name__)
_LIBRARIES = ("httpx2", "httpcore2", "uvicorn", "asyncio", "litestar")


_direct: "_Lines | None" = None
"""Where lines go that need nothing but to be written: None where logs are for the console, or news are not wanted."""


def configure_logs(format_: Literal["auto", "json", "console"] = "auto", level: str = "info") -> None:
    """Send the logs of Tollgate and of its libraries to standard error, in one format. Call it once, at start.

    `format_` and `level` are those of `settings.LogSettings`.
    """
    is_console = sys.stderr.isatty() if format_ == "auto" else format_ == "console"
    colours = is_console and sys.stderr.isatty()
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact,
    ]
    renderer = (
        structlog.dev.ConsoleRenderer(colors=colours)
        if is_console
        else structlog.processors.JSONRenderer(serializer=_as_json)
    )
    lines = _Lines(sys.stderr)
    atexit.register(lines.write)
    os.register_at_fork(before=lines.write)
    structlog.configure(
        processors=[*processors, renderer] if is_console else [_line],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=True,
    )
    global _direct  # noqa: PLW0603 - as structlog's own configuration, it is the process's
    _direct = None if is_console or logging.getLevelName(level.upper()) > logging.INFO else lines
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)


def log_event(event: dict[str, Any], *, told: str) -> None:
    """Log, as news, an event that has its name in `event`: like any other, at a third of the price.

    `told` has all of its texts that were not made here: it alone is looked through for secrets.
    """
    if _direct is not None and not _may_hold_secret(told):
        _direct.info(_as_json({**event, "level": "info", "timestamp": _timestamp()}, default=repr))
    else:
        log.info(**event)


class _Lines:
    """Where lines go: those of one tick of an event loop are written together, since each write is a system call.

    What is worse than news is written at once, with all that came before it.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = Lock()
        self._held: list[str] = []

    def info(self, line: str) -> None:
        """Write `line` at the end of this tick; at once where no loop runs."""
        with self._lock:
            self._held.append(line)
            is_first = len(self._held) == 1
        if is_first:
            try:
                asyncio.get_running_loop().call_soon(self.write)
            except RuntimeError:
                self.write()

    debug = info

    def warning(self, line: str) -> None:
        """Write `line` at once."""
        with self._lock:
            self._held.append(line)
        self.write()

    error = critical = warning

    def write(self) -> None:
        """Write what is held."""
        with self._lock:
            held, self._held = self._held, []
        if held:
            self._file.write("\n".join((*held, "")))
            self._file.flush()


_format_exception = structlog.processors.format_exc_info


def _line(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    """All the steps of a line in JSON at once: each call writes one."""
    event["level"] = method
    event["timestamp"] = _timestamp()
    if "exc_info" in event:
        event = _format_exception(logger, method, event)
    line = _as_json(event, default=repr)
    if _may_hold_secret(line):  # what JSON escapes is in no mark
        line = _as_json(_redact(logger, method, event), default=repr)
    return line


def _timestamp() -> str:
    seconds, nanos = divmod(time.time_ns(), 10**9)
    return f"{_second(seconds)}.{nanos // 1000:06d}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def _redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str) and _may_hold_secret(value):
            event[name] = _SECRETS.sub(lambda match: f"{match[1] or ''}…", value)
    return event


def _may_hold_secret(text: str) -> bool:
    """Whether `text` has what one of the patterns begins with: a search for fixed text is the cheaper one."""
    return "sk-" in text or "Bearer " in text or "eyJ" in text or "$argon2" in text


def _as_json(event: MutableMapping[str, Any], *, default: Callable[[Any], Any]) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=default).decode()
    except (UnicodeEncodeError, OverflowError):  # half of a surrogate pair, or a number of more than 64 bits
        return json.dumps(event, default=default)
