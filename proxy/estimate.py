"""What a call can cost at most, before it is sent: a true bound, or the call is refused.

A byte-level token is at least one byte, and the JSON around a text is longer than what a provider's template
puts around it, so the bytes of the body bound the tokens of everything in it. What is not in the body (an image
behind an address, a file) may be as large as the model's whole context.
"""

from collections.abc import Sequence

import msgspec

from proxy.errors import BadRequest
from proxy.pricing import Price, bound, output_tokens_affordable
from proxy.routing import Candidate, Offer
from proxy.units import Nanos
from proxy.wire.requests import PaidRequest

USEFUL_OUTPUT_TOKENS = 1_024
NAMING_BYTES_MAX = 64
"""More than what a body grows by when it names a maximum, beside the number itself."""

USEFUL_OUTPUT_TOKENS_REASONING = 8_192
"""The least that a call without a maximum of its own is worth starting for; reasoning models think on it first."""


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """The bound of one call over all of its candidates, in tokens and in nano-credits.

    `input_tokens` and `output_tokens` are of the largest candidate, `output_tokens` for all `choices` together,
    `input_tokens` for all `prompts` and for all that is read again after each use of a tool; `prompt_tokens` of them
    are what is read first. `prediction_tokens` of them come on top of the maximum of each choice. `images` are billed
    beside the tokens where they have a price, and so is each use of `tools`, of which the client allows
    `tool_calls_max` unless it leaves that to us. `asks_for_caches` is as in `PaidRequest`.
    """

    input_tokens: int
    prompt_tokens: int
    output_tokens: int
    at_least: Nanos
    at_most: Nanos
    prompts: int
    choices: int
    prediction_tokens: int
    images: int
    tools: tuple[str, ...]
    tool_calls_max: int | None
    is_maximum_named: bool
    asks_for_caches: bool

    @property
    def window_tokens(self) -> int:
        """What counts against tokens a minute until the usage is known: a guess, as the bound would starve callers."""
        return self.prompt_tokens // 4 + min(self.output_tokens, USEFUL_OUTPUT_TOKENS)


def estimate(request: PaidRequest, prompt_tokens: int, offered: Sequence[Offer]) -> Estimate:
    """The estimate of `request`, of which what is in its body is at most `prompt_tokens` tokens: its bytes, at worst.

    The numbers of its maxima are no prompt: so a call costs the same input whatever maximum it names.

    Raises `BadRequest` when more of it is not in its body, and a candidate's context is not known.
    """
    if request.maxima:
        prompt_tokens = max(0, prompt_tokens - request.maxima_bytes)
    inputs, prompt, outputs, least, most = bounds = _bounds(request, prompt_tokens, offered[0])
    if len(offered) > 1:
        others = (_bounds(request, prompt_tokens, offer) for offer in offered[1:])
        inputs, prompt, outputs, least, most = map(max, zip(bounds, *others, strict=True))
    return Estimate(
        inputs,
        prompt,
        outputs,
        least,
        most,
        prompts=request.prompts,
        choices=request.choices,
        prediction_tokens=request.prediction_tokens,
        images=request.images,
        tools=tuple(request.tools),
        tool_calls_max=request.tool_calls_max,
        is_maximum_named=bool(request.maxima) or not request.has_output,
        asks_for_caches=request.asks_for_caches,
    )


def _bounds(request: PaidRequest, prompt_tokens: int, offer: Offer) -> tuple[int, int, int, Nanos, Nanos]:
    """The first five numbers of an `Estimate`, of one candidate."""
    candidate, choices, prediction_tokens = offer.candidate, request.choices, request.prediction_tokens
    prompt = inputs = _prompt_tokens(request, prompt_tokens, candidate)
    uses = 0
    if request.tools:
        uses = tool_uses_max(request, candidate)
        inputs += uses * (candidate.context_tokens or 0)
    maximum = output_tokens_max(request, candidate)
    outputs = (maximum + prediction_tokens) * choices
    most = least = _held(request, offer, inputs, outputs, uses)
    useful = _useful_output_tokens(request, candidate, maximum)
    if useful != maximum:
        least = _held(request, offer, inputs, (useful + prediction_tokens) * choices, uses)
    return inputs, prompt, outputs, least, most


def _held(request: PaidRequest, offer: Offer, input_tokens: int, output_tokens: int, tool_uses: int) -> Nanos:
    return bound(
        input_tokens,
        output_tokens,
        price_bounding(request, offer),
        offer.markup_bps,
        images=request.images,
        tools=request.tools,
        tool_uses=tool_uses,
    )


def price_bounding(asked: PaidRequest | Estimate, offer: Offer) -> Price:
    """The price of what the call may use at this candidate: of writing to caches only where that can be."""
    if asked.asks_for_caches or offer.candidate.caches_unasked:
        return offer.price
    return offer.price.without_writes


def input_bound(estimated: Estimate, candidate: Candidate) -> int:
    """The most input that this candidate can bill: what the largest one can, within its own context."""
    if candidate.context_tokens is None:
        return estimated.input_tokens
    return min(estimated.input_tokens, candidate.context_tokens * _readings(estimated, candidate))


def maximum_bought(estimated: Estimate, offer: Offer, amount: Nanos) -> int | None:
    """The output tokens of each choice that `amount` covers at this candidate; None when it covers any number."""
    tokens = output_tokens_affordable(
        amount,
        input_bound(estimated, offer.candidate),
        price_bounding(estimated, offer),
        offer.markup_bps,
        images=estimated.images,
        tools=estimated.tools,
        tool_uses=tool_uses_max(estimated, offer.candidate),
    )
    return None if tokens is None else max(0, max(0, tokens) // estimated.choices - estimated.prediction_tokens)


def tool_uses_max(asked: PaidRequest | Estimate, candidate: Candidate) -> int:
    """The most uses of the provider's tools in one call at this candidate: the client's maximum, else the model's."""
    if not asked.tools:
        return 0
    return (asked.tool_calls_max or candidate.tool_calls_max or 0) * asked.choices


def _readings(asked: PaidRequest | Estimate, candidate: Candidate) -> int:
    """How often the model may read as much as its context holds.

    After each use of a tool it reads everything once more, and providers add that up.
    """
    return asked.prompts + tool_uses_max(asked, candidate) if asked.tools else asked.prompts


def maximum_taken(estimated: Estimate, candidate: Candidate, bought: int) -> int:
    """The maximum of each choice to send for `bought`.

    Servers refuse one that does not fit beside the prompt into the context. How much of that the prompt takes is known
    as a bound only, so it leaves room for a useful answer.
    """
    if candidate.output_tokens_max is not None or candidate.context_tokens is None:
        return bought
    return min(bought, max(candidate.context_tokens - input_bound(estimated, candidate), USEFUL_OUTPUT_TOKENS))


def maximum_affordable(estimated: Estimate, offered: Sequence[Offer], amount: Nanos) -> int | None:
    """The output tokens of each choice with which the call would be covered by `amount`, whoever serves it.

    A call that named none will be a little longer once it does.
    """
    if not estimated.is_maximum_named:
        longer = estimated.input_tokens + NAMING_BYTES_MAX
        estimated = msgspec.structs.replace(estimated, input_tokens=longer)
    bought = [maximum_bought(estimated, offer, amount) for offer in offered]
    return min((tokens for tokens in bought if tokens is not None), default=None)


def plausible_tokens_max(request: PaidRequest, candidate: Candidate) -> int | None:
    """The most tokens that this candidate can have used, even if it ignores maxima; None where nobody knows."""
    if candidate.context_tokens is None:
        return None
    maximum = candidate.output_tokens_max or candidate.context_tokens
    if request.maxima:
        maximum = max(maximum, *request.maxima.values())
    outputs = (maximum + request.prediction_tokens) * request.choices
    return candidate.context_tokens * _readings(request, candidate) + outputs


def _prompt_tokens(request: PaidRequest, prompt_tokens: int, candidate: Candidate) -> int:
    is_unsized = request.is_unsized and not (request.has_only_images and candidate.image_tokens_max is not None)
    if candidate.context_tokens is None:
        if is_unsized:
            raise BadRequest(
                f"The context of {candidate.target} is not known here, so images, audio and files cannot be priced.",
                code="unsupported_content",
            )
        return _tokens_with_images(request, prompt_tokens, candidate)
    contexts = candidate.context_tokens * request.prompts
    return contexts if is_unsized else min(_tokens_with_images(request, prompt_tokens, candidate), contexts)


def _tokens_with_images(request: PaidRequest, prompt_tokens: int, candidate: Candidate) -> int:
    """The bound of a prompt with what the provider adds, and images as large as they can be, whatever their bytes."""
    if request.has_instructions:
        prompt_tokens += candidate.added_tokens
    if not request.is_unsized:
        return prompt_tokens
    return prompt_tokens - request.image_bytes + request.images * (candidate.image_tokens_max or 0)


def output_tokens_max(request: PaidRequest, candidate: Candidate) -> int:
    """The most output of one choice, beside a prediction: the client's own maximum, else the model's."""
    if not request.has_output:
        return 0
    maximum = request.maximum
    return maximum if maximum is not None else candidate.output_tokens_max or candidate.context_tokens or 0


def _useful_output_tokens(request: PaidRequest, candidate: Candidate, maximum: int) -> int:
    """The least output of one choice that is worth starting for, of at most `maximum`."""
    if request.maxima or not request.has_output:
        return maximum
    useful = USEFUL_OUTPUT_TOKENS_REASONING if candidate.is_reasoning else USEFUL_OUTPUT_TOKENS
    if request.thinking_tokens:
        useful = max(useful, request.thinking_tokens + USEFUL_OUTPUT_TOKENS)
    return min(maximum, useful)
