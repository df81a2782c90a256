"""Usage objects, in whatever shape a provider reports them, as the `Usage` that is priced.

`Usage` has disjoint classes; providers report totals with details inside of them. The rules, in their order:

* OpenAI's `prompt_tokens` (`input_tokens` in Responses) hold audio tokens, tokens written to the cache and tokens
  read from it; `input` is the rest. Anthropic's `input_tokens` are that rest already.
* `total_tokens` above prompt and completion means output that was hidden. It is billed, so it counts as output.
* `reasoning_tokens` are output already; some providers leave them out of `completion_tokens`, and then the total
  above has them.
"""

import re
from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from proxy.units import Usage
from proxy.wire.objects import UNREADABLE

_INT64_MAX = 2**63 - 1
"""What both databases can hold in one column."""

_Tokens = Annotated[int, Meta(ge=0, le=_INT64_MAX)]


def read_usage(reported: bytes | Raw, *, has_output: bool = True) -> Usage | None:
    """The usage in a usage object of OpenAI's or Anthropic's; None when it cannot be right.

    That is: a number that is negative, not whole or beyond 64 bits, a detail above its total, or neither prompt
    nor completion tokens. Without output, as of embeddings, the total is all prompt: Voyage reports nothing else.
    """
    try:
        usage = _decode_usage(reported)
    except UNREADABLE:
        return None
    prompt, completion, total = usage.prompt, usage.completion, usage.total_tokens or 0
    if not has_output:
        prompt, completion = max(prompt or 0, total), 0
    if prompt is None:
        if completion is None:
            return None
        prompt = max(0, total - completion)
    hidden, output = 0, completion or 0
    if total - prompt > output:
        output = total - prompt
        hidden = 0 if completion is None else output - completion
    if prompt + output > _INT64_MAX:
        return None

    inside, outside = usage.prompt_details, usage.completion_details
    cached, written, audio = usage.cached(inside), usage.written(inside), inside.audio_tokens or 0
    spoken, reasoning = outside.audio_tokens or 0, outside.reasoning_tokens or 0
    if audio > prompt or written > prompt or cached > prompt or spoken > output or reasoning > output:
        return None
    for_an_hour = 0
    if written or audio:
        parts = usage.parts(inside)
        for_an_hour = 0 if parts is None else parts.ephemeral_1h_input_tokens or 0
        if for_an_hour > written:
            return None
        # A token may be in two details, such as audio that was cached: it counts once, where it is dearer.
        written = min(written, prompt - audio)
        for_an_hour = min(for_an_hour, written)
        cached = min(cached, prompt - audio - written)
    return Usage(
        input=prompt - audio - written - cached,
        cached_input=cached,
        cache_write=written - for_an_hour,
        audio_input=audio,
        output=output - spoken,
        audio_output=spoken,
        reasoning=max(hidden, reasoning),
        cache_write_1h=for_an_hour,
    )


def searches(reported: Raw) -> dict[str, int] | None:
    """How often the web was searched for a chat, as its usage object says; None where it does not."""
    try:
        said = _decode_searches(reported)
    except UNREADABLE:
        return None
    places = (said.server_tool_use, said.prompt_tokens_details)
    counts = [said.num_search_queries, *(place.web_search_requests for place in places if place is not None)]
    known = [count for count in counts if count is not None]
    return {"web_search": max(known)} if known else None


class _CacheCreation(msgspec.Struct):
    """What was written to caches, by how long they last."""

    ephemeral_5m_input_tokens: _Tokens | None = None
    ephemeral_1h_input_tokens: _Tokens | None = None

    @property
    def total(self) -> int:
        """All of them."""
        return (self.ephemeral_5m_input_tokens or 0) + (self.ephemeral_1h_input_tokens or 0)


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None
    cache_creation_tokens: _Tokens | None = None
    cache_creation_token_details: _CacheCreation | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class _ServerToolUse(msgspec.Struct):
    web_search_requests: _Tokens | None = None


class _Searches(msgspec.Struct):
    """How often the web was searched, as Anthropic and OpenRouter, Perplexity, and LiteLLM say in a usage object."""

    server_tool_use: _ServerToolUse | None = None
    num_search_queries: _Tokens | None = None
    prompt_tokens_details: _ServerToolUse | None = None


class _Reported(msgspec.Struct):
    """OpenAI's usage object in both of its shapes, and where others put the same.

    Moonshot, DeepSeek and LiteLLM report caches at the top; Anthropic's shape has `input_tokens` beside them.
    """

    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    total_tokens: _Tokens | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    input_tokens_details: _PromptDetails | None = None
    output_tokens_details: _CompletionDetails | None = None
    cached_tokens: _Tokens | None = None
    prompt_cache_hit_tokens: _Tokens | None = None
    cache_creation_input_tokens: _Tokens | None = None
    cache_read_input_tokens: _Tokens | None = None
    cache_creation: _CacheCreation | None = None

    def written(self, inside: _PromptDetails) -> int:
        """Tokens that were written to the cache, for however long, with what is said `inside` of the prompt."""
        said = inside.cache_write_tokens or inside.cache_creation_tokens or self.written_beside
        if said:
            return said
        parts = self.parts(inside)
        return 0 if parts is None else parts.total

    @property
    def written_beside(self) -> int:
        """Likewise, as Anthropic's shape has them."""
        if self.cache_creation_input_tokens is not None or self.cache_creation is None:
            return self.cache_creation_input_tokens or 0
        return self.cache_creation.total

    def parts(self, inside: _PromptDetails) -> _CacheCreation | None:
        """What was written, by how long it lasts; None where that is not said."""
        return self.cache_creation or inside.cache_creation_token_details

    def cached(self, inside: _PromptDetails) -> int:
        """Tokens that were read from the cache."""
        return (
            inside.cached_tokens
            or self.cached_tokens
            or self.prompt_cache_hit_tokens
            or self.cache_read_input_tokens
            or 0
        )

    @property
    def prompt_details(self) -> _PromptDetails:
        """What is said of the prompt's tokens."""
        return self.prompt_tokens_details or self.input_tokens_details or _NO_PROMPT_DETAILS

    @property
    def completion_details(self) -> _CompletionDetails:
        """What is said of the output's tokens."""
        return self.completion_tokens_details or self.output_tokens_details or _NO_COMPLETION_DETAILS

    @property
    def prompt(self) -> int | None:
        """All tokens of the prompt, those of the caches included."""
        if self.prompt_tokens is not None or self.input_tokens is None:
            return self.prompt_tokens
        return self.input_tokens + (self.cache_read_input_tokens or 0) + self.written_beside

    @property
    def completion(self) -> int | None:
        """All tokens of the output."""
        return self.output_tokens if self.completion_tokens is None else self.completion_tokens


_WHOLE_FLOAT = re.compile(rb"(?<=[0-9])\.0+(?=[\s,}])")
"""The end of a whole number as JavaScript and Lua need not tell it from others."""


def _decode_usage(reported: bytes | Raw) -> _Reported:
    """The numbers of a usage object. Raises what msgspec raises."""
    try:
        return _decode_reported(reported)
    except UNREADABLE:
        return _decode_reported(_WHOLE_FLOAT.sub(b"", bytes(reported)))


_decode_reported = msgspec.json.Decoder(_Reported).decode
_decode_searches = msgspec.json.Decoder(_Searches).decode

_NO_PROMPT_DETAILS = _PromptDetails()
_NO_COMPLETION_DETAILS = _CompletionDetails()
