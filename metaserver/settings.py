"""What is wrong with the keys of a configuration file, in words for the operator who wrote it."""

import difflib
import re
from typing import Any

import msgspec

_AT = re.compile(r"^(?P<text>.*) - at `\$\.(?P<key>[^`]+)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<key>\w+)`$")


def unknown_key(values: dict[str, Any], kind: type[msgspec.Struct], table: str = "") -> str:
    """The first key that this kind of configuration lacks, and what may have been meant; "" if all are known."""
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            meant = f" (did you mean {table + close[0]!r}?)" if close else f" (there are: {', '.join(sorted(known))})"
            return f"unknown key {table + key!r}{meant}"
        inner = known[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            problem = unknown_key(value, inner, f"{table}{key}.")
            if problem:
                return problem
    return ""


def invalid_value(error: msgspec.ValidationError) -> str:
    """Which key has a wrong value, or is missing."""
    text = str(error)
    missing = _MISSING.match(text)
    if missing:
        return f"the key {missing['key']!r} is missing"
    found = _AT.match(text)
    if found is None:
        return text
    what = found["text"].replace("`", "")
    return f"{found['key']!r}: {what[0].lower()}{what[1:]}"
