import json
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.wire.objects import check_nesting, error_body, patch


@pytest.mark.parametrize(
    ("old", "changes", "new"),
    [
        (b"{}", {"a": b"1"}, b'{"a":1}'),
        (b" { } ", {"a": b"1", "b": b"[]"}, b' {"a":1,"b":[] } '),
        (b'{"b":2}', {"a": b"1"}, b'{"a":1,"b":2}'),
        (b'{"a" : 12 }', {"a": b"null"}, b'{"a" : null }'),
        (b'{"x":{"a":1},"a":"}","y":"\\"a\\":1"}', {"a": b"{}"}, b'{"x":{"a":1},"a":{},"y":"\\"a\\":1"}'),
        (b'{"x":["a","a"],"a":[1,\n2]}', {"a": b"3"}, b'{"x":["a","a"],"a":3}'),
        (b'{"\\u0061":1}', {"a": b"2"}, b'{"\\u0061":2}'),
        (b'{"a":1,"a":22}', {"a": b"3"}, b'{"a":3,"a":3}'),
        (b'{"\\"a":1,"a\\\\":2,"a":3}', {"a": b"4"}, b'{"\\"a":1,"a\\\\":2,"a":4}'),
        (b'{"a":1}', {}, b'{"a":1}'),
        (b'{"a":1}', {"a": None}, b"{}"),
        (b'{"a":1}', {"b": None}, b'{"a":1}'),
        (b"{}", {"b": None}, b"{}"),
        (b'{"a":1, "b":2 , "c":3 }', {"a": None}, b'{ "b":2 , "c":3 }'),
        (b'{"a":1, "b":2 , "c":3 }', {"b": None}, b'{"a":1 , "c":3 }'),
        (b'{"a":1, "b":2 , "c":3 }', {"c": None}, b'{"a":1, "b":2 }'),
        (b'{"a":1 , "b":2}', {"a": None, "d": b"4"}, b'{"d":4,  "b":2}'),
        (b'{"a":1,"b":2}', {"a": None, "b": None, "d": b"4"}, b'{"d":4}'),
    ],
)
def test_patch(old, changes, new):
    """Only the named top-level fields change; names inside of values and strings are none."""
    assert patch(old, changes) == new


@pytest.mark.parametrize("not_an_object", [b"", b"[]", b'{"a":}', b"{" * 3000, b'{"\xff":1}'])
def test_patch_of_something_else(not_an_object):
    """What is no object is refused as a body would be."""
    with pytest.raises(BadRequest):
        patch(not_an_object, {"a": b"1"})


texts = st.text('ab_é\u2028\U0001f600\0"\\{', max_size=8) | st.sampled_from(["a", "b", '"a":', "{", "\\", "é"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.dictionaries(texts, values, max_size=5),
    st.dictionaries(texts, values, max_size=3),
    st.sets(st.sampled_from(["a", "b", "é", "{"])),
    st.sampled_from([None, 0, 2, "\t"]),
    st.sampled_from([(",", ":"), (", ", ": "), (" , ", " :\n")]),
    st.booleans(),
)
def test_patch_sets_and_keeps(old, new, gone, indent, separators, ensure_ascii):
    """The patched body reads as the changed object, and without the new fields and values it is the old one's bytes."""
    old_body = json.dumps(old, indent=indent, separators=separators, ensure_ascii=ensure_ascii).encode()
    changes = {field: json.dumps(value).encode() for field, value in new.items()}
    patched = patch(old_body, changes)
    assert json.loads(patched) == old | new
    # With the new fields out again, and the old values back in place, nothing else may differ.
    added = [msgspec.json.encode(field) + b":" + changes[field] for field in new if field not in old]
    inserted = b",".join(added) + (b"," if added and old else b"")
    start = old_body.index(b"{") + 1
    assert patched[start:].startswith(inserted)
    rest = patched[:start] + patched[start + len(inserted) :]
    fields = msgspec.json.decode(old_body, type=dict[str, msgspec.Raw])
    assert patch(rest, {field: bytes(fields[field]) for field in new if field in old}) == old_body
    left = {field: value for field, value in (old | new).items() if field not in gone}
    assert json.loads(patch(old_body, changes | dict.fromkeys(gone))) == left


def test_error_body():
    """An error has OpenAI's shape, with further fields beside the four."""
    error = json.loads(error_body("Not é.", "insufficient_quota", None, "insufficient_credits", required="0.5"))
    assert error == {
        "error": {
            "message": "Not é.",
            "type": "insufficient_quota",
            "param": None,
            "code": "insufficient_credits",
            "required": "0.5",
        }
    }


def depth_of(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


brackets = st.text('[]{}"\\a', max_size=8)
nested = st.recursive(
    st.none() | brackets,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(brackets, inner, max_size=3),
    max_leaves=20,
)


@settings(deadline=None)
@given(nested, st.integers(0, 6))
def test_nesting(value, depth_max):
    """A body is refused if it is deeper than the limit and only then, whatever brackets its strings hold."""
    body = json.dumps(value).encode()
    if depth_of(value) <= depth_max:
        check_nesting(body, depth_max)
        return
    with pytest.raises(BadRequest, match=f"more than {depth_max} levels"):
        check_nesting(body, depth_max)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"]" * 100_000, b'"[[[[', b"[]" * 100_000, b'{"a":[[}', b"\xff[[[]"])
def test_nesting_of_what_is_no_json(body):
    """Nothing but a refusal comes of it, and soon."""
    with suppress(BadRequest):
        check_nesting(body, 3)
    with pytest.raises(BadRequest):
        patch(body, {"a": b"1"})
