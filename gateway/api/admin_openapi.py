"""The admin API's part of the OpenAPI document.

Owns: what FastAPI says of its routes, made to fit the rest: errors in our form, and a security scheme of its own.
"""

from __future__ import annotations

from typing import Any

from fastapi.openapi.utils import get_openapi

from gateway.api.admin import routes

Json = dict[str, Any]
SCHEME = "admin"
EVERY = ("400", "401", "403", "413", "500", "503", "504")
OF_FASTAPI = ("HTTPValidationError", "ValidationError")


def admin_document(error_names: dict[str, str]) -> tuple[Json, Json]:
    """Paths and schemas.

    Args:
        error_names: status to the name of its response among the document's components.
    """
    described = get_openapi(title="thinkgate", version="1", routes=routes())
    paths: Json = described["paths"]
    for path in paths.values():
        for operation in path.values():
            answers = operation["responses"]
            wanted = {*EVERY, *(status for status in answers if status in error_names)}
            kept = {status: answer for status, answer in answers.items() if status.startswith("2")}
            refs = {status: {"$ref": f"#/components/responses/{error_names[status]}"} for status in sorted(wanted)}
            operation["responses"] = kept | refs
            operation["security"] = [{SCHEME: []}]
            operation["tags"] = ["admin"]
    schemas = described["components"]["schemas"]
    return paths, {name: schema for name, schema in schemas.items() if name not in OF_FASTAPI}
