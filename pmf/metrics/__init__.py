"""Metrics between two sets of samples, on any features, and FID's Inception network."""

from pmf.metrics.frechet import frechet_distance, frechet_of_moments
from pmf.metrics.inception import InceptionV3
from pmf.metrics.inception_score import InceptionScore
from pmf.metrics.moments import Moments
from pmf.metrics.neighbours import coverage, recall
from pmf.metrics.wasserstein import sliced_wasserstein

__all__ = [
    "InceptionScore",
    "InceptionV3",
    "Moments",
    "coverage",
    "frechet_distance",
    "frechet_of_moments",
    "recall",
    "sliced_wasserstein",
]
