"""A decoder's complaint, as an error that names the field and what would be right.

Owns: reading msgspec's messages, and finding the values that a field may have; the same for pydantic's errors. Only
ever runs on the way to a 400.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from msgspec import inspect

from gateway.errors import InvalidRequest

MAX_ECHO_CHARACTERS = 120


def invalid_field(text: str, type_: object) -> InvalidRequest:
    """The error for a complaint.

    Args:
        text: msgspec's message, which ends in the path of the field.
        type_: what was being decoded.
    """
    what, has_path, path = text.rpartition(" - at `$")  # the last: what comes before may quote the client
    if not has_path:
        what, path = text, ""
    param = path.rstrip("`").lstrip(".").replace("[...]", "")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL)
    if missing:
        param = f"{param}.{missing[1]}".lstrip(".")
        return InvalidRequest(f"`{param}` is required.", param=param, code="missing_required_parameter")
    if unknown:
        param = _short(f"{param}.{unknown[1]}".lstrip("."))
        return InvalidRequest(f"`{param}` is not a known field.", param=param, code="unknown_parameter")
    enum = re.fullmatch(r"Invalid enum value (.*)", what, re.DOTALL)
    if enum:
        allowed = ", ".join(map(str, _allowed(type_, path)))
        said = f"{_short(enum[1])} is not one of {allowed}"
    else:
        said = what[:1].lower() + _short(what[1:])
    code = "invalid_type" if re.match(r"Expected `[^`]*`, got", what) else "invalid_value"
    return InvalidRequest(f"`{param}`: {said}." if param else f"The body: {said}.", param=param or None, code=code)


def invalid_model(errors: Sequence[Mapping[str, Any]], *, skip: int = 0) -> InvalidRequest:
    """The error for the first of pydantic's complaints.

    Args:
        errors: as `ValidationError.errors()` has them; at least one.
        skip: so many leading parts of each location are no fields.
    """
    error = errors[0]
    steps = [step for step in error["loc"][skip:] if step != "[key]"]
    param = _short("".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip("."))
    kind = error["type"]
    if kind == "missing":
        what = f"`{param}`" if param else "A body"
        return InvalidRequest(f"{what} is required.", param=param or None, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return InvalidRequest(f"`{param}` is not a known field.", param=param, code="unknown_parameter")
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    where = f"`{param}`" if param else "The body"
    return InvalidRequest(f"{where}: {_short(said)}.", param=param or None, code=code)


def _short(text: str) -> str:
    """What the client sent, but not all of a megabyte of it."""
    return text if len(text) <= MAX_ECHO_CHARACTERS else f"{text[:MAX_ECHO_CHARACTERS]}…"


_type_info = cache(inspect.type_info)


def _allowed(type_: object, path: str) -> list[object]:
    """The values that the field at `path` may have, in alphabetical order."""
    nodes = [_type_info(type_)]
    for step in re.findall(r"\w+|\[[^\]]*\]", path):
        nodes = [inner for node in nodes for inner in _inside(node, step)]
    return [
        value
        for node in nodes
        for kind in _alternatives(node)
        if isinstance(kind, inspect.LiteralType)
        for value in kind.values
    ]


def _inside(node: inspect.Type, step: str) -> Iterator[inspect.Type]:
    for kind in _alternatives(node):
        if isinstance(kind, inspect.StructType):
            yield from (field.type for field in kind.fields if field.encode_name == step)
        elif isinstance(kind, inspect.ListType):
            yield kind.item_type


def _alternatives(node: inspect.Type) -> tuple[inspect.Type, ...]:
    return node.types if isinstance(node, inspect.UnionType) else (node,)
