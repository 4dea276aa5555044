"""Finding one callback from another."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

C = TypeVar("C", bound=L.Callback)


def callback_of(trainer: L.Trainer, kind: type[C]) -> C | None:
    """Return the trainer's first callback of a class, or None."""
    callbacks: list[L.Callback] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
