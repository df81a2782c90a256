"""The bytes of JSON objects: read strictly, patched without touching anything else.

Another parser may read the same bytes otherwise. Where JSON leaves room (RFC 8259, section 4: the behaviour with
names that are not unique is unpredictable), a request that we read as small could be large to the provider:

* of `{"max_tokens": 1, "max_tokens": 100000}` most parsers take the last value, some the first;
* Go's `encoding/json` and .NET ignore case, Go by Unicode's simple folding, in which `ſ` is an s and `K` a k;
* parsers of protobuf's JSON take `maxTokens` for `max_tokens`;
* any character of a name can be written as an escape.

So an object that we read must not name a field twice, nor hold a name that becomes the name of a field we read
once letter case, `_` and `-` are ignored. Names are compared as they are after unescaping.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest

NULL = Raw(b"null")


_NAMES_MAX = 200_000
"""Names in all objects of one list: each costs time to be looked at."""


class _Name:
    """The name of one member of an object, equal only to itself: a dict keeps members of the same name apart."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


Fields = dict[str, Raw]
_Members = dict[_Name, Raw]


def _named(_type: type, text: str) -> _Name:
    return _Name(text)


decode_fields = msgspec.json.Decoder(Fields).decode
"""An object's members; of those of the same name only the last."""

_decode_fields_list = msgspec.json.Decoder(list[Fields]).decode
_decode_members = msgspec.json.Decoder(_Members, dec_hook=_named).decode
_decode_members_list = msgspec.json.Decoder(list[_Members], dec_hook=_named).decode


def decode_any(body: bytes) -> Any:
    """The value of the JSON `body`, which has been read as a request, in Python's own types.

    Numbers beyond them (`1e999` is JSON) come back as their digits. A request may hold them in any place that is not
    read, where nobody has looked at them before.
    """
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        return json.loads(body, parse_int=str, parse_float=str)


_MEMBER_START = re.compile(rb'[\s{,]*"[^"\\]*(?:\\.[^"\\]*)*"\s*:\s*', re.DOTALL)
"""What stands between the values of an object that is known to be well-formed: punctuation and the next name."""

_FIRST_COMMA = re.compile(rb"\A(\s*),")

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what was expected."""

_HALF = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
"""The escape of half a character."""

_NO_NUMBER = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")|-?(?:NaN|Infinity)', re.DOTALL)
"""What Python writes for numbers that JSON does not have, such as the log probability of what cannot be; or a string,
which may hold the same words.
"""

_Shape = TypeVar("_Shape")


def reader(shape: type[_Shape]) -> Callable[[bytes], _Shape]:
    """A decoder of `shape`, for answers, that takes halves of characters for U+FFFD, and what is no number for null.

    Providers send the former where a token ends inside of a character, and msgspec refuses all of what holds one.
    """
    decode = msgspec.json.Decoder(shape).decode

    def read(data: bytes) -> _Shape:
        try:
            return decode(data)
        except UNREADABLE:
            mended = _NO_NUMBER.sub(lambda found: found[1] or b"null", _HALF.sub(rb"\\ufffd", data))
            if mended == data:
                raise
            return decode(mended)

    return read


_WHERE = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>\w+)`")


def _folded(name: str) -> str:
    # Upper case first: it also unites what casefold keeps apart, such as the dotless i.
    return name.upper().casefold().replace("_", "").replace("-", "")


class Spelling:
    """How the fields of one kind of object may be spelled: those we read, and some that are known to be others."""

    def __init__(self, read: Collection[str], others: Collection[str] = ()) -> None:
        self.right = frozenset(read).union(others)
        self._read = {_folded(name): name for name in read}

    def meant(self, name: str) -> str | None:
        """The field that we read under another spelling than `name`, if another parser may take it for that."""
        return None if name in self.right else self._read.get(_folded(name))


_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_BRACES = bytes.maketrans(b"[]", b"{}")


def check_nesting(body: bytes, depth_max: int) -> None:
    """Raises `BadRequest` when arrays and objects in the JSON `body` are nested more than `depth_max` deep.

    Linear, and at the speed of a search. What is no JSON passes: whoever decodes it will say so.
    """
    if body.count(b"{") + body.count(b"[") <= depth_max:
        return
    # Without the escaped ones, every quote begins or ends a string, and every second piece is outside of strings.
    pieces = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    brackets = b"".join(pieces[::2]).translate(_BRACES, _NOT_BRACKETS)
    for _ in range(depth_max):
        inner = brackets.replace(b"{}", b"")
        if len(inner) == len(brackets):
            return
        brackets = inner
    if b"{}" in brackets:
        raise BadRequest(f"The body is nested more than {depth_max} levels deep.", code="invalid_json")


def patch(body: bytes, changes: Mapping[str, bytes | None]) -> bytes:
    """`body`, a JSON object, with its top-level fields set to the raw JSON values in `changes`, or left out for None.

    The value of a field that is there is replaced (everywhere, should it be there twice); other fields are put
    right after the opening brace. All other bytes stay as they are, but for the commas around what is left out.
    Raises `BadRequest` when `body` is no object.
    """
    try:
        members = _members(body)
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    position = body.index(b"{") + 1
    head = body[:position]
    names = {name for name, _ in members}
    inserted = [
        msgspec.json.encode(field) + b":" + value
        for field, value in changes.items()
        if value is not None and field not in names
    ]
    kept: list[bytes] = []
    for name, raw in members if not names.isdisjoint(changes) else ():
        match = _MEMBER_START.match(body, position)
        assert match is not None, "what has been decoded is well-formed"  # noqa: S101 - msgspec read it just now
        value = changes.get(name, raw)
        if value is not None:
            start = body[position : match.end()]
            kept.append((start if kept else _FIRST_COMMA.sub(rb"\1", start)) + value)
        position = match.end() + len(raw)
    is_followed = bool(kept) or (bool(members) and names.isdisjoint(changes))
    between = b"," if inserted and is_followed else b""
    return b"".join([head, b",".join(inserted), between, *kept, body[position:]])


def error_body(message: str, type_: str, param: str | None, code: str | None, **extra: Any) -> bytes:
    """An error as OpenAI's API words it; `extra` are further fields of the error object."""
    return msgspec.json.encode({"error": {"message": message, "type": type_, "param": param, "code": code, **extra}})


class _ErrorCode(msgspec.Struct):
    code: object = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorCode


_decode_error = msgspec.json.Decoder(_ErrorBody).decode


def error_code(body: bytes) -> object:
    """The `code` of an error in OpenAI's shape; None when there is none."""
    try:
        return _decode_error(body).error.code
    except UNREADABLE:
        return None


def bad_request(exc: Exception) -> BadRequest:
    """What msgspec found, in OpenAI's words."""
    if isinstance(exc, UnicodeDecodeError):
        return BadRequest("The body is not valid UTF-8.", code="invalid_json")
    if isinstance(exc, RecursionError):
        return BadRequest("The body is nested too deeply.", code="invalid_json")
    if not isinstance(exc, msgspec.ValidationError):
        return BadRequest(f"The body is not valid JSON: {exc}.", code="invalid_json")
    match = _WHERE.fullmatch(str(exc))
    what, path = (match["what"], match["path"] or "") if match is not None else (str(exc), "")
    if missing := _MISSING.fullmatch(what):
        place = f"{path}.{missing['field']}" if path else missing["field"]
        return BadRequest(
            f"Missing required parameter: '{place}'.", param=_top(place), code="missing_required_parameter"
        )
    kind = "type" if ", got " in what else "value"
    whose = f"'{path}'" if path else "the body"
    return BadRequest(f"Invalid {kind} for {whose}: {what}.", param=_top(path), code=f"invalid_{kind}")


def _top(path: str) -> str | None:
    """The top-level field of a path such as `messages[0].role`."""
    return re.split(r"[.\[]", path, maxsplit=1)[0] or None


def _members(raw: bytes | Raw) -> list[tuple[str, Raw]]:
    """The members of an object in their order, with those that are there twice."""
    fields = decode_fields(raw)
    if len(raw) == _compact_bytes(1, fields, fields.values()):
        return list(fields.items())
    return [(name.text, value) for name, value in _decode_members(raw).items()]


def unique_fields(raw: bytes | Raw, param: str | None = None) -> Fields:
    """The fields of an object. Raises `BadRequest` when a name is there twice."""
    fields = decode_fields(raw)
    if len(raw) != _compact_bytes(1, fields, fields.values()):
        _refuse_duplicates(_decode_members(raw), param)
    return fields


def _compact_bytes(objects: int, names: Collection[str], values: Iterable[Raw]) -> int:
    """The length of so many objects with these members, written without white space.

    Each object has two braces, each member two quotes and a colon, and all but the first of an object a comma. An
    object of just this length has no room for anything else: no second member of the same name, of which a dict
    keeps only the last, and no escape in a name. So that needs no further look. (Names that are not ASCII and
    objects without members are longer than this, and are looked at.)
    """
    return objects + 4 * len(names) + sum(map(len, names)) + sum(map(len, values))


def _refuse_duplicates(members: _Members, param: str | None) -> None:
    seen = set()
    for name in members:
        if name.text in seen:
            where = _place(name.text, param)
            raise BadRequest(f"{where} is there more than once.", param=param or name.text, code="duplicate_field")
        seen.add(name.text)


def check_spelling(names: Iterable[str], spelling: Spelling, param: str | None = None) -> None:
    """Raises `BadRequest` when a name is another spelling of one that we read."""
    if spelling.right.issuperset(names):
        return
    for name in names:
        meant = spelling.meant(name)
        if meant is not None:
            raise BadRequest(
                f"{_place(name, param)} must be spelled '{meant}', lest a provider read it otherwise.",
                param=param or meant,
                code="ambiguous_field",
            )


def checked_objects(lists: Sequence[Raw], spelling: Spelling, param: str) -> list[Fields]:
    """The objects in all these `lists`. Raises `BadRequest` for their names as the two above."""
    objects = [fields for raw in lists for fields in _decode_fields_list(raw)]
    names = list(chain.from_iterable(objects))
    if len(names) > _NAMES_MAX:
        raise BadRequest(f"There are more than {_NAMES_MAX} fields in '{param}'.", param=param, code="too_many_fields")
    # A list of k objects has two brackets and k - 1 commas around them.
    compact_bytes = (
        len(lists) + len(objects) + _compact_bytes(len(objects), names, chain.from_iterable(map(dict.values, objects)))
    )
    if sum(map(len, lists)) != compact_bytes:
        for raw in lists:
            for members in _decode_members_list(raw):
                _refuse_duplicates(members, param)
    check_spelling(names, spelling, param)
    return objects


def _place(name: str, param: str | None) -> str:
    return f"'{name}'" if param is None else f"'{name}' in '{param}'"
