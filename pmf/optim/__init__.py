"""Muon with Adam for what is no matrix, and averaged weights."""

from ._cohort import local
from ._sharing import fill
from .ema import EMA
from .muon import Muon

__all__ = ["EMA", "Muon", "fill", "local"]
