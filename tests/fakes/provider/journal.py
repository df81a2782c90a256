"""What the provider remembers of each request."""

import json
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from tests.fakes.provider.behaviour import Behaviour


@dataclass(slots=True, kw_only=True)
class Served:
    """One request in the journal; it changes until `ended` is set.

    id                 sequence number, from 1; the answer's `x-request-id` is `fake-<id>`
    body               the bytes of the body that were read
    parsed             the body's JSON; None if it is not JSON or was not read whole
    headers            the request's, in their order, names in lower case
    prompt_tokens      counted for a call that is well formed, else 0
    completion_tokens  tokens of the reply sent so far; those of a plain answer are sent with its last byte
    unseen_tokens      tokens of the reply that are never sent: reasoning, hidden, or thrown away by `best_of`
    usage              the usage object that was sent; None as long as none was
    completed          the answer was sent to its end (without `[DONE]` if so told)
    client_left        the client closed before the end of the answer, or of its own request
    started_at         monotonic seconds, when the request's head had been read
    ended_at           likewise, when the provider was done with it
    ended              set with `ended_at`. `served.ended.wait(timeout_s)` blocks: never call it on the provider's loop,
                       but `await asyncio.to_thread(served.ended.wait, timeout_s)`
    """

    id: int
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    parsed: Any = None
    behaviour: Behaviour = field(default_factory=Behaviour)
    status: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unseen_tokens: int = 0
    usage: dict[str, Any] | None = None
    completed: bool = False
    client_left: bool = False
    started_at: float = field(default_factory=time.monotonic)
    ended_at: float | None = None
    ended: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def header(self, name: str) -> str:
        """The first value of the header `name` (in lower case), or an empty string."""
        return next((value for known, value in self.headers if known == name), "")

    def to_json(self) -> str:
        """One line for the journal's file; bytes of the body that are not UTF-8 become lone surrogates."""
        kept = {
            known.name: getattr(self, known.name) for known in fields(self) if known.name not in ("parsed", "ended")
        }
        body = self.body.decode(errors="surrogateescape")
        return json.dumps(kept | {"body": body, "behaviour": asdict(self.behaviour)})

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The entry that `to_json` wrote, `ended`."""
        kept = json.loads(line)
        kept["body"] = kept["body"].encode(errors="surrogateescape")
        kept["headers"] = [(name, value) for name, value in kept["headers"]]
        kept["behaviour"] = Behaviour(**kept["behaviour"])
        served = cls(**kept, parsed=parse(kept["body"]))
        served.ended.set()
        return served


def read_journal(path: Path) -> list[Served]:
    """The calls that a provider with `journal_path` has ended, in the order of their ends."""
    return [Served.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parse(body: bytes) -> Any:
    """The JSON in `body`; None if it is none."""
    try:
        return json.loads(body)
    except ValueError:
        return None
