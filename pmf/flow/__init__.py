"""MeanFlow objectives, for pixels and for any network, with their random draws and samplers."""

from .draws import Draws
from .guidance import ClassifierFreeGuidance, Guidance, IntervalGuidance, NoGuidance
from .meanflow import MeanFlow, sample
from .objective import Objective, Terms
from .perceptual import Perceptual
from .preconditioner import EDMPreconditioner, NoPreconditioner, Preconditioner, SCMPreconditioner
from .prediction import Prediction, UPrediction, XPrediction
from .read_out import ReadOut
from .sampler import Sampler
from .times import LineTimes, PlaneTimes, TimeSampling

__all__ = [
    "ClassifierFreeGuidance",
    "Draws",
    "EDMPreconditioner",
    "Guidance",
    "IntervalGuidance",
    "LineTimes",
    "MeanFlow",
    "NoGuidance",
    "NoPreconditioner",
    "Objective",
    "Perceptual",
    "PlaneTimes",
    "Preconditioner",
    "Prediction",
    "ReadOut",
    "SCMPreconditioner",
    "Sampler",
    "Terms",
    "TimeSampling",
    "UPrediction",
    "XPrediction",
    "sample",
]
