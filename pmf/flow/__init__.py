"""The MeanFlow objective on pixels, its random draws, and the sampler."""

from .draws import Draws
from .guidance import Guidance, IntervalGuidance
from .objective import Objective, Terms
from .preconditioner import NoPreconditioner, Preconditioner
from .prediction import Prediction, UPrediction, XPrediction
from .sampler import Sampler, sample
from .times import PlaneTimes, TimeSampling

__all__ = [
    "Draws",
    "Guidance",
    "IntervalGuidance",
    "NoPreconditioner",
    "Objective",
    "PlaneTimes",
    "Preconditioner",
    "Prediction",
    "Sampler",
    "Terms",
    "TimeSampling",
    "UPrediction",
    "XPrediction",
    "sample",
]
