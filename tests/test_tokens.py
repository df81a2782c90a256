"""Counting by the published tokenizers, on vocabularies from a package."""

import json
import os
import subprocess
import sys

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import tokens

TOKENIZERS = ["cl100k_base", "o200k_base", "o200k_harmony"]


@pytest.mark.parametrize(("tokenizer", "expected"), [("cl100k_base", 2), ("o200k_base", 2), ("o200k_harmony", 2)])
def test_the_published_vocabularies(tokenizer, expected, monkeypatch):
    """They need no network: the environment's own cache is left as it was."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert tokens.count(tokenizer, ["hello world"]) == expected


FIRST_COUNTS = """
import os, threading
from concurrent.futures import ThreadPoolExecutor
from proxy import tokens

environ = dict(os.environ)
all_ready = threading.Barrier(4)

def counted(tokenizer):
    all_ready.wait(10)
    return tokens.count(tokenizer, ["hello world"])

with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(counted, ["o200k_base", "cl100k_base"] * 2)) == [2] * 4
assert dict(os.environ) == environ
"""


def test_threads_that_count_for_the_first_time_at_once():
    """Each gets its count, and the environment is left as it was."""
    environ = {name: value for name, value in os.environ.items() if name != "TIKTOKEN_CACHE_DIR"}
    program = [sys.executable, "-c", FIRST_COUNTS]
    done = subprocess.run(program, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_only_these_are_known():
    """Any other name, or none, is counted otherwise."""
    assert all(map(tokens.is_known, TOKENIZERS))
    assert not tokens.is_known("claude")
    assert not tokens.is_known(None)


def test_a_text_that_the_tokenizer_cannot_take_counts_as_its_bytes():
    """A panic inside of it is no end of ours; and a count never takes more than the bytes."""
    spaces = " " * 3_000_000
    assert 0 < tokens.count("o200k_base", [spaces]) <= len(spaces)


def test_numbers_of_any_size_are_counted():
    """JSON has them, whatever Python makes of them."""
    for number in ("1e999", "-1e999", "9" * 5_000):
        body = b'{"messages": [{"content": "hello world"}], "odd": %b}' % number.encode()
        assert tokens.count_bound("o200k_base", body) > 2
        assert tokens.TokenCounter("o200k_base").prompt(body) >= 2


def test_special_tokens_are_ordinary_text():
    """A prompt cannot make itself look smaller, nor be refused, by spelling one out."""
    assert tokens.count("o200k_base", ["<|endoftext|>"]) > 1


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    ["hello world " * 9, "<|im_start|>", "\u2028", "é" * 30]
)


@settings(deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=6))
def test_the_bound_covers_a_template(said):
    """Messages between special tokens are within the bound."""
    messages = [{"role": role, "content": content} for role, content in said]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    bound = tokens.count_bound("o200k_base", body)
    encode = tiktoken.get_encoding("o200k_base").encode_ordinary
    prompt = 3 + sum(4 + len(encode(f"{role}\n{content}")) for role, content in said)
    assert prompt <= bound
    assert tokens.TokenCounter("o200k_base").prompt(body) <= bound
