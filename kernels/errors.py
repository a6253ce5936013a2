"""Every error of the embedded engine. None of them knows a wire or a status.

KernelError
├── RequestRefused       the request asks for what this model or engine cannot do
├── QueueFull            as many requests wait as the engine admits; retryable
├── EngineClosed         the engine is shutting down; retryable elsewhere
├── ModelUnusable        the model folder cannot be loaded or lacks what serving needs
├── PoolExhausted        the KV cache has no block left that nobody needs
└── GenerationFailed     this request broke inside the model; others go on
"""

from __future__ import annotations


class KernelError(Exception):
    """Root of what the kernels raise."""


class RequestRefused(KernelError):
    """The request asks for what this model or engine cannot do.

    Attributes:
        message: one sentence for the client: what is wrong and the remedy.
        param: the request field at fault.
        code: machine-readable detail; None for a plain wrong value.
    """

    def __init__(self, message: str, *, param: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class QueueFull(KernelError):
    """As many requests wait as the engine admits."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests wait for the engine already")


class EngineClosed(KernelError):
    """The engine is shutting down."""

    def __init__(self) -> None:
        super().__init__("the engine is shutting down")


class ModelUnusable(KernelError):
    """The model cannot be loaded or lacks what serving needs."""


class PoolExhausted(KernelError):
    """The KV cache has no block left that nobody needs; it goes on when a branch is closed.

    Attributes:
        wanted: blocks that were asked for.
        room: blocks that there were.
    """

    def __init__(self, *, wanted: int, room: int) -> None:
        super().__init__(f"{wanted} KV blocks are wanted, and there is room for {room}")
        self.wanted = wanted
        self.room = room


class GenerationFailed(KernelError):
    """A request broke inside the model; the engine goes on with the next one."""
