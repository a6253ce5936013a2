"""The schemas of the OpenAPI document: what may be sent, and what comes back.

Owns: requests, derived from the structs that check them, so that the two cannot drift; the `thinkgate` and
`usage` objects, derived from the structs that are encoded; and the rest of the responses, by hand.
"""

from __future__ import annotations

import re
from typing import Any, get_args

import msgspec

from gateway.ask.request import GATEWAY_OWNED, MAX_DEPTH, ChatFields, CompletionFields, EmbeddingFields
from gateway.edge.extension import EmbeddingReport, Feedback, Report, RouteReport, UsageReport
from gateway.enforcement import How

Json = dict[str, Any]
REF = "#/components/schemas/"
REQUESTS: dict[str, type[msgspec.Struct]] = {
    "ChatCompletionRequest": ChatFields,
    "CompletionRequest": CompletionFields,
    "EmbeddingRequest": EmbeddingFields,
}
NAMES = {struct.__name__: name for name, struct in REQUESTS.items()} | {
    "Extension": "ThinkgateRequest",
    "EnvelopeFields": "Envelope",
    "Report": "Thinkgate",
    "EmbeddingReport": "EmbeddingThinkgate",
    "UsageReport": "Usage",
    "RouteReport": "Route",
    "DecisionReport": "TextDecision",
    "ArmReport": "WeighedMode",
    "CascadeReport": "Cascade",
    "TargetReport": "Target",
    "TargetArmReport": "WeighedModel",
    "PlanReport": "Plan",
    "StepReport": "PlanStep",
}
REQUEST_RULES = f"""
Fields that are not listed pass to the backend as they are. Fields that contradict each other are a 400 that
names both, and so is a budget above what fits. The body is one JSON object of UTF-8 text, nested at most
{MAX_DEPTH} deep, of at most `server.max_body_bytes`.
"""
RESERVED = """
Values of `mode` other than auto, instant and reasoning, and `search` other than off, are reserved: a 400 with the code
`not_built`.
"""
FINISH_REASONS = ["stop", "length", "tool_calls", "content_filter", "function_call"]


def schemas() -> Json:
    """Every schema by name."""
    _, derived = msgspec.json.schema_components(
        [*REQUESTS.values(), Report, EmbeddingReport, UsageReport, RouteReport, Feedback], ref_template=REF + "{name}"
    )
    named = {NAMES.get(name, name): _renamed(schema) for name, schema in derived.items()}
    for name in REQUESTS:
        _forbid_gateway_fields(named[name])
    _refine(named)
    return named | _completions() | _others()


def _renamed(schema: Json) -> Json:
    """The schema with public names, and only the first paragraph of each docstring."""
    renamed: Json = {}
    for key, value in schema.items():
        if isinstance(value, list):
            renamed[key] = [_renamed(item) if isinstance(item, dict) else item for item in value]
        else:
            renamed[key] = _renamed(value) if isinstance(value, dict) else value
    if isinstance(schema.get("$ref"), str):
        name = schema["$ref"].removeprefix(REF)
        renamed["$ref"] = REF + NAMES.get(name, name)
    if isinstance(schema.get("title"), str):
        renamed["title"] = NAMES.get(schema["title"], schema["title"])
    if isinstance(schema.get("description"), str):
        renamed["description"] = re.split(r"\n\s*\n", schema["description"])[0]
    if schema.get("default", "") is None:
        del renamed["default"]
    return renamed


def _forbid_gateway_fields(schema: Json) -> None:
    """Fields that belong to the gateway may not be sent, whatever their value."""
    schema["description"] += "\n" + REQUEST_RULES
    schema["properties"] |= dict.fromkeys(sorted(GATEWAY_OWNED), False)


def _refine(named: Json) -> None:
    """What the types of the structs do not say."""
    named["ThinkgateRequest"]["description"] += "\n" + RESERVED
    thinkgate = named["Thinkgate"]["properties"]
    thinkgate["mode"] = {"enum": ["instant", "reasoning"]}
    thinkgate["ended_by"] = {
        "enum": ["cap", "hold", "timeout", "envelope.tokens", "envelope.usd", "envelope.seconds"],
        "description": "The bound that ended the answer early.",
    }
    for report in (thinkgate, named["EmbeddingThinkgate"]["properties"]):
        report["counted"] = {
            "enum": ["estimated"],
            "description": "The backend gave neither token ids nor its own count.",
        }
        report["cost_usd"]["minimum"] = 0
    named["Plan"]["properties"]["steps"].pop("default")  # left out where empty, as these
    for name in ("arms", "features"):
        named["TextDecision"]["properties"][name].pop("default")
    named["Route"]["properties"]["mode"] = {"enum": ["instant", "reasoning"]}
    named["Route"]["properties"]["object"] = {"const": "thinkgate.route"}
    cap = named["CapReport"]["properties"]
    cap["source"] = {"enum": ["request", "effort", "default", "mode"]}
    cap["enforcement"] = {"enum": list(get_args(How))}
    for name in ("TokenCounts", "Spent", "Usage", "PromptTokens", "CompletionTokens"):
        for field in named[name]["properties"].values():
            if field.get("type") == "integer":
                field["minimum"] = 0


def ref(name: str) -> Json:
    """A reference to a schema."""
    return {"$ref": REF + name}


def event(name: str) -> Json:
    """One server-sent event: a chunk, an error, or the end."""
    content = {"contentMediaType": "application/json", "contentSchema": {"anyOf": [ref(name), ref("Error")]}}
    return {
        "description": "Each server-sent event of the stream.",
        "type": "object",
        "properties": {"data": {"type": "string", "anyOf": [content, {"const": "[DONE]"}]}},
        "required": ["data"],
    }


def _object(description: str, properties: Json, *, optional: tuple[str, ...] = ()) -> Json:
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }


def _list_of(items: Json, **more: object) -> Json:
    return {"type": "array", "items": items, **more}


TEXT = {"type": "string"}
TEXT_OR_NULL = {"type": ["string", "null"]}
OBJECT_OR_NULL = {"type": ["object", "null"]}
INDEX = {"type": "integer", "minimum": 0}
EPOCH = {"type": "integer", "minimum": 0, "description": "Seconds since 1970."}
FINISH = {"enum": FINISH_REASONS, "description": "A cap that was met and wrapped up well ends with `stop`."}
FINISH_OR_NULL = {"enum": [*FINISH_REASONS, None]}
REASONING = {
    "reasoning": {
        **TEXT_OR_NULL,
        "description": "The thinking text, or its summary if `reasoning.summary` asked for one, under the name the"
        " backend uses.",
    },
    "reasoning_content": {**TEXT_OR_NULL, "description": "The same under its older name."},
}
IDS = {"type": ["array", "null"], "items": INDEX, "description": "If `return_token_ids` asked for them."}


def _completions() -> Json:
    """What the two completion routes answer, whole and streamed."""
    tool_calls = _list_of({"type": "object"}, description="As OpenAI defines them.")
    message = _object(
        "The answer, and the thinking before it.",
        {"role": {"const": "assistant"}, "content": TEXT_OR_NULL, **REASONING, "tool_calls": tool_calls},
        optional=("reasoning", "reasoning_content", "tool_calls"),
    )
    rest = {"logprobs": OBJECT_OR_NULL, "stop_reason": {}, "token_ids": IDS}
    head = {"id": TEXT, "created": EPOCH, "model": {**TEXT, "description": "The public name."}}
    end = {"usage": ref("Usage"), "thinkgate": ref("Thinkgate")}

    def whole(kind: str, name: str, content: Json) -> Json:
        choice = _object(
            "One choice.", {"index": INDEX, name: content, "finish_reason": FINISH, **rest}, optional=tuple(rest)
        )
        choices = _list_of(choice, minItems=1)
        return _object("The whole answer.", {**head, "object": {"const": kind}, "choices": choices, **end})

    def chunk(kind: str, name: str, content: Json) -> Json:
        parts = {"index": INDEX, name: content, "finish_reason": FINISH_OR_NULL, **rest}
        choices = _list_of(_object("What arrived for one choice.", parts, optional=tuple(rest)))
        return _object(
            "One `data:` line. The last one with a finish_reason carries `thinkgate`; the usage, if"
            " `stream_options.include_usage` asked for it, comes in one without choices before `[DONE]`. A failure"
            " after the first byte is a line of `Error`, and `[DONE]` does not follow.",
            {**head, "object": {"const": kind}, "choices": choices, **end},
            optional=tuple(end),
        )

    delta = {**message, "description": "The next piece.", "required": []}
    return {
        "ChatCompletion": whole("chat.completion", "message", message),
        "ChatCompletionChunk": chunk("chat.completion.chunk", "delta", delta),
        "Completion": whole("text_completion", "text", TEXT),
        "CompletionChunk": chunk("text_completion", "text", TEXT),
    }


def _others() -> Json:
    """Everything else."""
    vector = {"anyOf": [_list_of({"type": "number"}), TEXT], "description": "Numbers, or base64 if asked for."}
    embedding = _object("One vector.", {"index": INDEX, "embedding": vector})
    model = _object(
        "A model that the key may use.",
        {
            "id": TEXT,
            "object": {"const": "model"},
            "created": EPOCH,
            "owned_by": TEXT,
            "max_model_len": {"type": ["integer", "null"], "description": "Its context window in tokens, if known."},
        },
    )
    error = _object(
        "What is wrong; the message says what would be right.",
        {
            "message": TEXT,
            "type": TEXT_OR_NULL,
            "param": {"description": "The field at fault.", "type": ["string", "null"]},
            "code": {"type": ["string", "integer", "null"], "description": "A number only where a backend says so."},
        },
        optional=("type", "param", "code"),
    )
    return {
        "EmbeddingList": _object(
            "The backend's vectors as they came.",
            {
                "data": _list_of(embedding),
                "model": {**TEXT, "description": "The public name."},
                "usage": {"type": "object"},
                "thinkgate": ref("EmbeddingThinkgate"),
            },
            optional=("usage", "model"),
        ),
        "FeedbackAccepted": _object(
            "It was counted.", {"object": {"const": "thinkgate.feedback"}, "accepted": {"const": True}}
        ),
        "Model": model,
        "ModelList": _object("Models.", {"object": {"const": "list"}, "data": _list_of(ref("Model"))}),
        "Error": _object("An error.", {"error": error}),
        "Live": _object("The process serves requests.", {"status": {"const": "ok"}}),
        "Ready": _object(
            "Some model can be served.",
            {
                "status": {"const": "ok"},
                "models": _list_of(TEXT, minItems=1),
                "down": {
                    "type": "object",
                    "additionalProperties": TEXT,
                    "description": "Models without a backend, and why.",
                },
            },
        ),
        "Version": _object("The gateway's version.", {"name": {"const": "thinkgate"}, "version": TEXT}),
    }
