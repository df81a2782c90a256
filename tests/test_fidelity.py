"""Whatever bytes the provider sends, the client gets exactly those, and the other way round."""

import base64
import gzip
import json
import zlib
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.wire.requests import Endpoint
from tests import json_texts
from tests.published import DONE, PLAIN, STREAMS
from tests.serving import CONFIG, MODEL, SQLITE, UPSTREAM_KEY, audited

CONFIGURATION = f"""{CONFIG}
[models."alias é"]
candidates = ["fake/{{model}}"]
"""

STREAMED = [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES]
bounded = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What came back: header fields as they came, and the body's raw bytes."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for known, value in self.headers if known == name), None)


class Line:
    """A provider, a server in front of it, and a client behind that."""

    def __init__(self, upstream, served, key) -> None:
        self.upstream = upstream
        self.served = served
        self.key = key
        self._http = served.client(key)

    def close(self) -> None:
        self._http.close()

    def post(self, endpoint, body: bytes, headers=()) -> Seen:
        """The raw answer to `body`."""
        sent = [("content-type", "application/json"), *headers]
        with self._http.stream("POST", f"/v1/{endpoint}", content=body, headers=sent) as answer:
            octets = b"".join(answer.iter_raw())
            headers = [(name.decode().lower(), value.decode("latin-1")) for name, value in answer.headers.raw]
            return Seen(answer.status_code, headers, octets)

    def relay(self, endpoint, octets: bytes, *, is_stream, wants_usage=False, **behaviour) -> Seen:
        """The answer to a request that makes the provider send `octets`."""
        wish = {"raw_base64": base64.b64encode(octets).decode(), **behaviour}
        body = request(endpoint, f"!fake {json.dumps(wish)}")
        if is_stream:
            body["stream"] = True
            if wants_usage:
                body["stream_options"] = {"include_usage": True}
        return self.post(endpoint, json.dumps(body).encode())

    def charge(self, seen: Seen) -> dict:
        """The receipt of a call."""
        answer = self._http.get(f"/api/v1/credits/charges/{seen.header('x-request-id')}")
        assert answer.status_code == 200, answer.text
        return answer.json()


def request(endpoint, text):
    """A request whose prompt is `text`."""
    if endpoint is Endpoint.CHAT:
        return {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    return {"model": MODEL, "prompt" if endpoint is Endpoint.COMPLETIONS else "input": text}


@pytest.fixture(scope="module")
def line(tmp_path_factory, upstream):
    """The whole line, whose books are in order at the end."""
    with audited(tmp_path_factory.mktemp("fidelity"), SQLITE, upstream.base_url, CONFIGURATION) as served:
        key = served.customer("faithful@example.com", "1000")
        line = Line(upstream, served, key)
        yield line
        line.close()
        assert served.holds_nothing(key)


def without_cost(octets: bytes, charged: str) -> bytes:
    """`octets` without what we put into the usage."""
    cost = b'"cost":"%b",' % charged.encode()
    assert octets.count(cost) == 1
    return octets.replace(cost, b"")


# ---- answers


@pytest.mark.parametrize("published", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("segment_bytes", [None, 1])
def test_published_streams(line, published, segment_bytes):
    """The bytes are the provider's, without the usage that only we asked for; what it reports is charged."""
    seen = line.relay(published.endpoint, published.octets, is_stream=True, segment_bytes=segment_bytes)
    shown = [event for place, event in enumerate(published.events) if place != published.withheld]
    assert seen.body == b"".join(shown)
    assert (seen.status, seen.header("content-type")) == (200, "text/event-stream")
    charge = line.charge(seen)
    inputs, outputs = published.usage
    usage = charge["usage"]
    assert (charge["state"], charge["usage_source"]) == ("settled", "reported")
    assert sum(usage.get(name, 0) for name in ("input", "cached_input", "cache_write", "audio_input")) == inputs
    assert usage.get("output", 0) + usage.get("audio_output", 0) == outputs


@pytest.mark.parametrize("name", [name for name, published in STREAMS.items() if published.withheld is not None])
def test_published_streams_with_usage(line, name):
    """A client that asked for the usage gets all of the provider's bytes, and its cost inside of the usage."""
    published = STREAMS[name]
    seen = line.relay(published.endpoint, published.octets, is_stream=True, wants_usage=True)
    assert without_cost(seen.body, line.charge(seen)["charged"]) == published.octets


@pytest.mark.parametrize("published", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("segment_bytes", [None, 1])
def test_published_answers(line, published, segment_bytes):
    """The bytes are the provider's, and what it reports is charged."""
    seen = line.relay(published.endpoint, published.octets, is_stream=False, segment_bytes=segment_bytes)
    assert seen.body == published.octets
    assert seen.header("content-length") == str(len(published.octets))
    charge = line.charge(seen)
    inputs, outputs = published.usage
    assert charge["usage_source"] == "reported"
    assert (charge["usage"].get("input", 0), charge["usage"].get("output", 0)) == (inputs, outputs)


LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
OTHER_LINES = st.lists(
    st.sampled_from([": ping", ":", "id: 7", "id", "retry: 3000", "event: message", "x: y", "\u2028data: x"]),
    max_size=2,
)
CHOICES = st.lists(
    json_texts.objects(
        json_texts.values,
        fixed=[('"index"', "0"), ('"delta"', '{"content":"Hi"}'), ('"text"', '"Hi"'), ('"finish_reason"', "null")],
    )
    | st.sampled_from(
        ['{"index":0,"delta":{}}', '{"delta":{"content":null}}', '{"delta":{"content":"\\ud800"}}', "{}"]
    ),
    min_size=1,
    max_size=2,
).map(lambda choices: f"[{','.join(choices)}]")


@st.composite
def events(draw, data, *, line_end):
    """The text of an event with `data`, which may stretch over lines where JSON has room, and with other lines."""
    lines = ["data:" + draw(st.sampled_from(["", " "])) + part for part in data]
    for other in draw(OTHER_LINES):
        lines.insert(draw(st.integers(0, len(lines))), other)
    return "".join(each + line_end for each in lines) + line_end


@st.composite
def chunk_streams(draw, *, is_usage_whole=False):
    """The events of a stream of chunks, the place of the one with nothing but usage, and what comes after them all."""
    line_end = draw(LINE_ENDS)
    chunks = []
    for _ in range(draw(st.integers(1, 4))):
        choices = draw(CHOICES)
        usage = draw(st.sampled_from([[], [('"usage"', "null")]]))
        chunk = draw(json_texts.objects(json_texts.values, fixed=[('"choices"', choices), *usage]))
        cut = draw(st.booleans())
        chunks.append([chunk[:1], chunk[1:-1], chunk[-1:]] if cut else [chunk])
    usage = draw(json_texts.objects(json_texts.values, fixed=[('"prompt_tokens"', "3"), ('"completion_tokens"', "4")]))
    chunks.append([draw(json_texts.objects(json_texts.values, fixed=[('"choices"', "[]"), ('"usage"', usage)]))])
    made = [draw(events(chunk, line_end=line_end)) for chunk in chunks]
    comments = draw(st.lists(st.sampled_from([": ping", "event: ping", "id: 4", ""]), max_size=2))
    made[0:0] = [comment + line_end * 2 for comment in comments]
    bom = draw(st.sampled_from(["", "\ufeff"]))
    made[0] = bom + made[0]
    withheld = len(made) - 1
    made[-1] = json_texts.whole(made[-1]) if is_usage_whole else made[-1]
    if draw(st.booleans()):
        made.append("data: [DONE]" + line_end * 2)
    end = draw(st.sampled_from(["", "", line_end, ": bye", "data: x", line_end * 3, ": bye" + line_end * 2 + "x"]))
    return [event.encode() for event in made], withheld, end.encode()


@bounded
@given(
    stream=chunk_streams(),
    endpoint=st.sampled_from([Endpoint.CHAT, Endpoint.COMPLETIONS]),
    segment_bytes=st.sampled_from([None, None, 1, 7]),
    is_packed=st.booleans(),
)
def test_generated_streams(line, stream, endpoint, segment_bytes, is_packed):
    """However odd, the bytes are the provider's but for the usage event, in all of its lines."""
    made, withheld, end = stream
    octets = b"".join(made) + end
    headers = {"content-encoding": "gzip"} if is_packed else {}
    seen = line.relay(
        endpoint,
        gzip.compress(octets) if is_packed else octets,
        is_stream=True,
        # What comes after the end marker is not waited for.
        segment_bytes=None if end else segment_bytes,
        extra_headers=headers,
    )
    shown = [event for place, event in enumerate(made) if place != withheld]
    assert seen.body == b"".join(shown) + end
    assert seen.header("content-encoding") is None


@bounded
@given(stream=chunk_streams(is_usage_whole=True))
def test_generated_streams_with_usage(line, stream):
    """A client that asked gets an event for each of the provider's, and the usage with nothing but its cost added."""
    made, place, end = stream
    seen = line.relay(Endpoint.CHAT, b"".join(made) + end, is_stream=True, wants_usage=True)
    before, after = b"".join(made[:place]), b"".join(made[place + 1 :]) + end
    assert seen.body.startswith(before)
    assert seen.body.endswith(after)
    event = seen.body[len(before) : len(seen.body) - len(after)].decode(errors="surrogatepass")
    data = [each for each in event.replace("\r", "\n").split("\n") if each.startswith("data: ")]
    usage = json.loads("".join(each.removeprefix("data: ") for each in data))["usage"]
    assert usage.pop("cost") == line.charge(seen)["charged"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 4)


@st.composite
def response_streams(draw):
    """The bytes of a stream of a response's events."""
    line_end = draw(LINE_ENDS)
    names = [*draw(st.lists(st.sampled_from(["response.output_text.delta", "response.new"]), max_size=3))]
    usage = draw(json_texts.objects(json_texts.values, fixed=[('"input_tokens"', "3"), ('"output_tokens"', "4")]))
    ended = draw(json_texts.objects(json_texts.values, fixed=[('"usage"', usage)]))
    made = []
    for name in names:
        fields = [('"type"', f'"{name}"'), ('"delta"', draw(json_texts.strings))]
        made.append(draw(events([draw(json_texts.objects(json_texts.values, fixed=fields))], line_end=line_end)))
    fields = [('"type"', '"response.completed"'), ('"response"', ended)]
    made.append(draw(events([draw(json_texts.objects(json_texts.values, fixed=fields))], line_end=line_end)))
    return "".join(made).encode()


@bounded
@given(octets=response_streams(), segment_bytes=st.sampled_from([None, 1]))
def test_generated_responses(line, octets, segment_bytes):
    """Nothing is added and nothing withheld."""
    assert line.relay(Endpoint.RESPONSES, octets, is_stream=True, segment_bytes=segment_bytes).body == octets


@bounded
@given(
    endpoint=st.sampled_from(Endpoint),
    octets=json_texts.objects(json_texts.values).map(str.encode) | st.binary(max_size=50),
    encoding=st.sampled_from([None, "gzip", "deflate", "br", "identity"]),
)
def test_generated_answers(line, endpoint, octets, encoding):
    """Any bytes, encoded or said to be, come back as they are."""
    packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding, bytes)(octets)
    headers = {"content-encoding": encoding} if encoding else {}
    seen = line.relay(endpoint, packed, is_stream=False, extra_headers=headers)
    assert (seen.status, seen.body, seen.header("content-encoding")) == (200, packed, encoding)


def test_a_large_event(line):
    """A megabyte in one event is relayed as any other."""
    text = "é☂" * 200_000
    octets = f'data: {{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}\n\n'.encode() + DONE
    assert len(octets) > 1_000_000
    assert line.relay(Endpoint.CHAT, octets, is_stream=True).body == octets


CONTENT = b'data: {"choices":[{"delta":{"content":"x"}}]}'


@pytest.mark.parametrize(
    "octets",
    [
        CONTENT,
        CONTENT + b"\n",
        CONTENT + b"\n\ndata: [DONE]",
        CONTENT + b"\n\ndata: [DONE]\n",
        CONTENT + b'\n\ndata: {"cho',
        CONTENT + b"\r\rdata: [DONE]\r\r",
        b"data: [DONE]\n\n",
        b"data: x\n\n\xff\xfe",
    ],
)
@pytest.mark.parametrize("segment_bytes", [None, 1])
def test_streams_without_an_end(line, octets, segment_bytes):
    """What comes without its end comes all the same."""
    seen = line.relay(Endpoint.CHAT, octets, is_stream=True, segment_bytes=segment_bytes)
    assert (seen.status, seen.body) == (200, octets)


@pytest.mark.parametrize("end", [b"\n", b": and more", b"data: [DONE]\n\n", b"data: [DONE]\n\n\n: ", b"\xff"])
def test_what_comes_after_the_end(line, end):
    """It comes with it."""
    octets = CONTENT + b"\n\n" + DONE + end
    assert line.relay(Endpoint.CHAT, octets, is_stream=True).body == octets


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_usage_at_an_odd_end(line, end):
    """The usage is withheld, or has its cost, even if its event lacks the empty line at its end."""
    content = CONTENT + b"\n\n"
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}' + end
    seen = line.relay(Endpoint.CHAT, content + usage, is_stream=True)
    assert seen.body == content
    assert line.charge(seen)["usage"] == {"input": 3, "output": 4}
    seen = line.relay(Endpoint.CHAT, content + usage, is_stream=True, wants_usage=True)
    assert json.loads(seen.body.removeprefix(content).removeprefix(b"data: "))["usage"]["cost"]


# ---- requests


@st.composite
def requests(draw):
    """A request's text as a template with the model's name left open, and whether it is streamed and asks for usage."""
    endpoint = draw(st.sampled_from(Endpoint))
    fixed = [('"model"', "<model>")]
    text = draw(st.sampled_from(['"hi"', '"h\\u0069"', '"\\ud83d\\ude00 \u2028é\U0001f600"']))
    match endpoint:
        case Endpoint.CHAT:
            message = draw(json_texts.objects(json_texts.values, fixed=[('"role"', '"user"'), ('"content"', text)]))
            fixed.append(('"messages"', f"[ {message}]"))
        case Endpoint.COMPLETIONS:
            fixed.append(('"prompt"', text))
        case _:
            fixed.append(('"input"', text))
    is_stream = endpoint is not Endpoint.EMBEDDINGS and draw(st.booleans())
    options = draw(st.sampled_from([None, '{"include_usage" :true}', '{ "include_obfuscation": false }', "null"]))
    if is_stream:
        fixed.append(('"stream"', "true"))
        if options and endpoint is not Endpoint.RESPONSES:
            fixed.append(('"stream_options"', "<options>"))
    has_store = endpoint in {Endpoint.CHAT, Endpoint.RESPONSES} and draw(st.booleans())
    if has_store:
        fixed.append(('"store"', "<store>"))
    template = draw(st.sampled_from(["", " \n"])) + draw(json_texts.objects(json_texts.values, fixed=fixed))
    return endpoint, json_texts.whole(template), is_stream, options, has_store


def patched(endpoint, template, is_stream, options, has_store) -> str:
    """What the provider must get: the template with what must change, and what must be added after the brace."""
    asked = {
        '{ "include_obfuscation": false }': '{"include_usage":true, "include_obfuscation": false }',
        "null": '{"include_usage":true}',
        '{"include_usage" :true}': '{"include_usage" :true}',
    }
    added = []
    if is_stream and endpoint is not Endpoint.RESPONSES and "<options>" not in template:
        added.append('"stream_options":{"include_usage":true}')
    if endpoint is Endpoint.RESPONSES and not has_store:
        added.append('"store":false')
    head, brace, rest = template.partition("{")
    whole = head + brace + "".join(f"{member}," for member in added) + rest
    return filled(whole, f'"{MODEL}"', asked.get(options, ""), "false")


def filled(template, model, options, store) -> str:
    return template.replace("<model>", model).replace("<options>", options).replace("<store>", store)


@bounded
@given(made=requests(), name=st.sampled_from([f'"{MODEL}"', '"alias é"', '"alias \\u00e9"', f'"fake/{MODEL}"']))
def test_generated_requests(line, made, name):
    """The provider gets the client's bytes, and nothing is changed but what must be."""
    endpoint, template, _, options, _ = made
    body = filled(template, name, options or "", "true").encode()
    seen = line.post(endpoint, body)
    assert seen.status == 200, seen.body
    assert line.upstream.journal[-1].body.decode() == patched(*made)


def test_a_clamped_maximum_is_all_that_changes(line):
    """It is put in where none was named, and every other byte stays."""
    key = line.served.customer("clamped@example.com", "0.004")
    body = b'{ "messages" : [{"role":"user","content":"h\\u0069"}],\n"model":"%b", "seed": 1e2}' % MODEL.encode()
    with line.served.client(key) as http:
        answer = http.post("/v1/chat/completions", content=body)
    bought = answer.headers["x-credits-max-tokens"].encode()
    assert line.upstream.journal[-1].body == body.replace(b"{ ", b'{"max_tokens":%b, ' % bought, 1)


def test_a_request_of_which_nothing_must_change(line):
    """It crosses as it is."""
    body = b' {"model":"%b","messages":[{"role":"user","content":"hi"}],"stream":false}\n' % MODEL.encode()
    assert line.post(Endpoint.CHAT, body).status == 200
    assert line.upstream.journal[-1].body == body


def test_half_a_character_is_refused(line):
    """It is no Unicode, and parsers differ in what they make of it: 400, as at OpenAI."""
    body = b'{"model":"%b","messages":[{"role":"user","content":"hi"}],"user":"\\ud83d"}' % MODEL.encode()
    seen = line.post(Endpoint.CHAT, body)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (400, "invalid_json")


# ---- headers


def test_headers_of_a_request(line):
    """What identifies or authorizes the client does not cross; what SDKs say of themselves does."""
    kept = [("user-agent", "OpenAI/Python 3"), ("x-stainless-lang", "python"), ("openai-beta", "assistants=v2")]
    dropped = [
        ("connection", "keep-alive, x-private"),
        ("x-private", "1"),
        ("keep-alive", "timeout=5"),
        ("te", "trailers"),
        ("cookie", "a=b"),
        ("x-api-key", "sk-secret"),
        ("api-key", "sk-secret"),
        ("proxy-authorization", "Basic c2VjcmV0"),
        ("openai-organization", "org-secret"),
        ("openai-project", "proj-secret"),
        ("forwarded", "for=203.0.113.1"),
        ("x-forwarded-for", "203.0.113.1"),
        ("referer", "https://example.test"),
        ("origin", "https://example.test"),
        ("x-client-request-id", "mine"),
    ]
    body = json.dumps(request(Endpoint.CHAT, "hi")).encode()
    assert line.post(Endpoint.CHAT, body, [*kept, *dropped]).status == 200
    entry = line.upstream.journal[-1]
    named = dict(entry.headers)
    assert named == {
        **dict(kept),
        "host": f"127.0.0.1:{line.upstream.port}",
        "authorization": f"Bearer {UPSTREAM_KEY}",
        "content-type": "application/json",
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-length": str(len(body)),
    }
    assert len(named) == len(entry.headers)


PROVIDERS_HEADERS = {
    "connection": "x-private",
    "x-private": "1",
    "keep-alive": "timeout=5",
    "set-cookie": "__cf_bm=secret",
    "openai-organization": "org-secret",
    "openai-project": "proj-secret",
    "www-authenticate": "Bearer",
    "proxy-authenticate": "Basic",
    "strict-transport-security": "max-age=1",
    "alt-svc": 'h3=":443"',
    "server": "cloudflare",
    "x-credits-charged": "0",
    "x-tollgate-provider": "forged",
    "x-upstream-request-id": "forged",
    "access-control-allow-origin": "*",
    "x-request-id": "theirs",
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-reset-tokens": "6m0s",
    "openai-processing-ms": "12",
    "openai-version": "2020-10-01",
    "x-odd": "é",
    "cf-ray": "abc-FRA",
}
PROVIDERS_KEPT = {
    "x-upstream-request-id": "theirs",
    "x-upstream-ratelimit-limit-requests": "60",
    "x-upstream-ratelimit-remaining-requests": "99",
    "x-upstream-ratelimit-reset-tokens": "6m0s",
    "openai-processing-ms": "12",
    "openai-version": "2020-10-01",
    "x-odd": "é",
    "cf-ray": "abc-FRA",
}
OURS = {"content-type", "content-length", "transfer-encoding", "date", "x-request-id", "x-credits-reserved"}
OURS_PLAIN = {"x-credits-charged", "x-credits-balance"}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("status", [200, 429, 400])
def test_headers_of_an_answer(line, is_stream, status):
    """The operator's secrets and the hop's own do not cross, the provider's own request id and limits are renamed."""
    octets = STREAMS["mistral"].octets if is_stream else PLAIN["openai"].octets
    if status != 200:
        octets = b'{"error": {"message": "no", "type": "requests", "param": null, "code": "rate_limit_exceeded"}}'
    seen = line.relay(Endpoint.CHAT, octets, is_stream=is_stream, status=status, extra_headers=PROVIDERS_HEADERS)
    assert (seen.status, seen.body) == (status, octets)
    for name, value in PROVIDERS_KEPT.items():
        assert seen.header(name) == value, name
    names = {name for name, _ in seen.headers}
    expected = OURS | {"x-tollgate-provider"} | (set() if is_stream else OURS_PLAIN)
    assert names - set(PROVIDERS_KEPT) <= expected
    assert len(names) == len(seen.headers), "none is there twice"
    assert seen.header("x-request-id").startswith("req_")
    assert seen.header("x-tollgate-provider") in ({"fake"} if status == 200 else {None, "fake"})
