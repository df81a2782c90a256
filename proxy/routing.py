"""Which candidates may serve a call, in which order, and which of them are left alone for a while."""

from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import cached_property
from types import MappingProxyType

import msgspec

from proxy.errors import BadRequest, ModelNotFound
from proxy.pricing import Price, is_no_dearer, tokens_payable_max

FAILURES_MAX = 3
"""In a row: with the last of them a candidate is left alone. One failure says little of the next call."""

COOL_DOWN_S = 5.0
"""The first time; each further failure doubles it."""

COOL_DOWN_S_MAX = 60.0

RETRY_AFTER_S_MAX = 600.0
"""How much of a provider's own wish to be left alone is granted."""

PROBE_S = 30.0
"""How long the one call that tries a candidate again may take to say how it goes, before another one may."""

_STANDARD = frozenset({"default", "standard", "on_demand"})
"""What providers call the service tier of their ordinary price."""

_UNDECIDED = frozenset({None, "auto"})
"""The provider, or the operator's account there, chooses the service tier."""


NO_TOOLS: Mapping[str, str] = MappingProxyType({})


class Candidate(msgspec.Struct, frozen=True, dict=True):
    """One model at one provider, with its price, markup and limits, under one of the names that clients ask for.

    `output_tokens_max` and `context_tokens` are None where nobody has said; at least one of them is known. `tokenizer`
    is the name of OpenAI's tokenizer that it uses, None where it uses another one; `image_tokens_max` the most that an
    image can become, None where it can be anything. `tool_calls_max` bounds the uses of the provider's tools in calls
    that name no maximum of their own, None where such calls may use none. `service_prices` are those of the service
    tiers beside the standard one, by name, and `dearest_price` costs at least as much as any of them. `markup_bps` is
    for callers without a rule of their own. Of the candidates of a name the lowest `priority` comes first, and among
    equals as many calls go to each as its `weight` says. `is_local` for a provider in the operator's own network,
    which fetches media from names only if it `resolves_media`. `added_tokens` is the most that the provider itself puts
    into a prompt with tools or a format. `caches_unasked` unless it writes to caches only for calls that ask for it.
    """

    provider: str
    model: str
    price: Price
    output_tokens_max: int | None
    context_tokens: int | None
    maximum_field: str
    is_reasoning: bool
    knows_stream_options: bool
    tokenizer: str | None = None
    image_tokens_max: int | None = None
    tool_calls_max: int | None = None
    service_prices: Mapping[str, Price] = {}
    dearest_price: Price | None = None
    markup_bps: int = 0
    priority: int = 0
    weight: int = 1
    is_local: bool = False
    added_tokens: int = 0
    caches_unasked: bool = True
    resolves_media: bool = False

    @cached_property
    def target(self) -> str:
        """`provider/model`, the name that prices and allowances know it by."""
        return f"{self.provider}/{self.model}"

    def price_bounding(self, service_tier: str | None) -> Price | None:
        """What a call costs at most that asks for `service_tier`; None where that has no price."""
        if service_tier in _UNDECIDED:
            return self.dearest_price or self.price
        return self._priced(service_tier)

    def price_charged(self, asked: str | None, reported: str | None) -> Price:
        """What a call costs that `asked` for a service tier, and whose answer `reported` one; None where there is none.

        What was reported counts, unless it has no price or is dearer than what was asked for: then the price that
        bounds the call does.
        """
        if not self.service_prices:
            return self.price
        bounding = self.price_bounding(asked) or self.price
        found = self._priced(reported)
        if asked in _UNDECIDED:
            return self.price if reported is None else found or bounding
        return found if found is not None and is_no_dearer(found, bounding) else bounding

    def _priced(self, service_tier: str | None) -> Price | None:
        return self.price if service_tier in _STANDARD else self.service_prices.get(service_tier or "")


class Offer(msgspec.Struct, frozen=True, dict=True):
    """A candidate for one call, with the price that bounds what it costs there, and the caller's markup."""

    candidate: Candidate
    price: Price
    markup_bps: int

    @cached_property
    def tokens_payable_max(self) -> int:
        """How many tokens can be charged for at all."""
        return tokens_payable_max(self.price, self.markup_bps)


class Terms(msgspec.Struct, frozen=True):
    """What a reservation keeps of an offer: at what it was made, whatever changes until the call ends."""

    provider: str
    model: str
    price: Price
    markup_bps: int


class Offers(tuple[Offer, ...]):  # noqa: SLOT001 - cached properties need a dict
    """Who may serve a call, and at what. Most calls get the same ones: what follows from them is found once."""

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The candidates, as `provider/model`."""
        return tuple(offer.candidate.target for offer in self)

    @cached_property
    def terms(self) -> str:
        """The `Terms` of each, as a JSON list."""
        terms = [Terms(each.candidate.provider, each.candidate.model, each.price, each.markup_bps) for each in self]
        return msgspec.json.encode(terms).decode()


Models = Mapping[str, tuple[Candidate, ...]]
"""Every name a client may ask for, with who may serve it, the preferred one first."""


def candidates(models: Models, model: str, provider: str | None = None) -> tuple[Candidate, ...]:
    """Who may serve `model`, the preferred one first, or only `provider`. Raises `ModelNotFound` when nobody does."""
    found = models.get(model, ())
    if provider is not None:
        found = tuple(candidate for candidate in found if candidate.provider == provider)
    if not found:
        raise ModelNotFound(model, provider)
    return found


def offers(  # noqa: PLR0913 - what a request may ask for
    found: Sequence[Candidate],
    service_tier: str | None,
    markup_bps: int | None,
    *,
    wants_audio: bool = False,
    tools: Mapping[str, str] = NO_TOOLS,
    tool_calls_max: int | None = None,
) -> Offers:
    """Those of `found` where `service_tier` has a price, at the caller's own `markup_bps` or everybody's.

    With `wants_audio` those where spoken output has a price of its own, which is never that of text; with `tools` those
    that the provider may run, where all of them have a price and a number of uses that bounds them: the caller's
    `tool_calls_max`, or the candidate's. Raises `BadRequest` when there are none.
    """
    if tools:
        found = _with_tools(found, tools, tool_calls_max)
    offered = []
    for candidate in found:
        price = candidate.price_bounding(service_tier)
        if price is not None and not (wants_audio and price.audio_output == price.output):
            offered.append(Offer(candidate, price, candidate.markup_bps if markup_bps is None else markup_bps))
    if not offered and wants_audio:
        raise BadRequest("Spoken output is not priced here.", param="modalities", code="unsupported_parameter")
    if not offered:
        raise BadRequest(
            f"The service tier '{service_tier}' is not priced here.",
            param="service_tier",
            code="unsupported_parameter",
        )
    return Offers(offered)


def _with_tools(found: Sequence[Candidate], tools: Mapping[str, str], named: int | None) -> list[Candidate]:
    """Those of `found` that may run `tools`. Raises `BadRequest` when there are none."""
    for tool, called in tools.items():
        found = [candidate for candidate in found if getattr(candidate.price, tool) is not None]
        if not found:
            raise BadRequest(
                f"Tools of type '{called}' are billed outside of tokens, and not priced here.",
                param=called if called == "web_search_options" else "tools",
                code="unsupported_parameter",
            )
    bounded = [candidate for candidate in found if named is not None or candidate.tool_calls_max is not None]
    if not bounded:
        raise BadRequest(
            "How often tools are used is not bounded here: name 'max_tool_calls' in a request for a response.",
            param="max_tool_calls",
            code="unsupported_parameter",
        )
    return bounded


class _State(msgspec.Struct):
    failures: int = 0
    cooling_until: float = 0.0
    probed_until: float = 0.0


class Health:
    """What one process has seen of its candidates lately; instants are seconds of any clock that only goes forward.

    A candidate that failed `FAILURES_MAX` times in a row, or asked to be left alone, comes after all others until its
    cool-down is over. Then one call at a time tries it again, until one of them succeeds. Nobody is ever left without
    a candidate: where all are cooling down they are tried all the same.
    """

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}

    def ordered(self, offered: Sequence[Offer], now: float, draw: Callable[[], float]) -> tuple[Offer, ...]:
        """`offered` in the order in which to try them; `draw` gives random numbers from 0 to below 1."""
        if len(offered) == 1:
            return tuple(offered)
        by_priority: dict[int, list[Offer]] = {}
        for offer in offered:
            by_priority.setdefault(offer.candidate.priority, []).append(offer)
        preferred = [offer for priority in sorted(by_priority) for offer in _shuffled(by_priority[priority], draw)]
        if not self._states:
            return tuple(preferred)
        return tuple(sorted(preferred, key=lambda offer: self._is_left_alone(offer.candidate.target, now)))

    def trying(self, target: str, now: float) -> bool:
        """A call goes to `target`; returns whether it is the one that finds out if `target` is well again."""
        state = self._states.get(target)
        if state is None or not state.cooling_until or now < state.probed_until:
            return False
        state.probed_until = now + PROBE_S
        return True

    def not_tried(self, target: str) -> None:
        """The call that was to find out was not sent: the next one may."""
        state = self._states.get(target)
        if state is not None:
            state.probed_until = 0.0

    def succeeded(self, target: str) -> None:
        """`target` has answered."""
        self._states.pop(target, None)

    def cooling(self, now: float) -> list[str]:
        """The targets that are left alone at `now`."""
        return [target for target, state in self._states.items() if now < state.cooling_until]

    def failed(self, target: str, now: float, retry_after_s: float | None = None) -> bool:
        """`target` has failed, and would like to be left alone for `retry_after_s` seconds; returns whether it is."""
        state = self._states.setdefault(target, _State())
        state.failures += 1
        state.probed_until = 0.0
        wait_s = 0.0
        if state.failures >= FAILURES_MAX:
            # An exponent of any size would overflow a float.
            doublings = min(state.failures - FAILURES_MAX, 10)
            wait_s = min(COOL_DOWN_S * 2**doublings, COOL_DOWN_S_MAX)
        if retry_after_s is not None:
            wait_s = max(wait_s, min(retry_after_s, RETRY_AFTER_S_MAX))
        if wait_s:
            state.cooling_until = max(state.cooling_until, now + wait_s)
        return wait_s > 0

    def _is_left_alone(self, target: str, now: float) -> bool:
        state = self._states.get(target)
        return state is not None and (now < state.cooling_until or now < state.probed_until)


def _shuffled(offered: list[Offer], draw: Callable[[], float]) -> list[Offer]:
    """All of `offered`, each the more likely before another the more it weighs."""
    waiting, drawn = list(offered), []
    while len(waiting) > 1:
        point = draw() * sum(offer.candidate.weight for offer in waiting)
        for place, offer in enumerate(waiting):
            point -= offer.candidate.weight
            if point < 0 or place == len(waiting) - 1:
                drawn.append(waiting.pop(place))
                break
    return drawn + waiting


def retry_after_s(value: str | None, unix_s: float) -> float | None:
    """The seconds in a `Retry-After` header (RFC 9110, section 10.2.3) at `unix_s`; None where there are none."""
    text = (value or "").strip()
    if text.isascii() and text.isdecimal():
        return float(min(int(text[:10]), RETRY_AFTER_S_MAX))
    try:
        until_s = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(max(until_s - unix_s, 0.0), RETRY_AFTER_S_MAX)
