"""`POST /completions`, the legacy ones."""

from collections.abc import Iterator
from typing import Any

from tests.fakes.provider.answer import CREATED_AT, Answer, plain
from tests.fakes.provider.behaviour import Behaviour
from tests.fakes.provider.chunks import chunk_stream
from tests.fakes.provider.journal import Served
from tests.fakes.provider.prompts import Prompt, prompt_tokens_of, prompts_of, texts_of
from tests.fakes.provider.reply import Bill, Reply, bytes_of, compose, slices

_TOKENS_MAX = 16  # OpenAI's default for this endpoint, and only for this one


def fault(request: Any) -> str | None:
    """Why `request` is none; None if it is one."""
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        return "A completion has a model and a prompt."
    if not prompts_of(request.get("prompt")):
        return "A prompt is a string, an array of strings, an array of tokens, or an array of token arrays."
    if not all(isinstance(request.get(name), int | None) for name in ("n", "best_of", "max_tokens")):
        return "n, best_of and max_tokens are integers."
    if _best_of(request) < _choices(request):
        return "You requested that the server return more choices than it will generate (best_of is less than n)."
    if request.get("stream") and _best_of(request) > _choices(request):
        return "Results cannot be streamed when best_of is greater than n."
    return None


def behaviour(request: dict[str, Any]) -> Behaviour:
    """The one that the last wish among the prompts asks for."""
    return Behaviour.from_last_wish(texts_of(prompts_of(request["prompt"])))


def prompt_tokens(request: dict[str, Any]) -> int:
    """What the prompts cost."""
    return sum(prompt_tokens_of(prompt) for prompt in prompts_of(request["prompt"]))


def answer(served: Served, request: dict[str, Any]) -> Answer:
    """`n` choices for each prompt, plain or streamed; completes the journal's counts."""
    prompts = prompts_of(request["prompt"])
    tokens_max = _TOKENS_MAX if request.get("max_tokens") is None else request["max_tokens"]
    reply = compose(served.behaviour, tokens_max)
    choices = _choices(request) * len(prompts)
    bill = Bill(
        behaviour=served.behaviour,
        prompt=served.prompt_tokens,
        shown=choices * reply.tokens,
        unseen=_best_of(request) * len(prompts) * reply.unseen_tokens,
        thrown=(_best_of(request) - _choices(request)) * len(prompts) * reply.tokens,
    )
    served.unseen_tokens = bill.unseen + bill.thrown
    envelope = {
        "id": f"cmpl-fake-{served.id}",
        "object": "text_completion",
        "created": CREATED_AT,
        "model": request["model"],
        "system_fingerprint": "fp_fake",
    }
    echoes = [_echo(prompt) if request.get("echo") else "" for prompt in prompts for _ in range(_choices(request))]
    if request.get("stream"):
        return chunk_stream(envelope, _bits(reply, echoes, served.behaviour.chunk_tokens), bill, request)
    usage = bill.usage()
    shape = envelope | {
        "choices": [_choice(index, echo + reply.text, reply.finish_reason) for index, echo in enumerate(echoes)]
    }
    return plain(shape | ({} if usage is None else {"usage": usage}), tokens=bill.shown, usage=usage)


def _choices(request: dict[str, Any]) -> int:
    return request.get("n") or 1


def _best_of(request: dict[str, Any]) -> int:
    """How many replies are generated for each prompt."""
    return request.get("best_of") or _choices(request)


def _echo(prompt: Prompt) -> str:
    """The prompt as it comes back; every token number stands for a letter."""
    return prompt if isinstance(prompt, str) else "".join(chr(97 + token % 26) for token in prompt)


def _bits(reply: Reply, echoes: list[str], chunk_tokens: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The choices of a stream's chunks with their tokens: the prompt if it is echoed, the text, the reason."""
    for index, echo in enumerate(echoes):
        if echo:
            yield _choice(index, echo), 0
    for bit in slices(reply.text, chunk_tokens):
        for index in range(len(echoes)):
            yield _choice(index, bit), bytes_of(bit)
    for index in range(len(echoes)):
        yield _choice(index, "", reply.finish_reason), 0


def _choice(index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
