"""InstaFlow: text to image in one network evaluation, and the whole way to make such a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instaflow.generate import Drawing, InstaFlow

__version__ = "0.1.0"
__all__ = ["Drawing", "InstaFlow", "__version__"]


def __dir__() -> list[str]:
    """What there is, before it is loaded."""
    return __all__


def __getattr__(name: str) -> Any:
    """Load torch only when somebody draws."""
    if name in {"Drawing", "InstaFlow"}:
        from instaflow import generate

        return getattr(generate, name)
    raise AttributeError(f"module 'instaflow' has no attribute {name!r}")
