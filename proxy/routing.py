"""Which candidates may serve a call, in which order."""

from collections.abc import Mapping

import msgspec

from proxy.errors import ModelNotFound
from proxy.pricing import Price


class Candidate(msgspec.Struct, frozen=True):
    """One model at one provider, with its price and limits.

    `output_tokens_max` and `context_tokens` are None where nobody has said; at least one of them is known. `tokenizer`
    is the name of OpenAI's tokenizer that it uses, None where it uses another one.
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

    @property
    def target(self) -> str:
        """`provider/model`, the name that prices and allowances know it by."""
        return f"{self.provider}/{self.model}"


Models = Mapping[str, tuple[Candidate, ...]]
"""Every name a client may ask for, with who may serve it, the preferred one first."""


def candidates(models: Models, model: str) -> tuple[Candidate, ...]:
    """Who may serve `model`, the preferred one first. Raises `ModelNotFound` when nobody does."""
    found = models.get(model)
    if not found:
        raise ModelNotFound(model)
    return found
