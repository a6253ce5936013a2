"""The OpenAPI document is valid, complete and true of the structs that check requests and of the routes."""

from __future__ import annotations

import re
from typing import Any, get_type_hints

import jsonschema_rs
import msgspec
import pytest
import schemathesis
from fastapi.routing import APIRoute

from gateway.api.admin import routes as admin_routes
from gateway.api.openapi import document
from gateway.api.routes import HOT_ROUTES
from gateway.api.schemas import NAMES, REQUESTS
from gateway.app import Gateway
from gateway.ask.request import GATEWAY_OWNED, parse_chat, parse_completion, parse_embedding
from gateway.config.schema import Config
from gateway.errors import GatewayError, InvalidRequest
from tests.gateway.live import (
    ASK,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    INSTANT,
    MODEL,
    STREAM,
    Json,
    Live,
    ask,
)
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import json_reply

PARSERS = {
    "ChatCompletionRequest": parse_chat,
    "CompletionRequest": parse_completion,
    "EmbeddingRequest": parse_embedding,
}
LEAST: dict[str, Json] = {
    "ChatCompletionRequest": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "CompletionRequest": {"model": "m", "prompt": "hi"},
    "EmbeddingRequest": {"model": "m", "input": "hi"},
}
VALUES: list[Any] = [None, True, False, -2, -1, 0, 1, 3, 21, 101, 2**31, 2**63, 0.5, -0.5, 2.5, 1001.0, "", "x", "auto"]
VALUES += ["none", "high", "priority", [], ["a"], ["a"] * 17, [1], [-1], [[1]], [{}], {}, {"a": 1}, {"1": 101}]
VALUES += [{"type": "enabled"}, {"effort": "low"}, {"include_usage": True}, {"mode": "instant"}]
VALUES += [{"summary": "concise"}, {"summary": "long"}, {"min_thinking_tokens": 0}, {"min_thinking_tokens": -1}]
VALUES += [
    {"envelope": {"usd": 0}},
    {"x": 1},
    [{"type": "function", "function": {"name": "f"}}],
    [{"role": "user", "content": None}],
]


@pytest.fixture(scope="module")
def described() -> Json:
    """The document."""
    return document()


def schema_of(described: Json, name: str) -> jsonschema_rs.Draft202012Validator:
    """A validator of one of its schemas."""
    root = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    return jsonschema_rs.Draft202012Validator(root)


def declared(struct: type[msgspec.Struct]) -> set[str]:
    """The names of a struct's fields as they stand in JSON."""
    return {field.encode_name for field in msgspec.structs.fields(struct)}


def test_document_is_valid(described: Json) -> None:
    """It validates against the specification, and every schema in it is one."""
    schemathesis.openapi.from_dict(described).validate()
    for schema in described["components"]["schemas"].values():
        assert jsonschema_rs.meta.is_valid(schema)


def test_every_reference_leads_somewhere(described: Json) -> None:
    """No reference dangles, and no schema, header or response is there for nothing."""
    text = msgspec.json.encode(described).decode()
    used = set(re.findall(r'"\$ref":"#/components/(\w+)/([\w-]+)"', text))
    kinds = ("schemas", "headers", "responses")
    present = {(kind, name) for kind in kinds for name in described["components"][kind]}
    assert used == present


def test_every_route_is_described_and_nothing_else(described: Json) -> None:
    """The paths are the hot routes, FastAPI's that are not hidden, and the admin API's, with their methods."""
    gateway = Gateway(Config.model_validate({"models": {"m": {"backends": [{"id": "a", "url": "http://x"}]}}}))
    gateway.lines.close()
    served = {path: {"post"} for path in HOT_ROUTES}
    for route in [*gateway.routes, *admin_routes()]:
        if isinstance(route, APIRoute) and route.include_in_schema:
            methods = served.setdefault(route.path.replace(":path", ""), set())
            methods |= {method.lower() for method in route.methods or ()}
    assert {path: set(methods) for path, methods in described["paths"].items()} == served


async def test_document_is_served(gateway: Live) -> None:
    """/openapi.json gives the document; without configured keys it asks for none."""
    served = (await ask(gateway, b"", "/openapi.json", method="GET")).json
    assert served == document(has_keys=False)
    assert served["security"] == []
    assert document()["security"] == [{"bearer": []}]


@pytest.mark.parametrize("name", REQUESTS)
def test_request_has_the_fields_of_its_struct(described: Json, name: str) -> None:
    """Properties and required fields are the struct's, plus the fields that nobody may send."""
    struct = REQUESTS[name]
    schema = described["components"]["schemas"][name]
    forbidden = {field for field, value in schema["properties"].items() if value is False}
    assert forbidden == GATEWAY_OWNED
    assert set(schema["properties"]) - forbidden == declared(struct)
    required = {field.name for field in msgspec.structs.fields(struct) if field.required}
    assert set(schema["required"]) == required


def nested(struct: type[msgspec.Struct], seen: dict[str, type[msgspec.Struct]]) -> dict[str, type[msgspec.Struct]]:
    """Every struct reachable from one, by name."""
    if struct.__name__ not in seen:
        seen[struct.__name__] = struct
        for hint in get_type_hints(struct).values():
            for found in _structs_in(hint):
                nested(found, seen)
    return seen


def _structs_in(hint: Any) -> list[type[msgspec.Struct]]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [found for part in getattr(hint, "__args__", ()) for found in _structs_in(part)]


def test_nested_objects_have_the_fields_of_their_structs(described: Json) -> None:
    """The same for every object inside a request; one that forbids unknown fields says so."""
    schemas = described["components"]["schemas"]
    found: dict[str, type[msgspec.Struct]] = {}
    for struct in REQUESTS.values():
        nested(struct, found)
    assert len(found) > 10
    for name, struct in found.items():
        if struct in REQUESTS.values():
            continue
        schema = schemas[NAMES.get(name, name)]
        assert set(schema["properties"]) == declared(struct)
        forbids = struct.__struct_config__.forbid_unknown_fields
        assert (schema.get("additionalProperties") is False) == forbids


@pytest.mark.parametrize("name", REQUESTS)
def test_document_and_parser_agree_on_every_field(described: Json, name: str) -> None:
    """For each field and a catalogue of values: the schema takes a value exactly if the parser does."""
    schema, parse = schema_of(described, name), PARSERS[name]
    differing = []
    for field in [*described["components"]["schemas"][name]["properties"], "unknown"]:
        for value in VALUES:
            body = {**LEAST[name], field: value}
            try:
                parse(msgspec.json.encode(body))
                is_taken = True
            except InvalidRequest:
                is_taken = False
            # A number like 1001.0 is an integer to JSON Schema; to us it is a float, and refused.
            if schema.is_valid(body) != is_taken and not (isinstance(value, float) and value.is_integer()):
                differing.append((field, value, is_taken))
    assert differing == []


def examples_of(described: Json) -> list[tuple[str, str, Json]]:
    """Every example with the schema it stands under."""
    found: list[tuple[str, str, Json]] = []

    def visit(node: Any, where: str) -> None:
        if isinstance(node, dict):
            if "examples" in node and "schema" in node and "$ref" in node["schema"]:
                name = node["schema"]["$ref"].rpartition("/")[2]
                found.extend((where, name, example["value"]) for example in node["examples"].values())
            for key, value in node.items():
                visit(value, f"{where}/{key}")

    visit(described["paths"], "")
    return found


def test_examples_are_valid(described: Json) -> None:
    """Every example fits its schema, and every request example is one that the gateway would parse."""
    examples = examples_of(described)
    assert len(examples) == 15
    for where, name, example in examples:
        problems = [error.message for error in schema_of(described, name).iter_errors(example)]
        assert problems == [], where
        if name in PARSERS:
            PARSERS[name](msgspec.json.encode(example))


ANSWERS: list[tuple[str, str, Json]] = [
    (CHAT, "ChatCompletion", ASK),
    (CHAT, "ChatCompletion", INSTANT),
    (CHAT, "ChatCompletion", {**ASK, "n": 2, "logprobs": True, "return_token_ids": True, "stop": "42"}),
    (CHAT, "ChatCompletion", {**ASK, "thinkgate": {"envelope": {"tokens": 20}, "reasoning_field": "both"}}),
    (CHAT, "ChatCompletionChunk", {**STREAM, "stream_options": {"include_usage": True}}),
    (CHAT, "ChatCompletionChunk", {**STREAM, "n": 2, "logprobs": True, "return_token_ids": True}),
    (CHAT, "ChatCompletionChunk", {**INSTANT, "stream": True}),
    (COMPLETIONS, "Completion", {"model": MODEL, "prompt": ["a b", "c"], "return_token_ids": True}),
    (COMPLETIONS, "CompletionChunk", {"model": MODEL, "prompt": "a", "stream": True, "n": 2}),
    (EMBEDDINGS, "EmbeddingList", {"model": MODEL, "input": "a"}),
]


@pytest.mark.parametrize(("path", "name", "body"), ANSWERS)
async def test_answers_are_as_described(
    gateway: Live, scripted: ScriptedBackend, described: Json, path: str, name: str, body: Json
) -> None:
    """Every whole answer, every chunk of a stream and every header of ours is what the document says."""
    vectors = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
    scripted.routes[EMBEDDINGS] = json_reply({"object": "list", "data": vectors, "usage": {"prompt_tokens": 1}})
    answer = await ask(gateway, body, path)
    assert answer.status == 200
    for said in answer.chunks() if name.endswith("Chunk") else [answer.json]:
        assert [error.message for error in schema_of(described, name).iter_errors(said)] == []
    ours = {header for header in answer.headers if header.startswith("x-")} - {"x-accel-buffering"}
    assert ours <= set(described["paths"][path]["post"]["responses"]["200"]["headers"])


def test_every_error_status_is_described(described: Json) -> None:
    """Every error's status stands on the hot routes, but 405, for other methods, and 409, of the admin API only."""

    def classes(root: type[GatewayError]) -> list[type[GatewayError]]:
        return [root, *(found for child in root.__subclasses__() for found in classes(child))]

    statuses = {str(error.status) for error in classes(GatewayError)} - {"405", "409"}
    for path in HOT_ROUTES:
        assert statuses <= set(described["paths"][path]["post"]["responses"])
        assert "4XX" in described["paths"][path]["post"]["responses"]
