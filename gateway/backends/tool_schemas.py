"""JSON Schema of tools: the schema of an array of calls, and the types that a parameter may have. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
# Of JSON Schema: keywords that hold values, and those that hold schemas by name. A `$ref` there is no reference.
_VALUES = frozenset({"const", "default", "enum", "example", "examples"})
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_TYPES = {
    bool: frozenset({"boolean"}),
    int: frozenset({"integer", "number"}),
    float: frozenset({"number"}),
    type(None): frozenset({"null"}),
    list: frozenset({"array"}),
    dict: frozenset({"object"}),
}


def array_of_calls(schemas: Mapping[str, Json], *, most: int | None) -> Json:
    """The schema of an array of calls, at most `most`. Raises: RecursionError.

    Parameters that refer to parts of themselves move to `$defs`, so that their paths only grow in front.
    """
    calls: list[Json] = []
    definitions: Json = {}
    for i, (name, schema) in enumerate(schemas.items()):
        parameters = {key: value for key, value in schema.items() if key not in ("$schema", "$id")}
        path = f"#/$defs/tool_{i}"
        moved = _moved(parameters, path)
        if moved != parameters:
            definitions[f"tool_{i}"], parameters = moved, {"$ref": path}
        call = {"name": {"const": name}, "parameters": parameters}
        calls.append({"type": "object", "properties": call, "required": [*call], "additionalProperties": False})
    limits = {"minItems": 1} if most is None else {"minItems": 1, "maxItems": most}
    return {"type": "array", **limits, "items": {"anyOf": calls}} | ({"$defs": definitions} if definitions else {})


def _moved(schema: Any, path: str) -> Any:  # noqa: ANN401 - JSON
    """The schema with its references into itself, which now stands at `path`."""
    if isinstance(schema, list):
        return [_moved(part, path) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved: Json = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = path + value[1:]
        elif key in _BY_NAME and isinstance(value, dict):
            moved[key] = {name: _moved(part, path) for name, part in value.items()}
        else:
            moved[key] = value if key in _VALUES else _moved(value, path)
    return moved


def has_type(value: object, schema: object, root: Json) -> bool:
    """Whether a value is of a type, other than text, that its schema names."""
    return bool(_TYPES.get(type(value), frozenset()) & _types(schema, root))


def _types(schema: object, root: Json) -> set[str]:
    """The JSON types that a schema names, also through references and alternatives."""
    types: set[str] = set()
    seen: set[int] = set()
    open_parts = [schema]
    while open_parts:
        part = open_parts.pop()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        types.update(name for name in _as_list(part.get("type")) if isinstance(name, str))
        values = (*_as_list(part.get("enum")), *([part["const"]] if "const" in part else []))
        for value in values:
            types |= _TYPES.get(type(value), {"string"})
        for key in ("anyOf", "oneOf", "allOf"):
            open_parts += _as_list(part.get(key))
        open_parts.append(_target(part.get("$ref"), root))
    return types


def _as_list(value: object) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def property_of(schema: Json, name: str) -> object:
    """The schema of one parameter."""
    target = _target(schema.get("$ref"), schema) or schema
    properties = target.get("properties") if isinstance(target, dict) else None
    return properties.get(name) if isinstance(properties, dict) else None


def _target(ref: object, root: Json) -> object:
    """What a reference into `root` points to, or None."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    target: object = root
    for part in ref.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        target = target.get(key) if isinstance(target, dict) else None
    return target
