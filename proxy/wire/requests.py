"""What the paid requests of OpenAI's API have in common: the few facts of each that decide its cost and its relay."""

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Final, Protocol

import msgspec
from msgspec import Meta, Raw

from proxy.errors import BadRequest
from proxy.wire.objects import NULL, Fields, Spelling, check_spelling, decode_fields, patch, unique_fields

CHOICES_MAX = 128
"""OpenAI's own limit of `n`."""

TOKENS_MAX = 2**53 - 1
"""The largest integer that JSON carries safely between parsers (RFC 8259, section 6)."""

ITEMS_MAX = 20_000
"""Messages, parts or tools in one request: each costs time to be looked at, and no conversation has so many."""

TOOL_CALLS_MAX = 10_000
"""Uses of the provider's tools in one call."""

THINKING_TOKENS_MIN = 1_024
"""The least that can be thought by a model whose thinking has a budget."""

FIELDS_MAX = 1_000
"""Fields at the top of a request."""

Tokens = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
Choices = Annotated[int, Meta(ge=1, le=CHOICES_MAX)]
ModelName = Annotated[str, Meta(min_length=1)]


class Endpoint(StrEnum):
    """A paid path, as it follows the base URL of any provider."""

    CHAT = "chat/completions"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"

    __hash__ = str.__hash__  # that of enumerations is Python code


class PaidRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What decides the cost and the relay of one call, whatever its endpoint.

    `maxima` are the client's own, in output tokens of each choice, by the fields that name them. `choices` counts the
    outputs for all `prompts` together. `prediction_tokens` bounds what may be billed of each choice on top of the
    maximum, `thinking_tokens` is the budget for reasoning inside of it. `is_unsized` says that some of the prompt is no
    text in the body; `images` counts the images in it, which have `image_bytes` of the body, and `has_only_images` says
    that they are all of it. `has_instructions` says that a provider may explain to the model, in words of its own, what
    the request has: tools, or a format of the answer. `asks_for_caches` unless no part of it says that it is to be
    cached. `tools` are those that the provider runs, by what they are priced as, with what the request calls them;
    `tool_calls_max` bounds the uses of all of them together. `wants_audio` says that the answer may be spoken,
    `must_unstore` that the provider would keep it unless it is told not to.
    """

    endpoint: Endpoint
    model: str
    is_stream: bool = False
    wants_usage: bool = False
    maxima: dict[str, int] = {}
    choices: int = 1
    service_tier: str | None = None
    must_unstore: bool = False
    prompts: int = 1
    thinking_tokens: int = 0
    prediction_tokens: int = 0
    has_output: bool = True
    is_unsized: bool = False
    has_only_images: bool = False
    has_instructions: bool = False
    asks_for_caches: bool = False
    wants_audio: bool = False
    images: int = 0
    image_bytes: int = 0
    tools: dict[str, str] = {}
    tool_calls_max: int | None = None

    @property
    def maximum(self) -> int | None:
        """The one that bounds whatever a provider makes of them: the largest. None where the client names none."""
        maxima = self.maxima
        return max(maxima.values()) if maxima else None

    @property
    def maxima_bytes(self) -> int:
        """The length of their numbers in the body, which are no prompt."""
        return len("".join(map(str, self.maxima.values())))


class StreamOptions(msgspec.Struct, frozen=True):
    """What a streaming client asks for beside the stream."""

    include_usage: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool that the model may call."""

    type: str


class Maxima(msgspec.Struct, frozen=True, kw_only=True):
    """Every spelling in which some provider takes the maximum of output tokens, beside the usual `max_tokens`."""

    max_completion_tokens: Tokens | None = None
    max_output_tokens: Tokens | None = None
    max_new_tokens: Tokens | None = None
    n_predict: Tokens | None = None
    num_predict: Tokens | None = None

    def named(self, fields: Fields) -> dict[str, int]:
        """Those that are there, by their fields, of which the request has `fields`."""
        maxima = {}
        for field in _MAXIMA.intersection(fields):
            maximum = getattr(self, field)
            if maximum is not None:
                maxima[field] = maximum
        return maxima


_MAXIMA: Final = frozenset({"max_tokens", *Maxima.__struct_fields__})


STATE: Final[Mapping[str, str]] = {
    "conversation": "state kept at the provider is not bounded",
    "data_sources": "what a provider adds to a prompt is not bounded",
    "preset": "state kept at the provider is not bounded",
    "previous_response_id": "state kept at the provider is not bounded",
}

OUTSIDE_OF_TOKENS: Final[Mapping[str, str]] = {
    "background": "answers in the background cannot be metered",
    "candidate_count": "'n' is the number of choices",
    "deferred": "answers in the background cannot be metered",
    "enable_search": "web search is billed outside of tokens",
    "extra_body": "gateways put its fields in the place of those that were priced",
    "fallbacks": "only the model that was priced may answer",
    "models": "only the model that was priced may answer",
    "num_generations": "'n' is the number of choices",
    "num_return_sequences": "'n' is the number of choices",
    "plugins": "plugins are billed outside of tokens",
    "search_parameters": "web search is billed outside of tokens",
    "web_search": "web search is billed outside of tokens",
    "web_search_options": "web search is billed outside of tokens",
}
"""Top-level fields that make a call's cost unbounded, at OpenAI or at those who took over its API, and why."""

HARMLESS: Final = (
    "frequency_penalty",
    "logprobs",
    "metadata",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning_effort",
    "response_format",
    "seed",
    "stop",
    "temperature",
    "tool_choice",
    "top_logprobs",
    "top_p",
    "user",
)
"""Names that are often there and mean nothing that we read: known, they need not be looked at any closer."""

_SWITCHED_OFF = frozenset({b"null", b"false", b"[]"})
_NUMBERS = frozenset({"candidate_count", "n", "num_generations", "num_return_sequences"})
"""What a 1 switches off; of anything else, some parsers take it for true."""
_PRICED_TOOLS = frozenset({"function", "custom"})
_USUAL_STREAM_OPTIONS = frozenset({b'{"include_usage":true}', b'{"include_usage": true}'})
_STREAM_OPTIONS = Spelling(StreamOptions.__struct_fields__, ("include_obfuscation",))


class _Common(Protocol):
    """The fields that every request has which makes output."""

    @property
    def stream_options(self) -> StreamOptions | None: ...


def check_fields(request: _Common, body: bytes, spelling: Spelling) -> Fields:
    """The fields of `body`, of which each that we read is there once, under its own name.

    Raises `BadRequest` otherwise, and for those that `spelling` refuses.
    """
    fields = unique_fields(body)
    if len(fields) > FIELDS_MAX:
        raise BadRequest(f"A request has at most {FIELDS_MAX} fields.", code="too_many_fields")
    if not spelling.allowed.issuperset(fields):
        check_spelling(fields, spelling)
        for field, reason in spelling.refused.items():
            if is_switched_on(fields.get(field), is_number=field in _NUMBERS):
                raise unsupported(field, f"'{field}' is not supported: {reason}.")
    if request.stream_options is not None and bytes(fields["stream_options"]) not in _USUAL_STREAM_OPTIONS:
        options = unique_fields(fields["stream_options"], "stream_options")
        check_spelling(options, _STREAM_OPTIONS, "stream_options")
    return fields


def is_switched_on(value: Raw | None, *, is_number: bool = False) -> bool:
    """Whether a field is there and asks for something; one that says how many does not with 1."""
    if value is None:
        return False
    said = bytes(value)
    return said not in _SWITCHED_OFF and not (is_number and said == b"1")


def check_tools(tools: Collection[Tool], hosted: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Those of `tools` that the provider runs itself, by what they are priced as (see `PaidRequest.tools`).

    `hosted` says that of each type that can have a price. Raises `BadRequest` for all others that are billed.
    """
    check_number(len(tools), "tools")
    found = {}
    for tool in tools:
        if tool.type in hosted:
            found[hosted[tool.type]] = tool.type
        elif tool.type not in _PRICED_TOOLS:
            raise unsupported(
                "tools", f"Tools of type '{tool.type}' are billed outside of tokens, and not priced here."
            )
    return found


def check_number(items: int, param: str) -> None:
    """Raises `BadRequest` when there are more than anybody needs."""
    if items > ITEMS_MAX:
        raise BadRequest(f"There are more than {ITEMS_MAX} items in '{param}'.", param=param, code="too_many_items")


def unsupported(param: str, message: str) -> BadRequest:
    """The refusal of what cannot be priced or bounded."""
    return BadRequest(message, param=param, code="unsupported_parameter")


IMAGE_PARTS = frozenset({"image_url", "input_image"})
"""Types of parts that hold one image, in `image_url`."""


def image_bytes(parts: Iterable[Fields]) -> int:
    """How much of the body the images in `parts` are."""
    return sum(len(fields["image_url"]) for fields in parts if "image_url" in fields)


def is_set(value: Raw | None) -> bool:
    """Whether a field is there and is not null."""
    return value is not None and bytes(value) != b"null"


class _Budget(msgspec.Struct, frozen=True):
    budget_tokens: Tokens | None = None
    max_tokens: Tokens | None = None


_decode_budget = msgspec.json.Decoder(_Budget).decode


def thinking_tokens(*settings: Raw | None) -> int:
    """The budget for reasoning in settings such as `{"type": "enabled", "budget_tokens": 4096}`; 0 where there is none.

    Shapes that are not known here hold none: it is no bound, but what a useful answer needs at least.
    """
    largest = 0
    for setting in settings:
        if setting is None or memoryview(setting)[0] != ord("{"):
            continue
        try:
            budget = _decode_budget(setting)
        except msgspec.MsgspecError:
            continue
        largest = max(largest, budget.budget_tokens or 0, budget.max_tokens or 0)
    return largest


def asking_for_usage(body: bytes) -> bytes:
    """The `stream_options` of the request `body`, changed to ask for usage and otherwise as they were."""
    options = decode_fields(body).get("stream_options", NULL)
    return patch(b"{}" if bytes(options) == b"null" else bytes(options), {"include_usage": b"true"})
