"""What can run the networks here, and why the rest cannot. One question, answered in one place, by a list of reasons."""

from __future__ import annotations

from .errors import UsageError

BACKENDS = ("torch",)


def why_unavailable(name: str) -> list[str]:
    """Reasons why backend `name` cannot run here; empty if it can."""
    if name == "torch":
        return []
    return [f"there is no such backend; known are auto, {', '.join(BACKENDS)}"]


def reasons() -> dict[str, list[str]]:
    """Every backend with its reasons, for `iedit info`."""
    return {name: why_unavailable(name) for name in BACKENDS}


def choose(name: str) -> str:
    """The backend to load: `name` itself, or for "auto" the first of the ladder that can run.

    Raises:
        UsageError: it was asked for by name and cannot run: never a silent step down.
    """
    if name == "auto":
        return next(b for b in BACKENDS if not why_unavailable(b))
    why = why_unavailable(name)
    if why:
        raise UsageError(f"backend {name!r} was requested but cannot run: {'; '.join(why)}")
    return name
