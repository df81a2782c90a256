"""LangChain's OpenAI models over responses, embeddings and legacy completions, as its users write with them."""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from report import BASE_URL, BROKE_KEY, CITY, KEY, MODEL, Wire, failure, report, wish

CALLING = wish(tool_calls=[{"name": "weather", "arguments": {"city": "Köln"}}], text="Sunny.")


class City(BaseModel):
    """What the schema of a JSON answer is made of."""

    name: str
    inhabitants: int


@tool
def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"sun in abundance in {city}"


def connected(wire: Wire | None = None, *, key: str = KEY) -> dict:
    """What every model of LangChain's takes."""
    return {
        "base_url": BASE_URL,
        "api_key": key,
        "model": MODEL,
        "max_retries": 1,
        "http_client": (wire or Wire()).client(),
    }


def responses(wire: Wire | None = None, *, key: str = KEY) -> ChatOpenAI:
    return ChatOpenAI(**connected(wire, key=key), use_responses_api=True)


def embedding(wire: Wire | None = None, *, key: str = KEY, **options: object) -> OpenAIEmbeddings:
    # Without this it would fetch a vocabulary from the internet.
    return OpenAIEmbeddings(**connected(wire, key=key), check_embedding_ctx_length=False, **options)


def completion(wire: Wire | None = None, *, key: str = KEY) -> OpenAI:
    return OpenAI(**connected(wire, key=key), max_tokens=64)


def seen_in(answer) -> dict:
    usage = answer.usage_metadata
    return {"text": answer.text, "usage": [usage["input_tokens"], usage["output_tokens"]]}


MESSAGES = [("system", "Be brief."), ("user", "Hello")]


def responses_plain() -> dict:
    return seen_in(responses().invoke(MESSAGES))


def responses_streamed() -> dict:
    return seen_in(sum_of(responses().stream(MESSAGES)))


def sum_of(chunks):
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


def responses_tools() -> dict:
    model = responses().bind_tools([weather])
    messages = [HumanMessage(CALLING)]
    first = model.invoke(messages)
    results = [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in first.tool_calls]
    return {"calls": calls_in(first), "text": model.invoke([*messages, first, *results]).text}


def responses_tools_streamed() -> dict:
    return {"calls": calls_in(sum_of(responses().bind_tools([weather]).stream(CALLING)))}


def calls_in(answer) -> list:
    return [[call["name"], call["args"]] for call in answer.tool_calls]


def responses_schema() -> dict:
    return responses().with_structured_output(City, method="json_schema").invoke(wish(json=CITY)).model_dump()


def responses_cut() -> dict:
    answer = responses().bind(max_tokens=30).invoke(wish(tokens=100))
    return {
        "is_cut": answer.response_metadata["status"] == "incomplete",
        "tokens": answer.usage_metadata["output_tokens"],
    }


def responses_conversation() -> dict:
    first, again = HumanMessage(wish(usage="reasoning")), HumanMessage(wish(text="Sunny."))
    return {"text": responses().invoke([first, responses().invoke([first]), again]).text}


def responses_cancelled() -> dict:
    wire = Wire()
    stream = responses(wire).stream(wish(tokens=400, chunk_tokens=4, pace_s=0.02))
    text = next(chunk.text for chunk in stream if chunk.text)
    stream.close()
    return {"text": text, "request_ids": wire.request_ids}


def embeddings() -> dict:
    vectors = embedding().embed_documents(["a", "Grüße"])
    return {
        "vectors": len(vectors),
        "is_same_unpacked": embedding().embed_query("Grüße") == vectors[1],
        "dimensions": len(embedding(dimensions=3).embed_query("a")),
    }


def completions_plain() -> dict:
    answer = completion().generate(["Hello"])
    usage = answer.llm_output["token_usage"]
    return {
        "text": answer.generations[0][0].text,
        "finish": answer.generations[0][0].generation_info["finish_reason"],
        "usage": [usage["prompt_tokens"], usage["completion_tokens"]],
    }


def completions_streamed() -> dict:
    return {"text": "".join(completion().stream("Hello"))}


def errors() -> dict:
    return {
        "responses": failure(lambda wire: responses(wire, key=BROKE_KEY).invoke("x")),
        "embeddings": failure(lambda wire: embedding(wire, key=BROKE_KEY).embed_query("x")),
        "completions": failure(lambda wire: completion(wire, key=BROKE_KEY).invoke("x")),
        "state": failure(lambda wire: responses(wire).invoke("x", previous_response_id="resp_1")),
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
