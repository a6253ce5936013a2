"""Backends behind one name: every address of `dns+http://name:port` is a backend, as addresses come and go.

Owns: looking names up again and again, and what entries a name stands for. A name that cannot be looked up keeps the
addresses it had; one that never had any is one backend under its name.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from gateway.config.schema import BackendConfig, Config

log = logging.getLogger("thinkgate.names")
START = "dns+"
Lookup = Callable[[str, int], Awaitable[list[str]]]


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a name. Raises: OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


class Names:
    """The addresses of every name that a configuration mentions.

    Args:
        lookup: asks for the addresses of a host.
    """

    def __init__(self, lookup: Lookup = look_up) -> None:
        self.lookup = lookup
        self._addresses: dict[str, tuple[str, ...]] = {}

    def expanded(self, backends: Sequence[BackendConfig]) -> list[BackendConfig]:
        """The entries, with one per address in the place of each name."""
        entries: list[BackendConfig] = []
        for backend in backends:
            if backend.url is None or not backend.url.startswith(START):
                entries.append(backend)
                continue
            url = backend.url.removeprefix(START)
            parts = urlsplit(url)
            addresses = self._addresses.get(parts.netloc)
            if addresses is None:
                entries.append(backend.model_copy(update={"url": url}))
                continue
            for address in addresses:
                place = f"[{address}]" if ":" in address else address
                url = f"http://{place}:{parts.port or 80}{parts.path}"
                id = f"{backend.id}-{address.replace(':', '-')}"
                entries.append(backend.model_copy(update={"url": url, "id": id}))
        return entries

    async def refresh(self, config: Config) -> bool:
        """Look every name up again; whether anything is other than before."""
        names = set(_names(backend for model in config.models.values() for backend in model.backends))
        before = dict(self._addresses)
        self._addresses = {name: known for name, known in self._addresses.items() if name in names}
        for name in sorted(names):
            parts = urlsplit(f"//{name}")
            try:
                found = await self.lookup(parts.hostname or "", parts.port or 80)
            except (OSError, UnicodeError) as exc:  # the latter for what can be no name at all
                log.warning("name not found", extra={"name_looked_up": name, "reason": str(exc)})
                continue
            if found and self._addresses.get(name) != tuple(found):
                self._addresses[name] = tuple(found)
                log.info("addresses changed", extra={"name_looked_up": name, "addresses": found})
        return self._addresses != before


def _names(backends: Iterable[BackendConfig]) -> list[str]:
    urls = [each.url for each in backends if each.url is not None and each.url.startswith(START)]
    return [urlsplit(url.removeprefix(START)).netloc for url in urls]
