"""`POST /embeddings`."""

import base64
import hashlib
import struct
from typing import Any

from tests.fakes.provider.answer import Answer, as_json, plain
from tests.fakes.provider.behaviour import Behaviour
from tests.fakes.provider.journal import Served
from tests.fakes.provider.prompts import Prompt, prompt_tokens_of, prompts_of, texts_of
from tests.fakes.provider.reply import Bill

_DIMENSIONS = 8


def fault(request: Any) -> str | None:
    """Why `request` is none; None if it is one."""
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        return "An embedding has a model and an input."
    if not all(prompts_of(request.get("input"))):
        return "The input cannot be an empty string."
    if not prompts_of(request.get("input")):
        return "An input is a string, an array of strings, an array of tokens, or an array of token arrays."
    if not isinstance(request.get("dimensions", _DIMENSIONS), int) or request.get("dimensions", _DIMENSIONS) < 1:
        return "dimensions is a number above zero."
    if request.get("encoding_format", "float") not in ("float", "base64"):
        return "encoding_format is float or base64."
    return None


def behaviour(request: dict[str, Any]) -> Behaviour:
    """The one that the last wish among the inputs asks for."""
    return Behaviour.from_last_wish(texts_of(prompts_of(request["input"])))


def prompt_tokens(request: dict[str, Any]) -> int:
    """What the inputs cost."""
    return sum(prompt_tokens_of(prompt) for prompt in prompts_of(request["input"]))


def answer(served: Served, request: dict[str, Any]) -> Answer:
    """A vector for each input, the same one whenever it comes."""
    usage = _usage(Bill(behaviour=served.behaviour, prompt=served.prompt_tokens, shown=0))
    dimensions = request.get("dimensions", _DIMENSIONS)
    vectors = [_vector(prompt, dimensions) for prompt in prompts_of(request["input"])]
    is_packed = request.get("encoding_format") == "base64"
    shape = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _packed(vector) if is_packed else vector}
            for index, vector in enumerate(vectors)
        ],
        "model": request["model"],
    }
    return plain(shape | ({} if usage is None else {"usage": usage}), usage=usage)


def _usage(bill: Bill) -> dict[str, Any] | None:
    usage = bill.usage()
    if usage is None or isinstance(bill.behaviour.usage, dict):
        return usage
    return {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["prompt_tokens"]}


def _vector(prompt: Prompt, dimensions: int) -> list[float]:
    """Components between -1 and 1 that single precision holds exactly."""
    digest = hashlib.shake_256(as_json(prompt)).digest(dimensions)
    return [(octet - 127.5) / 128 for octet in digest]


def _packed(vector: list[float]) -> str:
    """The vector as base64 of little-endian single floats."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
