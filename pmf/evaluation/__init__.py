"""Evaluation of images: feature statistics, accumulated over processes and resumable."""

from pmf.evaluation.counting import count_features, describe
from pmf.evaluation.digest import file_digest, weights_digest
from pmf.evaluation.features import SPACES, FeatureSpace, open_space
from pmf.evaluation.judge import Judge
from pmf.evaluation.sources import ImageSource, Samples, Some, open_images
from pmf.evaluation.statistics import Statistics, read_statistics, write_statistics
from pmf.evaluation.sums import Sums

__all__ = [
    "SPACES",
    "FeatureSpace",
    "ImageSource",
    "Judge",
    "Samples",
    "Some",
    "Statistics",
    "Sums",
    "count_features",
    "describe",
    "file_digest",
    "open_images",
    "open_space",
    "read_statistics",
    "weights_digest",
    "write_statistics",
]
