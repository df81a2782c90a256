"""What a call can cost at most, before it is sent: a true bound, or the call is refused.

A byte-level token is at least one byte, and the JSON around a text is longer than what a provider's template
puts around it, so the bytes of the body bound the tokens of everything in it. What is not in the body (an image
behind an address, a file) may be as large as the model's whole context.
"""

from collections.abc import Sequence

import msgspec

from proxy.errors import BadRequest
from proxy.pricing import bound, output_tokens_affordable
from proxy.routing import Candidate
from proxy.units import Nanos
from proxy.wire.openai import ChatRequest, has_media, output_tokens_asked, prediction_bytes

USEFUL_OUTPUT_TOKENS = 1_024
USEFUL_OUTPUT_TOKENS_REASONING = 8_192
"""The least that a call without a maximum of its own is worth starting for; reasoning models think on it first."""


class Estimate(msgspec.Struct, frozen=True):
    """The bound of one call over all of its candidates, in tokens and in nano-credits.

    `input_tokens` and `output_tokens` are of the largest candidate, `output_tokens` for all `choices` together.
    `prediction_tokens` of them come on top of the maximum of each choice.
    """

    input_tokens: int
    output_tokens: int
    choices: int
    prediction_tokens: int
    is_maximum_named: bool
    at_least: Nanos
    at_most: Nanos

    @property
    def window_tokens(self) -> int:
        """What counts against tokens a minute until the usage is known: a guess, as the bound would starve callers."""
        return self.input_tokens // 4 + min(self.output_tokens, USEFUL_OUTPUT_TOKENS)


def estimate(request: ChatRequest, body_bytes: int, candidates: Sequence[Candidate], markup_bps: int) -> Estimate:
    """The estimate of `request`, whose body has `body_bytes` bytes.

    Raises `BadRequest` when it holds media and a candidate's context is not known.
    """
    asked = output_tokens_asked(request)
    predicted = prediction_bytes(request)
    choices = request.n or 1
    at_least = at_most = input_most = output_most = 0
    for candidate in candidates:
        inputs = _input_tokens(request, body_bytes, candidate)
        maximum = _output_maximum(candidate) if asked is None else asked
        least = maximum if asked is not None else min(maximum, _useful_output(candidate))
        outputs = (maximum + predicted) * choices
        useful = (least + predicted) * choices
        most = bound(inputs, outputs, candidate.price, markup_bps)
        at_most = max(at_most, most)
        at_least = max(at_least, bound(inputs, useful, candidate.price, markup_bps))
        input_most = max(input_most, inputs)
        output_most = max(output_most, outputs)
    return Estimate(
        input_tokens=input_most,
        output_tokens=output_most,
        choices=choices,
        prediction_tokens=predicted,
        is_maximum_named=asked is not None,
        at_least=at_least,
        at_most=at_most,
    )


def maximum_bought(estimated: Estimate, candidate: Candidate, amount: Nanos, markup_bps: int) -> int | None:
    """The output tokens of each choice that `amount` covers at this candidate; None when it covers any number."""
    tokens = output_tokens_affordable(amount, estimated.input_tokens, candidate.price, markup_bps)
    return None if tokens is None else max(0, max(0, tokens) // estimated.choices - estimated.prediction_tokens)


def maximum_affordable(
    estimated: Estimate, candidates: Sequence[Candidate], amount: Nanos, markup_bps: int
) -> int | None:
    """The output tokens of each choice with which the call would be covered by `amount`, whoever serves it."""
    bought = [maximum_bought(estimated, candidate, amount, markup_bps) for candidate in candidates]
    return min((tokens for tokens in bought if tokens is not None), default=None)


def _input_tokens(request: ChatRequest, body_bytes: int, candidate: Candidate) -> int:
    if has_media(request):
        if candidate.context_tokens is None:
            raise BadRequest(
                f"The context of {candidate.target} is not known here, so images, audio and files cannot be priced.",
                param="messages",
                code="unsupported_content",
            )
        return candidate.context_tokens
    return body_bytes if candidate.context_tokens is None else min(body_bytes, candidate.context_tokens)


def _output_maximum(candidate: Candidate) -> int:
    return candidate.output_tokens_max or candidate.context_tokens or 0


def _useful_output(candidate: Candidate) -> int:
    return USEFUL_OUTPUT_TOKENS_REASONING if candidate.is_reasoning else USEFUL_OUTPUT_TOKENS
