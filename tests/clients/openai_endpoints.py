"""OpenAI's client for Python, as its users write responses, embeddings and legacy completions with it."""

import json

import openai
from pydantic import BaseModel
from report import BASE_URL, BROKE_KEY, CITY, KEY, MODEL, Wire, failure, report, wish

TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather in a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
]
CALLING = [
    {"role": "user", "content": wish(tool_calls=[{"name": "weather", "arguments": {"city": "Köln"}}], text="Sunny.")}
]


class City(BaseModel):
    """What the schema of a JSON answer is made of."""

    name: str
    inhabitants: int


def client(wire: Wire | None = None, *, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=BASE_URL, api_key=key, http_client=(wire or Wire()).client(), max_retries=1)


def seen_in(response) -> dict:
    return {"text": response.output_text, "usage": [response.usage.input_tokens, response.usage.output_tokens]}


def responses_plain() -> dict:
    return seen_in(client().responses.create(model=MODEL, input="Hello", instructions="Be brief."))


def responses_streamed() -> dict:
    with client().responses.create(model=MODEL, input="Hello", instructions="Be brief.", stream=True) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert events[-1].type == "response.completed", events[-1]
    return {**seen_in(events[-1].response), "text": "".join(deltas)}


def responses_tools() -> dict:
    first = client().responses.create(model=MODEL, input=CALLING, tools=TOOLS)
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sun in abundance"} for item in first.output
    ]
    last = client().responses.create(model=MODEL, input=[*CALLING, *first.output, *outputs], tools=TOOLS)
    return {"calls": calls_in(first), "text": last.output_text}


def responses_tools_streamed() -> dict:
    with client().responses.stream(model=MODEL, input=CALLING, tools=TOOLS) as stream:
        return {"calls": calls_in(stream.get_final_response())}


def calls_in(response) -> list:
    return [[item.name, json.loads(item.arguments)] for item in response.output]


def responses_schema() -> dict:
    return client().responses.parse(model=MODEL, input=wish(json=CITY), text_format=City).output_parsed.model_dump()


def responses_cut() -> dict:
    response = client().responses.create(model=MODEL, input=wish(tokens=100), max_output_tokens=30)
    is_cut = (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    return {"is_cut": is_cut, "tokens": response.usage.output_tokens}


def responses_conversation() -> dict:
    first = {"role": "user", "content": wish(usage="reasoning")}
    opening = client().responses.create(model=MODEL, input=[first])
    again = {"role": "user", "content": wish(text="Sunny.")}
    return {"text": client().responses.create(model=MODEL, input=[first, *opening.output, again]).output_text}


def responses_cancelled() -> dict:
    wire = Wire()
    behaviour = wish(tokens=400, chunk_tokens=4, pace_s=0.02)
    stream = client(wire).responses.create(model=MODEL, input=behaviour, stream=True)
    text = next(event.delta for event in stream if event.type == "response.output_text.delta")
    stream.close()
    return {"text": text, "request_ids": wire.request_ids}


def embeddings() -> dict:
    floats = client().embeddings.create(model=MODEL, input=["a", "Grüße"], encoding_format="float")
    unpacked = client().embeddings.create(model=MODEL, input=["a", "Grüße"])
    tokens = client().embeddings.create(model=MODEL, input=[[1, 2, 3], [4]], dimensions=3)
    return {
        "vectors": len(floats.data),
        "is_same_unpacked": [each.embedding for each in floats.data] == [each.embedding for each in unpacked.data],
        "usage": [floats.usage.prompt_tokens, tokens.usage.prompt_tokens],
        "dimensions": len(tokens.data[0].embedding),
    }


def completions_plain() -> dict:
    answer = client().completions.create(model=MODEL, prompt="Hello", max_tokens=64)
    usage = [answer.usage.prompt_tokens, answer.usage.completion_tokens]
    return {"text": answer.choices[0].text, "finish": answer.choices[0].finish_reason, "usage": usage}


def completions_streamed() -> dict:
    with client().completions.create(model=MODEL, prompt="Hello", max_tokens=64, stream=True) as stream:
        choices = [choice for chunk in stream for choice in chunk.choices]
    return {"text": "".join(choice.text for choice in choices), "finish": choices[-1].finish_reason}


def errors() -> dict:
    broke = {"key": BROKE_KEY}
    return {
        "responses": failure(lambda wire: client(wire, **broke).responses.create(model=MODEL, input="x")),
        "embeddings": failure(lambda wire: client(wire, **broke).embeddings.create(model=MODEL, input="x")),
        "completions": failure(lambda wire: client(wire, **broke).completions.create(model=MODEL, prompt="x")),
        "state": failure(
            lambda wire: client(wire).responses.create(model=MODEL, input="x", previous_response_id="resp_1")
        ),
    }


report(
    {
        "responses_plain": responses_plain,
        "responses_streamed": responses_streamed,
        "responses_tools": responses_tools,
        "responses_tools_streamed": responses_tools_streamed,
        "responses_schema": responses_schema,
        "responses_cut": responses_cut,
        "responses_conversation": responses_conversation,
        "responses_cancelled": responses_cancelled,
        "embeddings": embeddings,
        "completions_plain": completions_plain,
        "completions_streamed": completions_streamed,
        "errors": errors,
    }
)
