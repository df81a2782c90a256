"""LangChain's OpenAI chat model, as its users write with it."""

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from report import BASE_URL, BROKE_KEY, CITY, KEY, MODEL, Wire, failure, report, wish

CALLING = wish(tool_calls=[{"name": "weather", "arguments": {"city": "Köln"}}], text="It is sunny.")


class City(BaseModel):
    """What the schema of a JSON answer is made of."""

    name: str
    inhabitants: int


@tool
def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"sun in abundance in {city}"


def chat(wire: Wire | None = None, *, key: str = KEY, model: str = MODEL, **options: object) -> ChatOpenAI:
    return ChatOpenAI(base_url=BASE_URL, api_key=key, model=model, http_client=(wire or Wire()).client(), **options)


def plain() -> dict:
    answer = chat().invoke("Hello")
    return {
        "text": answer.text,
        "finish": answer.response_metadata["finish_reason"],
        "usage": [answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]],
    }


def streamed() -> dict:
    whole = sum_of(chat(stream_usage=True).stream("Hello"))
    return {
        "text": whole.text,
        "finish": whole.response_metadata["finish_reason"],
        "usage": [whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"]],
    }


def sum_of(chunks) -> AIMessageChunk:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


def tools() -> dict:
    model = chat().bind_tools([weather])
    messages = [HumanMessage(CALLING)]
    first = model.invoke(messages)
    results = [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in first.tool_calls]
    last = model.invoke([*messages, first, *results])
    return {"calls": [[call["name"], call["args"]] for call in first.tool_calls], "text": last.text}


def tools_streamed() -> dict:
    whole = sum_of(chat().bind_tools([weather]).stream(CALLING))
    return {"calls": [[call["name"], call["args"]] for call in whole.tool_calls]}


def schema() -> dict:
    return chat().with_structured_output(City, method="json_schema").invoke(wish(json=CITY)).model_dump()


def invoke(wire: Wire, behaviour: dict, *, model: str = MODEL, key: str = KEY, max_retries: int = 0) -> object:
    return chat(wire, key=key, model=model, max_retries=max_retries).invoke(wish(**behaviour))


def errors() -> dict:
    return {
        "bad_request": failure(lambda wire: invoke(wire, {"status": 400}, max_retries=1)),
        "unauthorized": failure(lambda wire: invoke(wire, {}, key="sk-tg-unknown", max_retries=1)),
        "not_covered": failure(lambda wire: invoke(wire, {}, key=BROKE_KEY, max_retries=1)),
        "model_not_found": failure(lambda wire: invoke(wire, {}, model="nobody", max_retries=1)),
        "rate_limited": failure(lambda wire: invoke(wire, {"status": 429, "retry_after": 3}, max_retries=1)),
        "provider_failed": failure(lambda wire: invoke(wire, {"status": 500}, max_retries=1)),
    }


def unavailable() -> dict:
    return failure(lambda wire: invoke(wire, {}))


def cancelled() -> dict:
    wire = Wire()
    stream = chat(wire).stream(wish(tokens=400, chunk_tokens=4, pace_s=0.02))
    texts = [chunk.text for _, chunk in zip(range(2), stream, strict=False)]
    stream.close()
    return {"text": "".join(texts), "request_ids": wire.request_ids}


def timed_out() -> dict:
    return failure(lambda wire: chat(wire, max_retries=0, timeout=0.3).invoke(wish(delay_s=1)))


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
