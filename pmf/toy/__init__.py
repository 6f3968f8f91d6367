"""The toy experiment: x- and u-prediction of points in a plane in D dimensions (arXiv 2601.22158)."""

from .network import Mlp
from .parallel import Job, train_all
from .shapes import SHAPES, draw_plane, draw_points
from .training import PREDICTIONS, Outcome, Settings, meanflow_loss, one_step, train_and_measure

__all__ = [
    "PREDICTIONS",
    "SHAPES",
    "Job",
    "Mlp",
    "Outcome",
    "Settings",
    "draw_plane",
    "draw_points",
    "meanflow_loss",
    "one_step",
    "train_all",
    "train_and_measure",
]
