"""What the end of a call is booked as: its usage, bounded, at the price and markup that it was reserved at."""

import msgspec

from proxy.calls import OpenCall, milliseconds, now
from proxy.estimate import input_bound, output_tokens_max, plausible_tokens_max, price_bounding, tool_uses_max
from proxy.ledger.decide import Receipt, Release, Settle
from proxy.metering import Metered, UsageSource
from proxy.outgoing import clamped_maximum
from proxy.pricing import TOOL_CLASSES, Price, billed, costs, dearest_usage
from proxy.units import Usage

NAME_CHARACTERS_MAX = 200
"""How much is kept of what a provider calls its model."""


def settlement(opened: OpenCall, metered: Metered, outcome: str) -> tuple[Settle, Usage]:
    """What charges for the call, and the usage that it charges for, in the classes that have a price."""
    candidate, markup_bps = opened.candidate, opened.offer.markup_bps
    price = _price_charged(opened, metered)
    usage = billed(metered.usage, price, opened.request.images)
    charge, paid = costs(usage, price, markup_bps)
    receipt = Receipt(
        outcome=outcome,
        provider=candidate.provider,
        request_model=candidate.model,
        response_model=_storable(metered.response_model),
        usage=msgspec.json.encode(usage).decode(),
        usage_source=metered.source,
        price=price.as_json,
        markup_bps=markup_bps,
        provider_cost=paid,
        ttft_ms=None if opened.first_byte is None else milliseconds(opened.first_byte - opened.started),
        duration_ms=milliseconds(now() - opened.started),
    )
    operation = Settle(
        id=opened.call.request_id,
        wallet_id=opened.call.caller.wallet_id,
        cost=charge,
        tokens=metered.usage.input_tokens + metered.usage.output_tokens,
        receipt=receipt,
    )
    return operation, usage


def releasing(opened: OpenCall, outcome: str, *, is_undelivered: bool = False) -> Release:
    """What frees the reservation of a call that costs nothing; with `is_undelivered` also what it was charged."""
    return Release(
        id=opened.call.request_id,
        wallet_id=opened.call.caller.wallet_id,
        receipt=Receipt(
            outcome=outcome,
            provider=opened.candidate.provider,
            request_model=opened.candidate.model,
            markup_bps=opened.offer.markup_bps,
            duration_ms=milliseconds(now() - opened.started),
        ),
        is_undelivered=is_undelivered,
    )


def usage_bound(opened: OpenCall) -> Usage:
    """The most that may be counted where the provider reports nothing: what was reserved for, at this candidate."""
    estimated, candidate = opened.estimated, opened.candidate
    maximum = clamped_maximum(opened)
    if maximum is None:
        maximum = output_tokens_max(opened.request, candidate)
    output = (maximum + estimated.prediction_tokens) * estimated.choices
    usage = Usage(input=input_bound(estimated, candidate), output=output)
    if not estimated.tools:
        return usage
    uses = dearest_usage(0, 0, opened.offer.price, tools=estimated.tools, tool_uses=tool_uses_max(estimated, candidate))
    return msgspec.structs.replace(usage, **{name: getattr(uses, name) for name in TOOL_CLASSES})


def assumed(opened: OpenCall) -> Metered:
    """The whole reservation: nobody knows what was used."""
    bound = usage_bound(opened)
    usage = dearest_usage(
        bound.input,
        bound.output,
        price_bounding(opened.estimated, opened.offer),
        images=opened.estimated.images,
        tools=opened.estimated.tools,
        tool_uses=bound.tool_uses,
    )
    return Metered(usage, UsageSource.ASSUMED)


def tokens_plausible_max(opened: OpenCall) -> int:
    """The most tokens that a provider can have used: by the model's limits, and by what can be booked at all."""
    by_price = opened.offer.tokens_payable_max
    by_model = plausible_tokens_max(opened.request, opened.candidate)
    return by_price if by_model is None else min(by_price, by_model)


def _price_charged(opened: OpenCall, metered: Metered) -> Price:
    """The price of the service tier that served; where nobody knows what was used, the one that bounds the call."""
    if metered.source is UsageSource.ASSUMED:
        return opened.offer.price
    return opened.candidate.price_charged(opened.request.service_tier, metered.service_tier)


def _storable(name: str | None) -> str | None:
    """What a provider calls its model, as a database takes it."""
    return None if name is None else name.replace("\0", "")[:NAME_CHARACTERS_MAX]
