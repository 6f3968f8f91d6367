"""Distances between two sets of samples, computed on any features (here: pixels)."""

from pmf.metrics.frechet import frechet_distance
from pmf.metrics.neighbours import coverage, recall
from pmf.metrics.wasserstein import sliced_wasserstein

__all__ = ["coverage", "frechet_distance", "recall", "sliced_wasserstein"]
