"""A call that has ended is gone: its body and its answer do not wait for the garbage collector, however it ended."""

import gc
import json
import weakref

import httpx2
import psutil
import pytest

from proxy.errors import Unavailable, forget_frames
from tests.serving import CONFIG, SQLITE, serving

BODY_BYTES = 1_000_000
CALLS = 30
KEPT_MAX = 8
"""Bodies, by which the heap may have grown meanwhile. Were calls to wait for the collector, there would be `CALLS`."""

CONFIGURATION = (
    CONFIG
    + """
[providers.hasty]
kind = "openai"
base_url = "{base_url}"
is_local = false
api_key_env = "UPSTREAM_KEY"
first_byte_s = 0.05

[providers.away]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
is_local = false

[models.roomy]
candidates = ["fake/roomy"]

[models.second]
candidates = [{{ target = "away/roomy", priority = 0 }}, {{ target = "fake/roomy", priority = 1 }}]

[prices."fake/roomy"]
input = "1"
output = "2"
max_output_tokens = 4096
context_tokens = 9000000

[prices."hasty/roomy"]
input = "1"
output = "2"
max_output_tokens = 4096
context_tokens = 9000000

[prices."away/roomy"]
input = "1"
output = "2"
max_output_tokens = 4096
context_tokens = 9000000
"""
)


@pytest.fixture(scope="module")
def served(tmp_path_factory, upstream):
    """A running server whose model takes long prompts."""
    with serving(tmp_path_factory.mktemp("served"), SQLITE, upstream.base_url, CONFIGURATION) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    """Whose connection is used again where that can be."""
    with served.client(served.customer("customer@example.com", "100000")) as http:
        yield http


def call(http: httpx2.Client, path: str, wish: dict, *, leaves: bool, **more: object) -> int:
    """Make a call with a large body; returns the status."""
    padding = {"role": "system", "content": "x" * BODY_BYTES}
    messages = [padding, {"role": "user", "content": f"!fake {json.dumps(wish)}"}]
    asked = {"model": "roomy", "max_tokens": 500, "messages": messages, **more}
    with http.stream("POST", path, json=asked) as answer:
        if leaves:
            next(answer.iter_raw())
        else:
            answer.read()
        return answer.status_code


CHAT, INVOKE = "/v1/chat/completions", "/api/v1/llm/invoke"


@pytest.mark.parametrize(
    ("path", "wish", "status", "more"),
    [
        (CHAT, {}, 200, {}),
        (CHAT, {"tokens": 100}, 200, {"stream": True}),
        (CHAT, {}, 404, {"model": "unknown"}),
        (CHAT, {"status": 400}, 400, {}),
        (CHAT, {"status": 500}, 502, {}),
        (CHAT, {"reset": "mid"}, 502, {}),
        (CHAT, {"reset": "mid"}, 200, {"stream": True}),
        (CHAT, {"error_event": "first"}, 502, {"stream": True}),
        (CHAT, {"stall": "before_headers"}, 504, {"model": "hasty/roomy"}),
        (CHAT, {}, 200, {"model": "second"}),
        (CHAT, {"tokens": 40, "pace_s": 0.001}, 200, {"stream": True, "leaves": True}),
        (INVOKE, {"tokens": 40, "pace_s": 0.001}, 200, {"stream": True, "leaves": True}),
        (INVOKE, {"reset": "mid"}, 502, {}),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_a_call_held_is_freed_with_it(served, client, path, wish, status, more):
    """The server is no larger after thirty calls with large bodies than after a few."""
    process = psutil.Process(served.process.pid)
    sizes = []
    for calls in (5, CALLS):
        for _ in range(calls):
            assert call(client, path, wish, **{"leaves": False, **more}) == status
        sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < KEPT_MAX * BODY_BYTES


class _Held:
    """What a call holds."""


def _fail() -> None:
    raise OSError


def _failed() -> weakref.ref[_Held]:
    """Fail while holding something, and keep the error and its cause in frames that they came through."""
    held = _Held()
    try:
        _fail()
    except OSError as exc:
        failure = Unavailable("The database is out of reach.")
        failure.__cause__ = exc
        try:
            raise failure
        except Unavailable:
            forget_frames(failure)
    return weakref.ref(held)


def test_an_error_whose_frames_are_forgotten_is_no_cycle():
    """What its frames held is gone with it, the collector or not."""
    gc.disable()
    try:
        assert _failed()() is None
    finally:
        gc.enable()
