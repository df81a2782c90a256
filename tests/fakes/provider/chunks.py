"""Streams of chunks with choices, as chat and legacy completions have them."""

from collections.abc import Iterable
from typing import Any

from tests.fakes.provider.answer import Answer, Piece, as_json, stream, wished_error_object
from tests.fakes.provider.reply import Bill

_DONE = Piece(b"data: [DONE]\n\n")


def chunk_stream(
    envelope: dict[str, Any],
    choices: Iterable[tuple[dict[str, Any], int]],
    bill: Bill,
    request: dict[str, Any],
) -> Answer:
    """A stream of `envelope`s, each with one of `choices` (and the tokens it carries), then usage and the end."""
    behaviour = bill.behaviour
    pieces = _chunks(envelope, list(choices), bill, is_usage_wanted=_is_usage_wanted(request))
    if behaviour.error_event:
        kept = 0 if behaviour.error_event == "first" else len(pieces) // 2
        return stream([*pieces[:kept], Piece(_event({"error": wished_error_object(behaviour)}))], behaviour)
    return stream(pieces if behaviour.no_done else [*pieces, _DONE], behaviour)


def _chunks(
    envelope: dict[str, Any], choices: list[tuple[dict[str, Any], int]], bill: Bill, *, is_usage_wanted: bool
) -> list[Piece]:
    whole = bill.usage()
    is_apart = bill.behaviour.usage_chunk == "own" and is_usage_wanted and whole is not None
    pieces, sent = [], 0
    for position, (choice, tokens) in enumerate(choices, 1):
        sent += tokens
        usage = _usage_within(bill, sent, is_last=position == len(choices))
        shown = {"usage": usage} if is_apart or usage is not None else {}
        pieces.append(Piece(_event(envelope | {"choices": [choice]} | shown), tokens=tokens, usage=usage))
    if is_apart:
        pieces.append(Piece(_event(envelope | {"choices": [], "usage": whole}), usage=whole))
    return pieces


def _usage_within(bill: Bill, sent: int, *, is_last: bool) -> dict[str, Any] | None:
    """The usage in a chunk that has a choice, once so many tokens were sent."""
    match bill.behaviour.usage_chunk:
        case "every":
            return bill.usage(sent)
        case "last" if is_last:
            return bill.usage()
        case _:
            return None


def _is_usage_wanted(request: dict[str, Any]) -> bool:
    options = request.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + as_json(chunk) + b"\n\n"
