"""Tangents through networks that are not this library's."""

from .sdpa import replace_sdpa

__all__ = ["replace_sdpa"]
