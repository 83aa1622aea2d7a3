"""Values that break things: texts as bytes, ids, JSON and TOML values, damage to files."""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

MEGABYTE = 1 << 20
NASTY = (
    "",
    " ",
    "\t \r\n",
    "\0",
    "a\0b",
    "\ud800",
    "half \udc00 a pair",
    "\x1b[31mred\x07",
    "\x7f\x85\x9f",
    "\u2028\u2029",
    "\ufeffmark",
    "\u202eright to left",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "e\u0301\u0323 " + "a" + "\u0300" * 40,
    "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea",
    "\u3000\u00a0\u200b",
    "<|begin_of_text|><|eot_id|>",
    "<s></s><unk>[INST]",
    "[1] > [2] > [3]",
    "query: document: ",
    "nan",
    "null",
    "-1e999",
    'quote " comma , tab\ttab',
    "../../etc/passwd",
    "Q0",
)
BAD_UTF8 = (b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"cut \xe2\x82")


def raw(text: str) -> bytes:
    """Its bytes; half a surrogate pair becomes what is no UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def plain_texts() -> SearchStrategy[str]:
    return st.text(string.ascii_letters + " ", min_size=1, max_size=60)


def texts() -> SearchStrategy[str]:
    """Without half surrogate pairs."""
    nasty = st.sampled_from([text for text in NASTY if raw(text).decode(errors="ignore") == text])
    return plain_texts() | nasty | st.text(max_size=30)


def raw_texts() -> SearchStrategy[bytes]:
    """Mostly UTF-8."""
    bad = st.sampled_from([*map(raw, NASTY), *BAD_UTF8]) | st.binary(max_size=8)
    return st.one_of(*[plain_texts().map(raw)] * 4, texts().map(raw), bad)


def ids() -> SearchStrategy[str]:
    """Few and mostly good, so that they meet again."""
    good = st.sampled_from([f"d{i}" for i in range(8)] + ["\u00e9", "\u4e2d", "a/b", "'", "#", "7"])
    return st.one_of(*[good] * 5, texts())


def json_values() -> SearchStrategy[Any]:
    """Whatever a JSON file may hold."""
    numbers = st.sampled_from([0, 1, -1, 2**31, 2**63, 10**40, 1e308, float("inf"), float("nan")])
    leaves = st.none() | st.booleans() | numbers | st.integers(-3, 9) | texts()
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3),
        max_leaves=6,
    )


@dataclass(frozen=True)
class Damage:
    """What happens to the bytes of a file."""

    kind: str
    where: float  # share of the file, or of the JSON's values
    value: Any = None

    def __call__(self, content: bytes) -> bytes:
        return _DAMAGES[self.kind](self, content)


def damages(*kinds: str) -> SearchStrategy[Damage]:
    """Of some kinds, all without any."""
    where = st.floats(0, 1, exclude_max=True)
    return st.one_of(
        *(
            st.builds(Damage, st.just(kind), where, _VALUES.get(kind, st.none()))
            for kind in kinds or tuple(_DAMAGES)
        )
    )


def _flip(damage: Damage, content: bytes) -> bytes:
    at = int(damage.where * len(content))
    return content[:at] + bytes(b ^ damage.value for b in content[at : at + 1]) + content[at + 1 :]


def _cut(damage: Damage, content: bytes) -> bytes:
    return content[: int(damage.where * len(content))]


def _insert(damage: Damage, content: bytes) -> bytes:
    at = int(damage.where * len(content))
    return content[:at] + damage.value + content[at:]


def _empty(_: Damage, __: bytes) -> bytes:
    return b""


def _nested(_: Damage, __: bytes) -> bytes:
    return b"[" * 10_000


def _json(change: Callable[[Any, Any, Damage], None]) -> Callable[[Damage, bytes], bytes]:
    """Change one value of a JSON file, which stays one as Python reads it."""

    def changed(damage: Damage, content: bytes) -> bytes:
        fields = json.loads(content)
        places = list(_places(fields))
        if not places:
            return content
        holder, key = places[int(damage.where * len(places))]
        change(holder, key, damage)
        return json.dumps(fields, indent=2).encode()

    return changed


def _places(value: Any) -> Any:
    """(holder, key) of every value below."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in [*keys]:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _replace(holder: Any, key: Any, damage: Damage) -> None:
    holder[key] = damage.value


def _remove(holder: Any, key: Any, _: Damage) -> None:
    del holder[key]


def _repeat(holder: Any, key: Any, damage: Damage) -> None:
    if isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[damage.value] = holder[key]


def _shift(holder: Any, key: Any, damage: Damage) -> None:
    """A value of the same type, a little different."""
    value = holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = value + damage.value
    elif isinstance(value, str):
        holder[key] = value[1:] + value[:1]
    else:
        holder[key] = type(value)()


_DAMAGES: dict[str, Callable[[Damage, bytes], bytes]] = {
    "flip": _flip,
    "cut": _cut,
    "insert": _insert,
    "empty": _empty,
    "nested": _nested,
    "json replace": _json(_replace),
    "json remove": _json(_remove),
    "json repeat": _json(_repeat),
    "json shift": _json(_shift),
}
_VALUES: dict[str, SearchStrategy[Any]] = {
    "flip": st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]),
    "insert": st.sampled_from([b"\0", b"\xff", b"\xef\xbb\xbf", b" ", b"x", b"{", b"1"]),
    "json replace": json_values(),
    "json repeat": texts(),
    "json shift": st.sampled_from([1, -1, 1000, 0.5]),
}
