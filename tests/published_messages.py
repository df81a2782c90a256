"""Streams of Anthropic's Messages API, made by hand after the examples that are published; each names its source.

The texts are shortened or invented; names, order and white space of the fields are those of the source.
"""

from dataclasses import dataclass, field
from typing import Any

_STREAMING = "https://platform.claude.com/docs/en/build-with-claude/streaming"
_FIXTURES = "https://github.com/anthropics/anthropic-sdk-python/tree/main/tests/lib/streaming/fixtures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A stream, and what a chat completion says that means the same; `usage` is ours, class by class."""

    source: str
    octets: bytes
    content: str = ""
    reasoning: str = ""
    thinking_blocks: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    refusal: str | None = None
    finish: str = "stop"
    usage: dict[str, int]


def _events(*events: tuple[str, str]) -> bytes:
    return "".join(f"event: {name}\ndata: {data}\n\n" for name, data in events).encode()


def _start(usage: str, model: str = "claude-opus-4-7") -> tuple[str, str]:
    message = (
        '{"id": "msg_1nZdL29xx5MUA1yADyHTEsnR8uuvGzszyY", "type": "message", "role": "assistant", "content": [], '
        f'"model": "{model}", "stop_reason": null, "stop_sequence": null, "usage": {usage}}}'
    )
    return ("message_start", f'{{"type": "message_start", "message": {message}}}')


def _block(index: int, block: str) -> tuple[str, str]:
    return ("content_block_start", f'{{"type":"content_block_start","index":{index},"content_block":{block}}}')


def _delta(index: int, delta: str) -> tuple[str, str]:
    return ("content_block_delta", f'{{"type":"content_block_delta","index":{index},"delta":{delta}}}')


def _stop(index: int) -> tuple[str, str]:
    return ("content_block_stop", f'{{"type":"content_block_stop","index":{index}}}')


def _end(delta: str, usage: str) -> list[tuple[str, str]]:
    return [
        ("message_delta", f'{{"type":"message_delta","delta":{delta},"usage":{usage}}}'),
        ("message_stop", '{"type":"message_stop"}'),
    ]


_PING = ("ping", '{"type": "ping"}')
_TURN = '{"stop_reason":"end_turn","stop_sequence":null}'

STREAMS: dict[str, Stream] = {
    "basic": Stream(
        source=f"{_STREAMING}#basic-streaming-request",
        octets=_events(
            _start('{"input_tokens": 25, "output_tokens": 1}'),
            _block(0, '{"type": "text", "text": ""}'),
            _PING,
            _delta(0, '{"type": "text_delta", "text": "Hello"}'),
            _delta(0, '{"type": "text_delta", "text": "!"}'),
            _stop(0),
            *_end(_TURN, '{"output_tokens": 15}'),
        ),
        content="Hello!",
        usage={"input": 25, "output": 15},
    ),
    "tool use": Stream(
        source=f"{_STREAMING}#streaming-request-with-tool-use",
        octets=_events(
            _start('{"input_tokens":472,"output_tokens":2}'),
            _block(0, '{"type":"text","text":""}'),
            _PING,
            _delta(0, '{"type":"text_delta","text":"Okay"}'),
            _delta(0, '{"type":"text_delta","text":", let\'s check:"}'),
            _stop(0),
            _block(1, '{"type":"tool_use","id":"toolu_01T1x1fJ34qAmk2tNTrN7Up6","name":"get_weather","input":{}}'),
            _delta(1, '{"type":"input_json_delta","partial_json":""}'),
            _delta(1, '{"type":"input_json_delta","partial_json":"{\\"location\\":"}'),
            _delta(1, '{"type":"input_json_delta","partial_json":" \\"San Francisc"}'),
            _delta(1, '{"type":"input_json_delta","partial_json":"o, CA\\"}"}'),
            _stop(1),
            _block(
                2,
                '{"type":"tool_use","id":"toolu_01NRLabsLyVHZPKxbKvkfSMn","name":"now","caller":{"type":"direct"},"input":{}}',
            ),
            _delta(2, '{"type":"input_json_delta","partial_json":""}'),
            _stop(2),
            *_end('{"stop_reason":"tool_use","stop_sequence":null}', '{"output_tokens":89}'),
        ),
        content="Okay, let's check:",
        calls=[
            ("toolu_01T1x1fJ34qAmk2tNTrN7Up6", "get_weather", '{"location": "San Francisco, CA"}'),
            ("toolu_01NRLabsLyVHZPKxbKvkfSMn", "now", "{}"),
        ],
        finish="tool_calls",
        usage={"input": 472, "output": 89},
    ),
    "thinking": Stream(
        source=f"{_STREAMING}#streaming-request-with-extended-thinking",
        octets=_events(
            _start('{"input_tokens": 40, "output_tokens": 3}'),
            _block(0, '{"type": "thinking", "thinking": "", "signature": ""}'),
            _delta(0, '{"type": "thinking_delta", "thinking": "I need to find the GCD of 1071 and 462.\\n\\n"}'),
            _delta(0, '{"type": "thinking_delta", "thinking": "So it is 21."}'),
            _delta(0, '{"type": "signature_delta", "signature": "EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pk="}'),
            _stop(0),
            _block(1, '{"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix/LafPsn4aDFIT2Xlxh0L5L8rLVyIw"}'),
            _stop(1),
            _block(2, '{"type": "text", "text": ""}'),
            _delta(2, '{"type": "text_delta", "text": "It is **21**."}'),
            _stop(2),
            *_end(_TURN, '{"output_tokens": 90, "output_tokens_details": {"thinking_tokens": 71}}'),
        ),
        content="It is **21**.",
        reasoning="I need to find the GCD of 1071 and 462.\n\nSo it is 21.",
        thinking_blocks=[
            {
                "index": 0,
                "type": "thinking",
                "thinking": "I need to find the GCD of 1071 and 462.\n\nSo it is 21.",
                "signature": "EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pk=",
                "position": 0,
            },
            {
                "index": 1,
                "type": "redacted_thinking",
                "data": "EmwKAhgBEgy3va3pzix/LafPsn4aDFIT2Xlxh0L5L8rLVyIw",
                "position": 1,
            },
        ],
        usage={"input": 40, "output": 90, "reasoning": 71},
    ),
    "thinking that is not shown": Stream(
        source="https://platform.claude.com/docs/en/build-with-claude/thinking#controlling-thinking-display",
        octets=_events(
            _start('{"input_tokens": 40, "output_tokens": 3}'),
            _block(0, '{"type": "thinking", "thinking": "", "signature": ""}'),
            _delta(0, '{"type": "signature_delta", "signature": "EosnCkYICxIMMb3LzNrMu..."}'),
            _stop(0),
            _block(1, '{"type": "text", "text": ""}'),
            _delta(1, '{"type": "text_delta", "text": "21"}'),
            _stop(1),
            *_end(_TURN, '{"output_tokens": 90}'),
        ),
        content="21",
        thinking_blocks=[
            {"index": 0, "type": "thinking", "thinking": "", "signature": "EosnCkYICxIMMb3LzNrMu...", "position": 0}
        ],
        usage={"input": 40, "output": 90},
    ),
    "caches": Stream(
        source=f"{_FIXTURES}/message_delta_omitted_usage_response.txt",
        octets=_events(
            _start(
                '{"input_tokens":25,"cache_creation_input_tokens":10,"cache_read_input_tokens":5,"cache_creation":'
                '{"ephemeral_5m_input_tokens":10,"ephemeral_1h_input_tokens":0},"output_tokens":1,"service_tier":'
                '"priority"}'
            ),
            _block(0, '{"type":"text","text":""}'),
            _delta(0, '{"type":"text_delta","text":"Hello there!"}'),
            _stop(0),
            *_end('{"stop_reason":"end_turn","stop_sequence":null,"stop_details":null}', '{"output_tokens":8}'),
        ),
        content="Hello there!",
        usage={"input": 25, "cached_input": 5, "cache_write": 10, "output": 8},
    ),
    "refusal": Stream(
        source=f"{_FIXTURES}/refusal_response.txt",
        octets=_events(
            _start('{"input_tokens":20,"output_tokens":1}'),
            _block(0, '{"type":"text","text":""}'),
            _stop(0),
            *_end(
                '{"stop_reason":"refusal","stop_sequence":null,"stop_details":{"type":"refusal","category":"cyber",'
                '"explanation":"This was refused."}}',
                '{"output_tokens":120,"output_tokens_details":{"thinking_tokens":67}}',
            ),
        ),
        refusal="This was refused.",
        finish="content_filter",
        usage={"input": 20, "output": 120, "reasoning": 67},
    ),
    "maximum, and events of new kinds": Stream(
        source="https://platform.claude.com/docs/en/api/versioning (new variants of stream events may be added)",
        octets=_events(
            _start('{"input_tokens":20,"output_tokens":1,"server_tool_use":null}'),
            ("vibe", '{"type":"vibe","delta":3,"error":true,"usage":"much"}'),
            _block(0, '{"type":"text","text":"It"}'),
            _delta(0, '{"type":"citations_delta","citation":{"type":"char_location","cited_text":"x"}}'),
            _delta(0, '{"type":"text_delta","text":" goes"}'),
            _delta(7, '{"type":"text_delta","text":"nowhere"}'),
            _stop(0),
            _stop(7),
            *_end(
                '{"stop_reason":"max_tokens","stop_sequence":null}',
                '{"input_tokens":21,"cache_creation_input_tokens":null,"cache_read_input_tokens":0,"output_tokens":5}',
            ),
        ),
        content="It goes",
        finish="length",
        usage={"input": 21, "output": 5},
    ),
}

OVERLOADED = _events(("error", '{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}'))
"""An error in a stream (https://platform.claude.com/docs/en/build-with-claude/streaming#error-events)."""
