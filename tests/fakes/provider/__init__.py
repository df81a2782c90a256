"""An OpenAI provider on a loopback socket, which misbehaves exactly as it is told.

It is a small HTTP/1.1 server on asyncio streams, so that resets, half answers and TCP segments are what a test asked
for and not what a framework made of them. It imports nothing from `proxy`: it counts and bills by rules of its own,
and so can prove ours wrong.

What it serves, below any base path: `POST` of `/chat/completions`, `/completions`, `/embeddings` and `/responses`, and
`GET /models`; and Anthropic's `POST /messages`. It keeps no state: there is nothing to retrieve.

How it counts: text has one token for every UTF-8 byte, in a prompt and in a reply.

    chat         the messages' texts, the names and arguments of their tool calls, the compact JSON of `tools` and of
                 `response_format`, 4 for every message, and 1,105 for every image, audio or file
    responses    likewise for input items, plus the bytes of `instructions` and the compact JSON of `text`; an input
                 that is a string is one item
    messages     likewise, and 804 where there are tools, which have to be explained to the model
    completions  the bytes of each prompt; a token number is one token
    embeddings   likewise, and no output
    a reply      its text or refusal, or the names and arguments of its tool calls; `echo` costs nothing, replies that
                 `best_of` threw away do, and so does a `prediction`, which never comes true, on top of the maximum

How it is told: the text of the last user message (or the last prompt or input text that begins so), when it is
`!fake ` and a JSON object, holds the fields of a `Behaviour`, for instance `!fake {"tokens": 100, "usage": "none"}`.
Any other text means the defaults.

How it is run: `FakeProvider` on the current loop, `run_in_thread()` for synchronous tests and for a server under test
in another process, `python -m tests.fakes.provider --port 0 --journal FILE` as a process of its own.
"""

from tests.fakes.provider.answer import MODELS
from tests.fakes.provider.behaviour import Behaviour
from tests.fakes.provider.journal import Served, read_journal
from tests.fakes.provider.server import FakeProvider, run_in_thread

__all__ = ["MODELS", "Behaviour", "FakeProvider", "Served", "read_journal", "run_in_thread"]
