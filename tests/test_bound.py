"""No call costs more than what was reserved for it, whatever it asks for and whatever the provider makes of it."""

import asyncio
import json
import re
from decimal import Decimal

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.wire.requests import Endpoint
from tests.serving import SQLITE, audited

CONFIGURATION = """
[server]
port = 0

[providers.fake]
kind = "openai"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"
is_local = false

[prices."fake/{model}"]
input = "2"
cached_input = "1"
cache_write = "2.5"
audio_input = "3"
output = "10"
audio_output = "20"
max_output_tokens = 60000
context_tokens = 200000

[prices."fake/searcher"]
input = "2"
output = "10"
request = "0.001"
web_search = "0.01"
file_search = "0.0025"
code_interpreter = "0.03"
tool_calls_max = 6
max_output_tokens = 60000
context_tokens = 200000

[prices."fake/thinker"]
input = "0.7"
output = "3.3"
max_output_tokens = 100000
context_tokens = 200000
is_reasoning = true

[prices."fake/even"]
input = "5"
output = "5"
max_output_tokens = 60000
context_tokens = 200000
maximum_field = "either"

[prices."fake/free-output"]
input = "30"
output = "0"
context_tokens = 200000

[prices."fake/large"]
input = "3"
output = "15"
max_output_tokens = 64000
context_tokens = 2000000
"""

MODELS = ("fake/fake-model", "fake/thinker", "fake/even", "fake/free-output")
MAXIMA = ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict", "max_new_tokens", "n_predict")
WALLETS = ("1000", "5", "0.5")


@pytest.fixture(scope="module")
def served(tmp_path_factory, upstream):
    """A running server whose books are in order at the end, without a loss to the operator."""
    with audited(tmp_path_factory.mktemp("bound"), SQLITE, upstream.base_url, CONFIGURATION) as server:
        yield server


@pytest.fixture(scope="module")
def clients(served):
    """A client for each of the wallets."""
    clients = [served.client(served.customer(f"wallet{amount}@example.com", amount)) for amount in WALLETS]
    yield clients
    for client in clients:
        client.close()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["x" * 5_000, "é☂\U0001f600" * 700, '\u0000\u2028"\\', " " * 300]
)
schemas = st.recursive(
    st.sampled_from([{"type": "string"}, {"enum": [1, None, "☂"]}, {"const": 1.5, "description": "né"}]),
    lambda inner: st.dictionaries(texts, inner, max_size=3).map(
        lambda fields: {"type": "object", "properties": fields}
    ),
    max_leaves=4,
)
PNG = "data:image/png;base64,iVBORw0KGgo="
wishes = st.fixed_dictionaries(
    {
        # The last is the least maximum of the models below: beyond its own, a provider does not go.
        "tokens": st.sampled_from([1, 50, 3_000, 60_000]),
        "usage": st.sampled_from(["normal", "none", "cached", "reasoning", "hidden"]),
        "chunk_tokens": st.sampled_from([40, 1_000]),
    },
    optional={
        "tool_calls": st.lists(
            st.fixed_dictionaries({"name": st.just("look_up"), "arguments": texts}), min_size=1, max_size=3
        ),
        "refusal": texts,
        "text": texts,
        "usage_chunk": st.sampled_from(["last", "every"]),
        "no_done": st.booleans(),
    },
)
maxima = st.dictionaries(st.sampled_from(MAXIMA), st.integers(1, 400) | st.integers(1, 30_000), max_size=2)


def wished(wish) -> str:
    return f"!fake {json.dumps(wish)}"


@st.composite
def chats(draw, wish):
    """A chat with anything in it that costs something."""
    part = st.one_of(
        texts.map(lambda text: {"type": "text", "text": text}),
        st.sampled_from(
            [
                {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "https://example.test/a"}},
                {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
                {"type": "file", "file": {"file_data": "AA==", "filename": "a"}},
            ]
        ),
    )
    call = texts.map(lambda text: {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}})
    message = st.one_of(
        st.builds(lambda text: {"role": "system", "content": text}, texts),
        st.builds(lambda parts: {"role": "user", "content": parts}, st.lists(part, max_size=3)),
        st.builds(
            lambda calls: {"role": "assistant", "content": None, "tool_calls": calls}, st.lists(call, max_size=2)
        ),
        st.builds(lambda text: {"role": "tool", "tool_call_id": "c", "content": text}, texts),
    )
    messages = [*draw(st.lists(message, max_size=3)), {"role": "user", "content": wished(wish)}]
    function = schemas.map(lambda schema: {"type": "function", "function": {"name": "f", "parameters": schema}})
    optional = {
        "n": st.integers(1, 4),
        "tools": st.lists(function, min_size=1, max_size=2),
        "response_format": schemas.map(
            lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        ),
        "prediction": texts.map(lambda text: {"type": "content", "content": text}),
        "stream": st.booleans(),
        "stream_options": st.just({"include_usage": True}),
        "seed": st.integers(),
        "reasoning_effort": st.just("high"),
        "stop": st.just(["\n"]),
    }
    return {"messages": messages, **draw(st.fixed_dictionaries({}, optional=optional))}


@st.composite
def completions(draw, wish):
    """Several prompts, as texts or as tokens, with several choices each."""
    prompt = draw(st.sampled_from([wished(wish), ["a", wished(wish)], ["x" * 900] * 3 + [wished(wish)]]))
    tokens = st.lists(st.integers(0, 200_000), min_size=1, max_size=30)
    prompt = draw(st.just(prompt) | tokens | st.lists(tokens, min_size=1, max_size=3))
    fields = draw(st.fixed_dictionaries({}, optional={"n": st.integers(1, 3), "stream": st.booleans()}))
    if draw(st.booleans()) and not fields.get("stream"):
        fields["best_of"] = fields.get("n", 1) + draw(st.integers(0, 2))
    return {"prompt": prompt, **fields}


@st.composite
def responses(draw, wish):
    """A response to items of several kinds."""
    part = st.sampled_from(
        [{"type": "input_text", "text": "é" * 99}, {"type": "input_image", "image_url": PNG, "detail": "auto"}]
    )
    item = st.one_of(
        st.builds(lambda parts: {"role": "user", "content": parts}, st.lists(part, max_size=3)),
        texts.map(lambda text: {"type": "function_call", "call_id": "c", "name": "f", "arguments": text}),
        texts.map(lambda text: {"type": "function_call_output", "call_id": "c", "output": text}),
    )
    optional = {
        "instructions": texts,
        "stream": st.booleans(),
        "store": st.booleans(),
        "tools": schemas.map(lambda schema: [{"type": "function", "name": "f", "parameters": schema}]),
        "text": schemas.map(lambda schema: {"format": {"type": "json_schema", "name": "x", "schema": schema}}),
    }
    items = [*draw(st.lists(item, max_size=3)), {"role": "user", "content": wished(wish)}]
    return {"input": items, **draw(st.fixed_dictionaries({}, optional=optional))}


@st.composite
def embeddings(draw, wish):
    """Vectors of texts or tokens."""
    tokens = st.lists(st.integers(0, 200_000), min_size=1, max_size=30)
    given_texts = st.lists(texts.filter(bool), max_size=3).map(lambda given: [*given, wished(wish)])
    return {"input": draw(tokens | st.lists(tokens, min_size=1, max_size=4) | given_texts)}


@st.composite
def calls(draw, endpoint):
    """The fields of a request to `endpoint`, and whether its text is escaped."""
    wish = draw(wishes)
    shape = {
        Endpoint.CHAT: chats,
        Endpoint.COMPLETIONS: completions,
        Endpoint.RESPONSES: responses,
        Endpoint.EMBEDDINGS: embeddings,
    }[endpoint]
    named = {} if endpoint is Endpoint.EMBEDDINGS else draw(maxima)
    fields = {"model": draw(st.sampled_from(MODELS)), **draw(shape(wish)), **named}
    return fields, draw(st.booleans())


def posted(client, endpoint, fields, *, is_escaped) -> httpx2.Response:
    body = json.dumps(fields, ensure_ascii=is_escaped, separators=None if is_escaped else (",", ":"))
    return client.post(f"/v1/{endpoint}", content=body.encode())


def has_text(answer) -> bool:
    """Whether a model has written anything that could be billed."""
    written = re.findall(r'"(?:content|text|delta|refusal|arguments|name|reasoning_content)":\s*"([^"]+)"', answer.text)
    return bool(written) or "usage" in answer.text.replace('"usage":null', "").replace('"usage": null', "")


def check_within_the_reservation(client, answer) -> None:
    charge = client.get(f"/api/v1/credits/charges/{answer.headers['x-request-id']}").json()
    if charge["state"] == "released":
        assert not has_text(answer), "only an answer of nothing is free"
        return
    assert charge["state"] == "settled"
    assert Decimal(charge["charged"]) <= Decimal(charge["reserved"]), charge
    assert charge["shortfall"] == "0"


def with_maximum(fields, maximum) -> dict:
    """The request with `maximum` in each of the fields that named one, in the usual one if none did."""
    names = [name for name in MAXIMA if name in fields] or ["max_tokens"]
    return {**fields, **dict.fromkeys(names, maximum)}


HOSTED = (
    {"type": "web_search"},
    {"type": "web_search_preview", "search_context_size": "high"},
    {"type": "file_search", "vector_store_ids": ["vs_1"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
)
ITEMS = ("web_search_call", "open_page", "file_search_call", "code_interpreter_call")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    wish=wishes,
    uses=st.lists(st.sampled_from(ITEMS), max_size=12),
    tools=st.lists(st.sampled_from(HOSTED), min_size=1, max_size=3),
    more=st.fixed_dictionaries(
        {}, optional={"stream": st.booleans(), "max_tool_calls": st.integers(1, 9), "max_output_tokens": st.just(900)}
    ),
    is_broken=st.booleans(),
)
def test_no_call_with_tools_costs_more_than_its_reservation(clients, wish, uses, tools, more, is_broken):
    """Whichever of those that it asked for are used, up to their maximum, and whether the answer says so or breaks."""
    asked = {tool["type"].removesuffix("_preview") for tool in tools}
    uses = [use for use in uses if use.replace("open_page", "web_search_call").removesuffix("_call") in asked]
    wish = {**wish, "hosted_tools": uses} | ({"half": True} if is_broken else {})
    fields = {"model": "fake/searcher", "input": wished(wish), "tools": tools, **more}
    answer = posted(clients[0], Endpoint.RESPONSES, fields, is_escaped=False)
    if answer.status_code == 200:
        check_within_the_reservation(clients[0], answer)
    else:
        assert (answer.status_code, is_broken) == (502, True), answer.text


@pytest.mark.parametrize("endpoint", Endpoint)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data(), wallet=st.sampled_from(range(len(WALLETS))))
def test_no_call_costs_more_than_its_reservation(clients, endpoint, data, wallet):
    """A call is covered to the last token, or refused with a maximum that would have been covered to the last token."""
    fields, is_escaped = data.draw(calls(endpoint))
    client = clients[wallet]
    answer = posted(client, endpoint, fields, is_escaped=is_escaped)
    if answer.status_code == 200:
        check_within_the_reservation(client, answer)
        return
    assert answer.status_code == 402, answer.text
    affordable = answer.json()["error"].get("max_affordable_tokens")
    if not affordable:
        return
    if not fields.keys().isdisjoint(MAXIMA):
        more = posted(client, endpoint, with_maximum(fields, affordable + 1), is_escaped=is_escaped)
        assert more.status_code == 402, more.text
    answer = posted(client, endpoint, with_maximum(fields, affordable), is_escaped=is_escaped)
    assert answer.status_code == 200, answer.text
    check_within_the_reservation(client, answer)


IMAGE = {"type": "image_url", "image_url": {"url": PNG}}
PROMPT = wished({"tokens": 900})


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (Endpoint.CHAT, {"prediction": {"type": "content", "content": "x" * 9_000}, "n": 4}),
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": [IMAGE] * 9}, {"role": "user", "content": PROMPT}]}),
        (Endpoint.CHAT, {"n": 4}),
        (Endpoint.CHAT, {"max_completion_tokens": 9}),
        (Endpoint.CHAT, {"num_predict": 9}),
        (Endpoint.COMPLETIONS, {"prompt": [PROMPT] * 9, "n": 2, "best_of": 3}),
        (Endpoint.COMPLETIONS, {"prompt": [[1, 2, 3]] * 9, "max_tokens": 400}),
        (Endpoint.COMPLETIONS, {"num_predict": 9}),
        (Endpoint.RESPONSES, {"max_tokens": 9}),
    ],
)
def test_what_multiplies_a_call_is_reserved(clients, endpoint, fields):
    """All that comes on top of a small maximum, on a model where every token costs the same."""
    prompt = {
        Endpoint.CHAT: {"messages": [{"role": "user", "content": PROMPT}]},
        Endpoint.COMPLETIONS: {"prompt": PROMPT},
    }
    maximum = {} if not fields.keys().isdisjoint(MAXIMA) else {"max_tokens": 9}
    body = {"model": "fake/even", **prompt.get(endpoint, {"input": PROMPT}), **maximum, **fields}
    answer = posted(clients[0], endpoint, body, is_escaped=False)
    assert answer.status_code == 200, answer.text
    check_within_the_reservation(clients[0], answer)


def test_a_wallet_of_one_dollar_runs_two_calls_at_once(served, upstream):
    """A chat client's answer and its title, neither of which names a maximum, on a model that could spend it alone."""
    key = served.customer("dollar@example.com", "1")
    wish = wished({"tokens": 2_000, "delay_s": 1})
    body = {"model": "fake/large", "stream": True, "messages": [{"role": "user", "content": wish}]}

    async def both() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            return await asyncio.gather(
                *(http.post(f"{served.base_url}/chat/completions", json=body) for _ in range(2))
            )

    answers = asyncio.run(both())
    assert [answer.status_code for answer in answers] == [200, 200]
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    assert all(int(answer.headers["x-credits-max-tokens"]) > 2_000 for answer in answers), "both are whole"
    first, second = upstream.journal[-2:]
    assert second.started_at < first.ended_at, "they ran at once"


READ = ("model", "max_tokens", "max_completion_tokens", "n", "stream", "messages", "prediction", "tools", "store")
VALUES = {
    "model": '"fake/large"',
    "max_tokens": "9000",
    "max_completion_tokens": "9000",
    "n": "4",
    "stream": "true",
    "messages": '[{"role":"user","content":"x"}]',
    "prediction": '{"type":"content","content":"x"}',
    "tools": "[]",
    "store": "true",
}


def spelled(name) -> st.SearchStrategy[str]:
    """`name` as some other parser may still read it."""
    return st.one_of(
        st.sampled_from([name, name.upper(), name.title(), name.replace("_", ""), name.replace("_", "-")]),
        st.integers(0, len(name) - 1).map(lambda at: f"{name[:at]}\\u{ord(name[at]):04x}{name[at + 1 :]}"),
        st.just(name.replace("s", "\u017f").replace("k", "\u212a")),
        st.just("".join(word.title() for word in name.split("_"))),
    )


@settings(deadline=None, max_examples=60)
@given(
    members=st.lists(st.sampled_from(READ).flatmap(lambda name: st.tuples(st.just(name), spelled(name))), max_size=4),
    order=st.randoms(use_true_random=False),
    space=st.sampled_from(["", " ", "\n"]),
)
def test_no_field_slips_past(served, clients, upstream, members, order, space):
    """However a parser reads what reaches the provider, each field that decides the cost is there once at most."""
    given_members = [("model", '"fake/fake-model"'), ("messages", VALUES["messages"]), ("max_tokens", "5"), ("n", "1")]
    given_members += [(spelling, VALUES[name]) for name, spelling in members]
    order.shuffle(given_members)
    body = "{" + ",".join(f'{space}"{name}"{space}:{value}' for name, value in given_members) + "}"
    before = len(upstream.journal)
    answer = clients[0].post("/v1/chat/completions", content=body.encode())
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] in {"duplicate_field", "ambiguous_field", "missing_required_parameter"}
        assert len(upstream.journal) == before
        return
    pairs = json.loads(upstream.journal[-1].body, object_pairs_hook=list)
    names = [name.upper().casefold().replace("_", "").replace("-", "") for name, _ in pairs]
    assert len(names) == len(set(names))
    check_within_the_reservation(clients[0], answer)


@pytest.mark.parametrize(
    ("model", "named", "sent"),
    [
        ("fake-model", {"max_tokens": 7}, {"max_tokens": 7}),
        ("fake-model", {"max_completion_tokens": 7}, {"max_tokens": 7}),
        ("thinker", {"max_completion_tokens": 7}, {"max_completion_tokens": 7}),
        ("thinker", {"max_tokens": 7}, {"max_completion_tokens": 7}),
        ("thinker", {"max_tokens": 7, "max_completion_tokens": 9}, {"max_tokens": 7, "max_completion_tokens": 9}),
        ("thinker", {"num_predict": 7}, {"num_predict": 7, "max_completion_tokens": 7}),
        ("even", {"max_tokens": 7}, {"max_tokens": 7}),
        ("even", {"max_completion_tokens": 7}, {"max_completion_tokens": 7}),
        ("even", {"num_predict": 7}, {"num_predict": 7, "max_completion_tokens": 7}),
    ],
)
def test_a_maximum_reaches_the_field_that_the_model_takes(clients, upstream, model, named, sent):
    """A provider that ignores the client's spelling is bounded all the same."""
    body = {"model": f"fake/{model}", "messages": [{"role": "user", "content": wished({"tokens": 50})}], **named}
    answer = clients[0].post("/v1/chat/completions", json=body)
    received = upstream.journal[-1].parsed
    assert {name: value for name, value in received.items() if name in MAXIMA} == sent
    assert answer.json()["usage"]["completion_tokens"] <= max(named.values())
    check_within_the_reservation(clients[0], answer)
