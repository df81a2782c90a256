"""JSON as other people write it: strategies of texts that are valid JSON and that no encoder of ours would make."""

from hypothesis import strategies as st

_STRING_PIECES = st.sampled_from(
    [
        "a",
        " ",
        "é",
        "☂",
        "\u2028",
        "\u2029",
        "\x7f",
        "\x85",
        "\U0001f600",
        "\\u00e9",
        "\\ud83d\\ude00",
        "\\ud800",
        "\\uDFFF\\uD800",
        "\\u0000",
        "\\n",
        "\\r\\n\\r\\n",
        '\\"',
        '\\"usage\\": {',
        "\\\\",
        "\\/",
        "data: [DONE]",
        "/",
        "{",
        "]",
        ":",
        ",",
    ]
)
_NUMBERS = st.sampled_from(
    ["0", "-0", "-0.0", "1e400", "-1E+400", "1e-400", "123456789012345678901234567890", "0.1000", "1E5", "9" * 400]
)


def whole(text: str) -> str:
    """`text` without halves of characters, which are valid JSON and no valid Unicode."""
    return text.replace("\\ud800", "\\u0001").replace("\\uDFFF\\uD800", "\\u2028")


spaces = st.sampled_from(["", "", "", " ", "\t", "  "])
strings = st.lists(_STRING_PIECES, max_size=6).map(lambda pieces: '"' + "".join(pieces) + '"')
_names = st.lists(_STRING_PIECES, max_size=3).map(lambda pieces: '"x_' + "".join(pieces) + '"')


@st.composite
def objects(draw, values, *, fixed=()):
    """The text of an object with the members in `fixed`, pairs of texts, among others in any order."""
    others = draw(st.lists(st.tuples(_names, values), max_size=3, unique_by=lambda member: member[0]))
    members = draw(st.permutations([*fixed, *others]))
    texts = [f"{draw(spaces)}{name}{draw(spaces)}:{draw(spaces)}{value}{draw(spaces)}" for name, value in members]
    return "{" + (",".join(texts) or draw(spaces)) + "}"


@st.composite
def arrays(draw, values):
    """The text of an array."""
    texts = [f"{draw(spaces)}{value}{draw(spaces)}" for value in draw(st.lists(values, max_size=3))]
    return "[" + ",".join(texts) + "]"


values = st.recursive(
    st.sampled_from(["null", "true", "false"]) | _NUMBERS | strings,
    lambda inner: arrays(inner) | objects(inner),
    max_leaves=5,
)
"""Any value on one line."""
