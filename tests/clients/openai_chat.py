"""OpenAI's client for Python, as its users write chat completions with it."""

import json

import openai
from pydantic import BaseModel
from report import BASE_URL, BROKE_KEY, CITY, KEY, MODEL, Wire, failure, report, wish

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
CALLING = wish(tool_calls=[{"name": "weather", "arguments": {"city": "Köln"}}], text="It is sunny.")


class City(BaseModel):
    """What the schema of a JSON answer is made of."""

    name: str
    inhabitants: int


def client(wire: Wire | None = None, *, key: str = KEY, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=BASE_URL, api_key=key, http_client=(wire or Wire()).client(), **options)


def said(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def plain() -> dict:
    answer = client().chat.completions.create(model=MODEL, messages=said("Hello"))
    choice = answer.choices[0]
    return {
        "text": choice.message.content,
        "finish": choice.finish_reason,
        "usage": [answer.usage.prompt_tokens, answer.usage.completion_tokens],
    }


def streamed() -> dict:
    options = {"include_usage": True}
    with client().chat.completions.create(
        model=MODEL, messages=said("Hello"), stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    usage = chunks[-1].usage
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return {
        "text": "".join(choice.delta.content or "" for choice in choices),
        "finish": choices[-1].finish_reason,
        "usage": [usage.prompt_tokens, usage.completion_tokens],
    }


def tools() -> dict:
    messages = said(CALLING)
    first = client().chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sun in abundance"} for call in first.tool_calls]
    last = client().chat.completions.create(model=MODEL, messages=[*messages, first, *results], tools=TOOLS)
    return {
        "calls": [[call.function.name, json.loads(call.function.arguments)] for call in first.tool_calls],
        "text": last.choices[0].message.content,
    }


def tools_streamed() -> dict:
    with client().chat.completions.stream(model=MODEL, messages=said(CALLING), tools=TOOLS) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls
    return {"calls": [[call.function.name, json.loads(call.function.arguments)] for call in calls]}


def schema() -> dict:
    answer = client().chat.completions.parse(model=MODEL, messages=said(wish(json=CITY)), response_format=City)
    return answer.choices[0].message.parsed.model_dump()


def create(wire: Wire, behaviour: dict, *, model: str = MODEL, key: str = KEY, max_retries: int = 0) -> object:
    return client(wire, key=key, max_retries=max_retries).chat.completions.create(
        model=model, messages=said(wish(**behaviour))
    )


def errors() -> dict:
    return {
        "bad_request": failure(lambda wire: create(wire, {"status": 400}, max_retries=1)),
        "unauthorized": failure(lambda wire: create(wire, {}, key="sk-tg-unknown", max_retries=1)),
        "not_covered": failure(lambda wire: create(wire, {}, key=BROKE_KEY, max_retries=1)),
        "model_not_found": failure(lambda wire: create(wire, {}, model="nobody", max_retries=1)),
        "rate_limited": failure(lambda wire: create(wire, {"status": 429, "retry_after": 3}, max_retries=1)),
        "provider_failed": failure(lambda wire: create(wire, {"status": 500}, max_retries=1)),
    }


def unavailable() -> dict:
    return failure(lambda wire: create(wire, {}))


def cancelled() -> dict:
    wire = Wire()
    messages = said(wish(tokens=400, chunk_tokens=4, pace_s=0.02))
    stream = client(wire).chat.completions.create(model=MODEL, messages=messages, stream=True)
    texts = [chunk.choices[0].delta.content for _, chunk in zip(range(2), stream, strict=False)]
    stream.close()
    return {"text": "".join(texts), "request_ids": wire.request_ids}


def timed_out() -> dict:
    behaviour = said(wish(delay_s=1))
    return failure(
        lambda wire: client(wire, max_retries=0, timeout=0.3).chat.completions.create(model=MODEL, messages=behaviour)
    )


report(
    {
        "plain": plain,
        "streamed": streamed,
        "tools": tools,
        "tools_streamed": tools_streamed,
        "schema": schema,
        "errors": errors,
        "cancelled": cancelled,
        "timed_out": timed_out,
    },
    unavailable=unavailable,
)
