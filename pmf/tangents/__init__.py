"""Tangents through arbitrary networks."""

from .module import Jvp
from .sdpa import replace_sdpa

__all__ = ["Jvp", "replace_sdpa"]
