"""Pixel MeanFlow: fused ops with tangents, models, training and one-step sampling."""

from pmf.interrupts import quiet_imports

with quiet_imports():
    from pmf import env, flow, models, ops, optim
    from pmf.checkpoint import load_checkpoint
    from pmf.flow.sampler import sample
    from pmf.models import PixelMeanFlow, create_model
    from pmf.tangents import Jvp, replace_sdpa
    from pmf.version import VERSION as __version__

__all__ = [
    "Jvp",
    "PixelMeanFlow",
    "__version__",
    "create_model",
    "env",
    "flow",
    "load_checkpoint",
    "models",
    "ops",
    "optim",
    "replace_sdpa",
    "sample",
]
