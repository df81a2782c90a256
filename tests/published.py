"""Answers of providers, made by hand after the examples they publish; each names its source.

The texts are shortened or invented; names, order and white space of the fields are those of the source.
"""

from dataclasses import dataclass

from proxy.wire.requests import Endpoint

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The events of one stream, and the usage it reports: input and output tokens, None where it reports none.

    `withheld` is the place of the event that is there only because we asked for it, None where nobody needs to ask.
    """

    source: str
    endpoint: Endpoint = Endpoint.CHAT
    events: list[bytes]
    withheld: int | None = None
    usage: tuple[int, int] | None

    @property
    def octets(self) -> bytes:
        """The whole stream."""
        return b"".join(self.events)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """One whole answer, and the usage it reports: input and output tokens."""

    source: str
    endpoint: Endpoint = Endpoint.CHAT
    octets: bytes
    usage: tuple[int, int]


def _data(*texts: str) -> list[bytes]:
    return [f"data: {text}\n\n".encode() for text in texts]


def _chunk(choices: str, more: str = "") -> str:
    return (
        '{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1694268190,"model":"gpt-4o-mini",'
        f'"service_tier":"default","system_fingerprint":"fp_44709d6fcb","choices":[{choices}]{more}}}'
    )


def _delta(delta: str, reason: str = "null", logprobs: str = "null") -> str:
    return f'{{"index":0,"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}}}'


_ASKED = ',"usage":null,"obfuscation":"yM1Tk2"'
_WHOLE = (
    ',"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":0,'
    '"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens"'
    ':0,"rejected_prediction_tokens":0}},"obfuscation":"hq"'
)


def _event(number: int, name: str, fields: str) -> bytes:
    return f'event: {name}\ndata: {{"type":"{name}","sequence_number":{number},{fields}}}\n\n'.encode()


def _response(status: str, output: str, usage: str) -> str:
    return (
        '"response":{"id":"resp_67c9fdcecf488190bdd9a0409de3a1ec07b8b0ad4e5eb654","object":"response","created_at":'
        f'1741290958,"status":"{status}","background":false,"error":null,"incomplete_details":null,"instructions":'
        f'"You are a helpful assistant.","model":"gpt-4.1-2025-04-14","output":[{output}],"parallel_tool_calls":true,'
        '"previous_response_id":null,"reasoning":{"effort":null,"summary":null},"store":false,"temperature":1.0,"text":'
        '{"format":{"type":"text"}},"tool_choice":"auto","tools":[{"type":"function","name":"error","parameters":'
        f'{{"type":"object","properties":{{"usage":{{"type":"object"}}}}}}}}],"truncation":"disabled","usage":{usage},'
        '"user":null,"metadata":{}}'
    )


_ITEM = '"item_id":"msg_67c9fdcf37fc8190ba82116e33fb28c507b8b0ad4e5eb654","output_index":0,"content_index":0'
_MESSAGE = (
    '{"id":"msg_67c9fdcf37fc8190ba82116e33fb28c507b8b0ad4e5eb654","type":"message","status":"completed","content":[{"ty'
    'pe":"output_text","annotations":[],"text":"Hi there!"}],"role":"assistant"}'
)
_RESPONSE_USAGE = (
    '{"input_tokens":37,"input_tokens_details":{"cached_tokens":0},"output_tokens":11,"output_tokens_details":'
    '{"reasoning_tokens":0},"total_tokens":48}'
)

STREAMS: dict[str, Stream] = {
    "openai": Stream(
        source="https://platform.openai.com/docs/api-reference/chat-streaming/streaming",
        events=[
            *_data(
                _chunk(_delta('{"role":"assistant","content":"","refusal":null}'), _ASKED),
                _chunk(_delta('{"content":"Hello"}'), _ASKED),
                _chunk(_delta("{}", '"stop"'), _ASKED),
                _chunk("", _WHOLE),
            ),
            DONE,
        ],
        withheld=3,
        usage=(19, 10),
    ),
    "openai tool calls": Stream(
        source="https://platform.openai.com/docs/guides/function-calling#streaming",
        events=[
            *_data(
                _chunk(
                    _delta(
                        '{"role":"assistant","content":null,"tool_calls":[{"index":0,"id":"call_DdmO9pD3","type":"function","function":{"name":"get_weather","arguments":""}}],"refusal":null}'
                    )
                ),
                _chunk(_delta('{"tool_calls":[{"index":0,"function":{"arguments":"{\\""}}]}')),
                _chunk(_delta('{"tool_calls":[{"index":0,"function":{"arguments":"location\\":\\"Paris\\"}"}}]}')),
                _chunk(_delta("{}", '"tool_calls"')),
                _chunk("", _WHOLE),
            ),
            DONE,
        ],
        withheld=4,
        usage=(19, 10),
    ),
    "openai logprobs": Stream(
        source="https://platform.openai.com/docs/api-reference/chat/create (logprobs)",
        events=[
            *_data(
                _chunk(_delta('{"role":"assistant","content":""}')),
                _chunk(
                    _delta(
                        '{"content":"Hé"}',
                        logprobs='{"content":[{"token":"Hé","logprob":-0.31725305,"bytes":[72,195,169],"top_logprobs":[]}],"refusal":null}',
                    )
                ),
                _chunk(_delta("{}", '"length"')),
                _chunk("", _WHOLE),
            ),
            DONE,
        ],
        withheld=3,
        usage=(19, 10),
    ),
    "openai refusal": Stream(
        source="https://platform.openai.com/docs/guides/structured-outputs#refusals",
        events=[
            *_data(
                _chunk(_delta('{"role":"assistant","content":null,"refusal":""}')),
                _chunk(_delta('{"refusal":"I\'m sorry, I cannot assist with that request."}')),
                _chunk(_delta("{}", '"stop"')),
                _chunk("", _WHOLE),
            ),
            DONE,
        ],
        withheld=3,
        usage=(19, 10),
    ),
    "openai audio": Stream(
        source="https://platform.openai.com/docs/guides/audio",
        events=[
            *_data(
                _chunk(_delta('{"role":"assistant","content":null,"audio":{"id":"audio_abc123","transcript":"Yes"}}')),
                _chunk(_delta('{"audio":{"data":"UklGRv////9XQVZFZm10IBAAAAABAAEAwF0AAIC7AAACABAATElTVA=="}}')),
                _chunk(_delta('{"audio":{"expires_at":1729018505}}', '"stop"')),
                _chunk(
                    "",
                    ',"usage":{"prompt_tokens":117,"completion_tokens":517,"total_tokens":634,"prompt_tokens_details":'
                    '{"cached_tokens":0,"text_tokens":17,"audio_tokens":100},"completion_tokens_details":'
                    '{"reasoning_tokens":0,"text_tokens":17,"audio_tokens":500}}',
                ),
            ),
            DONE,
        ],
        withheld=3,
        usage=(117, 517),
    ),
    "openai completions": Stream(
        source="https://platform.openai.com/docs/api-reference/completions/create",
        endpoint=Endpoint.COMPLETIONS,
        events=[
            *_data(
                '{"id":"cmpl-7iA7iJjj8V2zOkCGvWF2hAkDWBQZe","object":"text_completion","created":1690759702,"choices":[{"text":"This","index":0,"logprobs":null,"finish_reason":null}],"model":"gpt-3.5-turbo-instruct","system_fingerprint":"fp_44709d6fcb"}',
                '{"id":"cmpl-7iA7iJjj8V2zOkCGvWF2hAkDWBQZe","object":"text_completion","created":1690759702,"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"stop"}],"model":"gpt-3.5-turbo-instruct"}',
                '{"id":"cmpl-7iA7iJjj8V2zOkCGvWF2hAkDWBQZe","object":"text_completion","created":1690759702,"choices":[],"model":"gpt-3.5-turbo-instruct","usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}}',
            ),
            DONE,
        ],
        withheld=2,
        usage=(5, 7),
    ),
    "openai responses": Stream(
        source="https://platform.openai.com/docs/api-reference/responses-streaming",
        endpoint=Endpoint.RESPONSES,
        events=[
            _event(0, "response.created", _response("in_progress", "", "null")),
            _event(1, "response.in_progress", _response("in_progress", "", "null")),
            _event(2, "response.output_item.added", f'"output_index":0,"item":{_MESSAGE}'),
            _event(
                3,
                "response.content_part.added",
                f'{_ITEM},"part":{{"type":"output_text","text":"","annotations":[],"logprobs":[]}}',
            ),
            _event(4, "response.output_text.delta", f'{_ITEM},"delta":"Hi","logprobs":[],"obfuscation":"Xq3"'),
            _event(5, "response.output_text.done", f'{_ITEM},"text":"Hi there!","logprobs":[]'),
            _event(6, "response.output_item.done", f'"output_index":0,"item":{_MESSAGE}'),
            _event(7, "response.completed", _response("completed", _MESSAGE, _RESPONSE_USAGE)),
        ],
        usage=(37, 11),
    ),
    "openai responses, cut short": Stream(
        source="https://platform.openai.com/docs/api-reference/responses-streaming/response/incomplete",
        endpoint=Endpoint.RESPONSES,
        events=[
            _event(0, "response.created", _response("in_progress", "", "null")),
            _event(1, "response.output_text.delta", f'{_ITEM},"delta":"Hi"'),
            _event(2, "response.incomplete", _response("incomplete", "", _RESPONSE_USAGE)),
        ],
        usage=(37, 11),
    ),
    "anthropic usage": Stream(
        source="https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching#tracking-cache-performance",
        events=[
            *_data(
                _chunk(_delta('{"role":"assistant","content":"Hi"}')),
                _chunk(
                    _delta("{}", '"stop"'),
                    ',"usage":{"input_tokens":50,"cache_creation_input_tokens":248,"cache_read_input_tokens":100,'
                    '"output_tokens":503,"service_tier":"standard"}',
                ),
            ),
            DONE,
        ],
        usage=(398, 503),
    ),
    "deepseek": Stream(
        source="https://api-docs.deepseek.com/guides/reasoning_model and https://api-docs.deepseek.com/quick_start/rate_limit",
        events=[
            b": keep-alive\n\n",
            *_data(
                '{"id":"1f633d8b","object":"chat.completion.chunk","created":1718345013,"model":"deepseek-reasoner","system_fingerprint":"fp_a49d71b8a1","choices":[{"index":0,"delta":{"role":"assistant","content":null,"reasoning_content":""},"logprobs":null,"finish_reason":null}]}',
                '{"id":"1f633d8b","object":"chat.completion.chunk","created":1718345013,"model":"deepseek-reasoner","system_fingerprint":"fp_a49d71b8a1","choices":[{"index":0,"delta":{"content":null,"reasoning_content":"嗯"},"logprobs":null,"finish_reason":null}]}',
            ),
            b": keep-alive\n\n",
            *_data(
                '{"id":"1f633d8b","object":"chat.completion.chunk","created":1718345013,"model":"deepseek-reasoner","system_fingerprint":"fp_a49d71b8a1","choices":[{"index":0,"delta":{"content":"9.8","reasoning_content":null},"logprobs":null,"finish_reason":null}]}',
                '{"id":"1f633d8b","object":"chat.completion.chunk","created":1718345013,"model":"deepseek-reasoner","system_fingerprint":"fp_a49d71b8a1","choices":[{"index":0,"delta":{"content":"","reasoning_content":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":18,"completion_tokens":219,"total_tokens":237,"prompt_tokens_details":{"cached_tokens":10},"completion_tokens_details":{"reasoning_tokens":205},"prompt_cache_hit_tokens":10,"prompt_cache_miss_tokens":8}}',
            ),
            DONE,
        ],
        usage=(18, 219),
    ),
    "openrouter": Stream(
        source="https://openrouter.ai/docs/api-reference/streaming",
        events=[
            b": OPENROUTER PROCESSING\n\n",
            b": OPENROUTER PROCESSING\n\n",
            *_data(
                '{"id":"gen-1750000000-abc","provider":"DeepInfra","model":"meta-llama/llama-3.3-70b-instruct","object":"chat.completion.chunk","created":1750000000,"choices":[{"index":0,"delta":{"role":"assistant","content":"Hi","reasoning":null,"reasoning_details":[]},"finish_reason":null,"native_finish_reason":null,"logprobs":null}]}',
                '{"id":"gen-1750000000-abc","provider":"DeepInfra","model":"meta-llama/llama-3.3-70b-instruct","object":"chat.completion.chunk","created":1750000000,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"stop","native_finish_reason":"stop","logprobs":null}]}',
                '{"id":"gen-1750000000-abc","provider":"DeepInfra","model":"meta-llama/llama-3.3-70b-instruct","object":"chat.completion.chunk","created":1750000000,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null,"native_finish_reason":null,"logprobs":null}],"usage":{"prompt_tokens":12,"completion_tokens":3,"total_tokens":15,"cost":0.0000012,"is_byok":false,"cost_details":{"upstream_inference_cost":null}}}',
            ),
            DONE,
        ],
        usage=(12, 3),
    ),
    "azure": Stream(
        source="https://learn.microsoft.com/en-us/azure/ai-services/openai/concepts/content-streaming",
        events=[
            *_data(
                '{"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0,"content_filter_results":{"hate":{"filtered":false,"severity":"safe"},"jailbreak":{"filtered":false,"detected":false}}}]}',
                '{"choices":[{"content_filter_results":{},"delta":{"content":"","refusal":null,"role":"assistant"},"finish_reason":null,"index":0,"logprobs":null}],"created":1741290958,"id":"chatcmpl-B8","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","system_fingerprint":"fp_b705f0c291","usage":null}',
                '{"choices":[{"delta":{"content":"Color"},"finish_reason":null,"index":0,"logprobs":null}],"created":1741290958,"id":"chatcmpl-B8","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","usage":null}',
                '{"choices":[{"delta":{},"finish_reason":"stop","index":0,"logprobs":null}],"created":1741290958,"id":"chatcmpl-B8","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","usage":null}',
                '{"id":"","object":"","created":0,"model":"","choices":[{"index":0,"finish_reason":null,"content_filter_results":{"protected_material_text":{"detected":false,"filtered":false}},"content_filter_offsets":{"check_offset":506,"start_offset":44,"end_offset":571}}],"usage":null}',
                '{"choices":[],"created":1741290958,"id":"chatcmpl-B8","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","usage":{"completion_tokens":2,"prompt_tokens":9,"total_tokens":11}}',
            ),
            DONE,
        ],
        withheld=5,
        usage=(9, 2),
    ),
    "mistral": Stream(
        source="https://docs.mistral.ai/api/#tag/chat",
        events=[
            *_data(
                '{"id":"b31f0be7","object":"chat.completion.chunk","created":1714389122,"model":"mistral-small-latest","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}',
                '{"id":"b31f0be7","object":"chat.completion.chunk","created":1714389122,"model":"mistral-small-latest","choices":[{"index":0,"delta":{"content":"Bonjour"},"finish_reason":"stop"}],"usage":{"prompt_tokens":4,"total_tokens":14,"completion_tokens":10}}',
            ),
            DONE,
        ],
        usage=(4, 10),
    ),
    "groq": Stream(
        source="https://console.groq.com/docs/api-reference#chat-create",
        events=[
            *_data(
                '{"id":"chatcmpl-bc4c","object":"chat.completion.chunk","created":1769093744,"model":"llama-3.3-70b-versatile","system_fingerprint":"fp_c06d5113ec","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"x_groq":{"id":"req_01kf","seed":2093329955}}',
                '{"id":"chatcmpl-bc4c","object":"chat.completion.chunk","created":1769093744,"model":"llama-3.3-70b-versatile","system_fingerprint":"fp_c06d5113ec","choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]}',
                '{"id":"chatcmpl-bc4c","object":"chat.completion.chunk","created":1769093744,"model":"llama-3.3-70b-versatile","system_fingerprint":"fp_c06d5113ec","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"x_groq":{"id":"req_01kf","usage":{"queue_time":0.0903,"prompt_tokens":38,"prompt_time":0.0032,"completion_tokens":4,"completion_time":0.0275,"total_tokens":42,"total_time":0.0307}}}',
            ),
            DONE,
        ],
        usage=(38, 4),
    ),
}

PLAIN: dict[str, Plain] = {
    "openai": Plain(
        source="https://platform.openai.com/docs/api-reference/chat/create",
        octets=b"""{
  "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
  "object": "chat.completion",
  "created": 1741569952,
  "model": "gpt-4.1-2025-04-14",
  "choices": [
    {
      "index": 0,
      "message": {
        "role": "assistant",
        "content": "Hello! How can I assist you today?",
        "refusal": null,
        "annotations": []
      },
      "logprobs": null,
      "finish_reason": "stop"
    }
  ],
  "usage": {
    "prompt_tokens": 19,
    "completion_tokens": 10,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {
      "reasoning_tokens": 0,
      "audio_tokens": 0,
      "accepted_prediction_tokens": 0,
      "rejected_prediction_tokens": 0
    }
  },
  "service_tier": "default"
}
""",
        usage=(19, 10),
    ),
    "openai completions": Plain(
        source="https://platform.openai.com/docs/api-reference/completions/create",
        endpoint=Endpoint.COMPLETIONS,
        octets=b'{\n  "id": "cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7",\n  "object": "text_completion",\n  "created": 1589478378,'
        b'\n  "model": "gpt-3.5-turbo-instruct",\n  "choices": [{"text": "\\n\\nThis is indeed a test", "index": 0, '
        b'"logprobs": null, "finish_reason": "length"}],\n'
        b'  "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}\n}\n',
        usage=(5, 7),
    ),
    "openai embeddings": Plain(
        source="https://platform.openai.com/docs/api-reference/embeddings/create",
        endpoint=Endpoint.EMBEDDINGS,
        octets=b'{"object": "list", "data": [{"object": "embedding", "embedding": [0.0023064255, -0.009327292, '
        b'-1e-309], "index": 0}], "model": "text-embedding-ada-002", "usage": {"prompt_tokens": 8, "total_tokens": 8}}',
        usage=(8, 0),
    ),
    "openai responses": Plain(
        source="https://platform.openai.com/docs/api-reference/responses/create",
        endpoint=Endpoint.RESPONSES,
        octets=_response("completed", _MESSAGE, _RESPONSE_USAGE).removeprefix('"response":').encode(),
        usage=(37, 11),
    ),
    "gemini": Plain(
        source="https://ai.google.dev/gemini-api/docs/openai",
        octets=b'{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant"}}],"created":1750000000,'
        b'"id":"x","model":"gemini-2.5-flash","object":"chat.completion","usage":{"completion_tokens":0,"prompt_tokens"'
        b':9,"total_tokens":109}}',
        usage=(9, 100),
    ),
}
