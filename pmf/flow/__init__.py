"""The MeanFlow objective on pixels, its random draws, and the sampler."""

from .draws import Draws
from .guidance import Guidance, IntervalGuidance, NoGuidance
from .objective import Objective, Terms
from .perceptual import Perceptual
from .preconditioner import EDMPreconditioner, NoPreconditioner, Preconditioner, SCMPreconditioner
from .prediction import Prediction, UPrediction, XPrediction
from .sampler import Sampler, sample
from .times import LineTimes, PlaneTimes, TimeSampling

__all__ = [
    "Draws",
    "EDMPreconditioner",
    "Guidance",
    "IntervalGuidance",
    "LineTimes",
    "NoGuidance",
    "NoPreconditioner",
    "Objective",
    "Perceptual",
    "PlaneTimes",
    "Preconditioner",
    "Prediction",
    "SCMPreconditioner",
    "Sampler",
    "Terms",
    "TimeSampling",
    "UPrediction",
    "XPrediction",
    "sample",
]
