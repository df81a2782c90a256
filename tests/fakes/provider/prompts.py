"""Prompts and inputs that are texts or token numbers, alone or several."""

from typing import Any

from tests.fakes.provider.reply import bytes_of

Prompt = str | list[int]


def prompts_of(given: Any) -> list[Prompt]:
    """The prompts in a string, an array of strings, an array of tokens or an array of such arrays; empty if none."""
    if isinstance(given, str) or _is_tokens(given):
        return [given]
    if isinstance(given, list) and (all(isinstance(each, str) for each in given) or all(map(_is_tokens, given))):
        return given
    return []


def prompt_tokens_of(prompt: Prompt) -> int:
    """A byte of a text is a token, and so is a number."""
    return bytes_of(prompt) if isinstance(prompt, str) else len(prompt)


def texts_of(prompts: list[Prompt]) -> list[str]:
    """Those that are texts."""
    return [prompt for prompt in prompts if isinstance(prompt, str)]


def _is_tokens(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(token, int) for token in given)
