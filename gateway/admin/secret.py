"""Secrets that the gateway makes: their form, and the keyed hash that is kept of them.

Owns: HMAC-SHA256 over a secret of the operator's, so that who reads the store can neither use what is in it nor try
secrets against it. Does not own: secrets of the configuration file, which are compared by SHA-256 (auth.py).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

KEY_PREFIX = "tg-"
ADMIN_PREFIX = "tga-"
RANDOM_BYTES = 32
KEY_START = KEY_PREFIX.encode()
KEY_BYTES = len(KEY_PREFIX) + len(secrets.token_urlsafe(RANDOM_BYTES))


def new_secret(prefix: str) -> str:
    """A secret that nobody has."""
    return prefix + secrets.token_urlsafe(RANDOM_BYTES)


class Hasher:
    """The keyed hash.

    Args:
        secret: what keys it.

    Attributes:
        id: tells hashers with different secrets apart, and nothing of the secret.
    """

    __slots__ = ("_mac", "id")

    def __init__(self, secret: bytes) -> None:
        self._mac = hmac.new(secret, digestmod=hashlib.sha256)
        self.id = self.digest(b"thinkgate key hash").hex()[:8]

    def digest(self, secret: bytes) -> bytes:
        """The hash of a secret; keyed once and copied, which takes half as long."""
        mac = self._mac.copy()
        mac.update(secret)
        return mac.digest()
