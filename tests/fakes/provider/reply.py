"""What the model comes up with, and what is billed for it."""

from dataclasses import dataclass, replace
from typing import Any, Self

from tests.fakes.provider.answer import as_json
from tests.fakes.provider.behaviour import Behaviour

TOKENS_PER_MEDIUM = 1_105  # a large image at OpenAI; the tokens of an image do not depend on its bytes
_PHRASE = "The quick brown fox jumps over the lazy dog. "


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; `arguments` is the text that the model wrote, JSON or not."""

    name: str
    arguments: str

    @property
    def tokens(self) -> int:
        """What it costs."""
        return bytes_of(self.name) + bytes_of(self.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One choice: a text, a refusal or calls of tools, and the tokens of it that are never shown."""

    text: str = ""
    refusal: str | None = None
    calls: tuple[Call, ...] = ()
    unseen_tokens: int = 0
    is_cut: bool = False

    @property
    def tokens(self) -> int:
        """The tokens that are shown."""
        return bytes_of(self.text) + bytes_of(self.refusal or "") + sum(call.tokens for call in self.calls)

    @property
    def finish_reason(self) -> str:
        """Why it ends, in the words of chat completions."""
        if self.is_cut:
            return "length"
        return "tool_calls" if self.calls else "stop"

    def cut(self, tokens_max: int) -> Self:
        """The reply's first `tokens_max` tokens; a tool whose name does not fit is not called."""
        calls, left = [], tokens_max
        for call in self.calls:
            left -= bytes_of(call.name)
            if left < 0:
                break
            calls.append(Call(call.name, _head(call.arguments, left)))
            left -= bytes_of(calls[-1].arguments)
        refusal = None if self.refusal is None else _head(self.refusal, tokens_max)
        return replace(self, text=_head(self.text, tokens_max), refusal=refusal, calls=tuple(calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Tokens of one answer, all its choices together.

    prompt  of the prompt
    shown   in the answer
    unseen  as the behaviour's usage says: reasoning, or hidden
    thrown  generated for `best_of`, or predicted in vain: not sent, and counted as if they were
    """

    behaviour: Behaviour
    prompt: int
    shown: int
    unseen: int = 0
    thrown: int = 0

    def usage(self, shown: int | None = None) -> dict[str, Any] | None:
        """The usage that is reported once `shown` tokens were sent, all of them by default; None if none is."""
        kind = self.behaviour.usage
        if isinstance(kind, dict):
            return kind
        if kind == "none":
            return None
        generated = (self.shown if shown is None else shown) + self.thrown
        if kind == "implausible":
            return {
                "prompt_tokens": -1 - self.prompt,
                "completion_tokens": -1 - generated,
                "total_tokens": -2 - self.prompt - generated,
            }
        reasoning = self.unseen if kind == "reasoning" else 0
        cached = self.prompt // 2 if kind == "cached" else 0
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": generated + reasoning,
            "total_tokens": self.prompt + generated + self.unseen,
            "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def compose(behaviour: Behaviour, tokens_max: int | None, *, has_tool_results: bool = False) -> Reply:
    """The reply that was asked for, within `tokens_max`; an exact text costs its unseen tokens on top of its own."""
    whole, is_exact = _whole(behaviour, has_tool_results=has_tool_results)
    has_unseen = behaviour.usage in ("reasoning", "hidden")
    total = whole.tokens * 2 if has_unseen and is_exact else whole.tokens
    granted = total if tokens_max is None or behaviour.ignore_max else min(total, max(tokens_max, 0))
    unseen = granted // 2 if has_unseen else 0
    return replace(whole.cut(granted - unseen), unseen_tokens=unseen, is_cut=granted < total)


def _whole(behaviour: Behaviour, *, has_tool_results: bool) -> tuple[Reply, bool]:
    """The reply without a maximum, and whether it is exactly what was asked for."""
    if behaviour.tool_calls and not has_tool_results:
        return Reply(calls=tuple(_call(wish) for wish in behaviour.tool_calls)), True
    if behaviour.refusal is not None:
        return Reply(refusal=behaviour.refusal), True
    if behaviour.json is not None:
        return Reply(text=as_json(behaviour.json).decode(errors="surrogatepass")), True
    if behaviour.text is not None:
        return Reply(text=behaviour.text), True
    return Reply(text=(_PHRASE * (behaviour.tokens // len(_PHRASE) + 1))[: behaviour.tokens]), False


def _call(wish: dict[str, Any]) -> Call:
    arguments = wish["arguments"]
    text = arguments if isinstance(arguments, str) else as_json(arguments).decode(errors="surrogatepass")
    return Call(wish["name"], text)


def _head(text: str, octets: int) -> str:
    """As many whole characters of `text` as `octets` bytes hold."""
    encoded = text.encode(errors="surrogatepass")
    if len(encoded) <= octets:
        return text
    while octets and encoded[octets] & 0xC0 == 0x80:  # the byte at the cut continues a character
        octets -= 1
    return encoded[:octets].decode(errors="surrogatepass")


def bytes_of(text: str) -> int:
    """The text's bytes in UTF-8, a lone surrogate's being three."""
    return len(text.encode(errors="surrogatepass"))


def slices(text: str, characters: int) -> list[str]:
    """`text` in slices of so many characters."""
    return [text[start : start + characters] for start in range(0, len(text), characters)]


def least(*maxima: Any) -> int | None:
    """The least of those that are numbers; None without any."""
    return min((maximum for maximum in maxima if isinstance(maximum, int)), default=None)
