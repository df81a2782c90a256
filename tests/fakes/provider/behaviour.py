"""What the provider may be told to do with one call."""

import base64
import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

_MARK = "!fake "


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    r"""What the provider does with one call; the fields combine, a fault strikes whatever the answer would have been.

    The reply, the same in every choice:
    tokens            its length, in tokens, before the request's maximum cuts it
    text              its text, in place of `tokens` bytes of a pangram
    json              its text is the compact JSON of this, as a request with a `json_schema` format would get it
    refusal           it is a refusal with this text (chat and responses)
    tool_calls        it is these calls, each `{"name", "arguments"}` with arguments as a string or an object (chat and
                      responses). Once the results of tools come after the message that asked for it, the reply is text
    blocks            it is these blocks of content (messages)
    stop_reason       it ends for this reason (messages)
    hosted_tools      it uses these tools of the provider's first: items of responses such as `web_search_call`, or
                      `open_page` for a page that a search found; each adds `FOUND_TOKENS` to the prompt
    ignore_max        it ignores the request's maximum of tokens, and of uses of tools

    The answer around it:
    chunk_tokens      characters in each event of a stream (one token each, in ASCII)
    usage             normal       what was counted
                      none         no usage anywhere, even if asked for
                      cached       normal, and half of the prompt's tokens (rounded down) were cached
                      reasoning    half of the reply's tokens (rounded down) are reasoning: missing in the text, counted
                                   in `completion_tokens` and `reasoning_tokens`
                      hidden       half of the reply's tokens (rounded down) are missing in the text and in
                                   `completion_tokens`, and counted in `total_tokens` only
                      implausible  negative numbers
                      an object    is sent as it is
    usage_chunk       where a stream of chunks carries its usage:
                      own          in one of its own after the last choice, if asked for, as OpenAI does
                      last         in the last one with a choice, though nobody asked
                      every        in every one, counted up to there, though nobody asked
    role              the deltas of a chat with a role: `first`, `every` or `none`
    event_prefix      text before each event of a stream, for instance `": ping\n\n"` or `"event: chunk\n"`
    no_done           the stream ends without `data: [DONE]`; one of responses without its last event
    failed            the answer of responses is a failed one, after half of its text if it is streamed

    Errors:
    status            HTTP status of an answer that is an error; with `raw` or `raw_base64`, the status of that answer;
                      with `error_event`, only that error's type and message
    error_code        the `code` of an error, whatever its type, in place of the usual one
    error_body        the body of an error: `openai`, `html`, or `empty`
    error_event       an error event ends a stream of status 200: it is the `first` event, or comes in the `middle`; a
                      plain answer is that error with status 200
    retry_after       the `retry-after` header, in seconds

    Bytes and time:
    pace_s            seconds between two events of a stream
    delay_s           seconds before the first byte of the answer
    stall             waits till the client leaves, at most 60 s, then closes:
                      before_headers  with nothing sent
                      mid             after half of the answer
    reset             closes with a TCP reset:
                      before_read  as soon as this wish is seen in the body, whose other bytes stay unread
                      after_read   with the request read and nothing sent
                      mid          after half of the answer
    half              closes cleanly (FIN) after half of the answer, whose promised length or last chunk never comes
    cut_event         half of a stream ends inside an event: half of the next event's bytes come too
    raw               the body of the answer, sent verbatim with a content-length
    raw_base64        likewise, for a body that is no text
    content_type      the `content-type` header, in place of the usual one; an empty one leaves it out
    extra_headers     headers of the answer, in place of or beside the usual ones
    segment_bytes     bytes of each write to the socket; the loop runs between two writes

    Half of a plain answer is half of its body's bytes; half of a stream is half of its events, rounded down.
    """

    tokens: int = 20
    text: str | None = None
    json: Any = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    blocks: list[dict[str, Any]] | None = None
    stop_reason: str | None = None
    hosted_tools: list[str] = field(default_factory=list)
    ignore_max: bool = False
    chunk_tokens: int = 4
    usage: Literal["normal", "none", "cached", "reasoning", "hidden", "implausible"] | dict[str, Any] = "normal"
    usage_chunk: Literal["own", "last", "every"] = "own"
    role: Literal["first", "every", "none"] = "first"
    event_prefix: str = ""
    no_done: bool = False
    failed: bool = False
    status: int | None = None
    error_code: str | int | None = None
    error_body: Literal["openai", "html", "empty"] = "openai"
    error_event: Literal["first", "middle"] | None = None
    retry_after: float | None = None
    pace_s: float = 0.0
    delay_s: float = 0.0
    stall: Literal["before_headers", "mid"] | None = None
    reset: Literal["before_read", "after_read", "mid"] | None = None
    half: bool = False
    cut_event: bool = False
    raw: str | None = None
    raw_base64: str | None = None
    content_type: str | None = None
    extra_headers: dict[str, str] = field(default_factory=dict)
    segment_bytes: int | None = None

    @property
    def verbatim(self) -> bytes | None:
        """The body that is sent as it is; None if the answer is made up."""
        if self.raw_base64 is not None:
            return base64.b64decode(self.raw_base64)
        return None if self.raw is None else self.raw.encode(errors="surrogatepass")

    @property
    def is_cut(self) -> bool:
        """Whether only half of the answer is sent."""
        return self.half or self.stall == "mid" or self.reset == "mid"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The behaviour that the JSON object in `text` asks for.

        Raises TypeError if it is not an object, ValueError if a field or a choice does not exist.
        """
        wishes = json.loads(text)
        if not isinstance(wishes, dict):
            raise TypeError("a behaviour is a JSON object")
        if unknown := wishes.keys() - {known.name for known in fields(cls)}:
            raise ValueError(f"unknown behaviour: {', '.join(sorted(unknown))}")
        for name, choices in _CHOICES.items():
            wish = wishes.get(name)
            if isinstance(wish, str) and wish not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, not {wish}")
        for name in ("chunk_tokens", "segment_bytes"):
            if name in wishes and wishes[name] is not None and wishes[name] < 1:
                raise ValueError(f"{name} is at least 1")
        for call in wishes.get("tool_calls") or ():
            if call.keys() != {"name", "arguments"}:
                raise ValueError("a tool call has a name and arguments")
        return cls(**wishes)

    @classmethod
    def from_texts(cls, texts: list[str]) -> Self:
        """The behaviour that the last of `texts` asks for, if it does; else the usual one.

        Raises TypeError and ValueError as `from_json` does.
        """
        if not texts or not texts[-1].startswith(_MARK):
            return cls()
        return cls.from_json(texts[-1].removeprefix(_MARK))

    @classmethod
    def from_last_wish(cls, texts: list[str]) -> Self:
        """The behaviour that the last wish among `texts` asks for, if there is one; else the usual one.

        Raises TypeError and ValueError as `from_json` does.
        """
        return cls.from_texts([text for text in texts if text.startswith(_MARK)])


_CHOICES = {
    "usage": ("normal", "none", "cached", "reasoning", "hidden", "implausible"),
    "usage_chunk": ("own", "last", "every"),
    "role": ("first", "every", "none"),
    "error_body": ("openai", "html", "empty"),
    "error_event": ("first", "middle"),
    "stall": ("before_headers", "mid"),
    "reset": ("before_read", "after_read", "mid"),
}
