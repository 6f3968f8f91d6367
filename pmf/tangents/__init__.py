"""Tangents through networks that are not this library's."""

from .module import Jvp
from .sdpa import replace_sdpa

__all__ = ["Jvp", "replace_sdpa"]
