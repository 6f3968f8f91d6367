"""Muon for matrices, Adam for everything else, and weight averages."""

from ._cohort import local
from ._sharing import fill
from .ema import EMA
from .muon import Muon

__all__ = ["EMA", "Muon", "fill", "local"]
