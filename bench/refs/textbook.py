"""The textbook way: FastAPI, httpx, StreamingResponse. What the hot path avoids, and what that is worth.

UPSTREAM=127.0.0.1:9100 uvicorn bench.refs.textbook:app --loop uvloop --http httptools --no-access-log
"""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

URL = f"http://{os.environ.get('UPSTREAM', '127.0.0.1:9100')}/v1/chat/completions"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for the life of the process."""
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=2000)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    """Pass one request on."""
    body = json.loads(await request.body())
    client: httpx.AsyncClient = app.state.client
    upstream = await client.send(client.build_request("POST", URL, json=body), stream=True)
    if not body.get("stream"):
        content = await upstream.aread()
        return Response(content, upstream.status_code, media_type="application/json")

    async def chunks() -> AsyncIterator[bytes]:
        async for chunk in upstream.aiter_raw():
            yield chunk
        await upstream.aclose()

    return StreamingResponse(chunks(), upstream.status_code, media_type="text/event-stream")
