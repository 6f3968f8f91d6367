"""Pixel MeanFlow: fused ops with tangents, models, training and one-step sampling."""

from pmf import _library as _library

__version__ = "0.1.0"
