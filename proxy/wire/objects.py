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
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import call
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest

NULL = Raw(b"null")


_NAMES_MAX = 200_000
"""Names in all objects of one list: each costs time to be looked at."""


class _Name(str):
    """The name of one member of an object, equal only to itself: a dict keeps members of the same name apart."""

    __slots__ = ()
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__


Fields = dict[str, Raw]
_Members = dict[_Name, Raw]

decode_fields = msgspec.json.Decoder(Fields).decode
"""An object's members; of those of the same name only the last."""

_decode_fields_list = msgspec.json.Decoder(list[Fields]).decode
_decode_members = msgspec.json.Decoder(_Members, dec_hook=call).decode
_decode_members_list = msgspec.json.Decoder(list[_Members], dec_hook=call).decode
_encode = msgspec.json.Encoder().encode


def decode_any(body: bytes) -> Any:
    """The value of the JSON `body`, which has been read as a request, in Python's own types.

    Numbers beyond them (`1e999` is JSON) come back as their digits. A request may hold them in any place that is not
    read, where nobody has looked at them before.
    """
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        return json.loads(body, parse_int=str, parse_float=str)


_SPACED = b'": '
_SPACED_BYTES = 32
"""Who writes white space after the names of members does it after the first one."""

_SHORT_BYTES = 2_000
"""Up to here it takes less time to write an object with white space than to tell members of the same name apart."""

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
    """How the fields of one kind of object may be spelled: those we read, and some that are known to be others.

    Of those that are read some are `refused`, with the reasons given there.
    """

    def __init__(
        self, read: Iterable[str], others: Iterable[str] = (), refused: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.right = frozenset(chain(read, others, refused))
        self.allowed = self.right.difference(refused)
        self.refused = refused
        self._read = {_folded(name): name for name in chain(read, refused)}

    def meant(self, name: str) -> str | None:
        """The field that we read under another spelling than `name`, if another parser may take it for that."""
        return None if name in self.right else self._read.get(_folded(name))


_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_BRACES = bytes.maketrans(b"[]", b"{}")


def count_to(most: int, byte: bytes, body: bytes) -> int:
    """How often `byte` is in `body`, where that is less than `most`; else `most`.

    `bytes.count` looks at one byte after the other; this goes at the speed of a search.
    """
    return len(body) - len(body.replace(byte, b"", most))


def check_nesting(body: bytes, depth_max: int) -> None:
    """Raises `BadRequest` when arrays and objects in the JSON `body` are nested more than `depth_max` deep.

    Linear, and at the speed of a search. What is no JSON passes: whoever decodes it will say so.
    """
    if count_to(depth_max + 1, b"{", body) + count_to(depth_max + 1, b"[", body) <= depth_max:
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
        fields = decode_fields(body)
        members = () if fields.keys().isdisjoint(changes) else _members(body)
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    position = body.index(b"{") + 1
    head = body[:position]
    inserted = [
        _encode(field) + b":" + value for field, value in changes.items() if value is not None and field not in fields
    ]
    kept: list[bytes] = []
    for name, raw in members:
        match = _MEMBER_START.match(body, position)
        assert match is not None, "what has been decoded is well-formed"  # noqa: S101 - msgspec read it just now
        value = changes.get(name, raw)
        if value is not None:
            start = body[position : match.end()]
            kept.append((start if kept else _FIRST_COMMA.sub(rb"\1", start)) + value)
        position = match.end() + len(raw)
    is_followed = bool(kept) or (bool(fields) and not members)
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
    return [(str(name), value) for name, value in _decode_members(raw).items()]


def unique_fields(raw: bytes | Raw, param: str | None = None) -> Fields:
    """The fields of an object. Raises `BadRequest` when a name is there twice."""
    said = bytes(raw)
    fields = _proved(decode_fields, said)
    return _fields(_decode_members(said), param) if fields is None else fields


def _unique_objects(raw: Raw, param: str) -> list[Fields]:
    """The objects in a list, as the one above."""
    said = bytes(raw)
    objects = _proved(_decode_fields_list, said)
    if objects is not None:
        return objects
    decoded = _decode_members_list(said)
    _check_names(sum(map(len, decoded)), param)
    return [_fields(members, param) for members in decoded]


def _proved(decode: Callable[[bytes], _Shape], said: bytes) -> _Shape | None:
    """What `said` is decoded as, if it is just that: each member once, as the encoders of most languages write it.

    That is without white space, or, as Python's does, with a space after each comma and colon. None for everything
    else, and where it takes less time to look at each member.
    """
    is_short = len(said) <= _SHORT_BYTES
    if not is_short and said.find(_SPACED, 0, _SPACED_BYTES) >= 0:
        return None
    decoded = decode(said)
    written = _encode(decoded)
    if written == said or (is_short and msgspec.json.format(written, indent=0) == said):
        return decoded
    return None


def _fields(members: _Members, param: str | None) -> Fields:
    fields = {str(name): value for name, value in members.items()}
    if len(fields) != len(members):
        _refuse_duplicates(members, param)
    return fields


def _refuse_duplicates(members: _Members, param: str | None) -> None:
    seen = set()
    for name in map(str, members):
        if name in seen:
            where = _place(name, param)
            raise BadRequest(f"{where} is there more than once.", param=param or name, code="duplicate_field")
        seen.add(name)


def _check_names(names: int, param: str) -> None:
    if names > _NAMES_MAX:
        raise BadRequest(f"There are more than {_NAMES_MAX} fields in '{param}'.", param=param, code="too_many_fields")


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
    objects = [fields for raw in lists for fields in _unique_objects(raw, param)]
    names = list(chain.from_iterable(objects))
    _check_names(len(names), param)
    check_spelling(names, spelling, param)
    return objects


def _place(name: str, param: str | None) -> str:
    return f"'{name}'" if param is None else f"'{name}' in '{param}'"
