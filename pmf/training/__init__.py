"""Training: typed settings, presets, the training step and the run loop."""

from pmf.training.config import TrainConfig
from pmf.training.folders import new_run_folder, resume_config
from pmf.training.loop import Run, TrainResult, prepare, train
from pmf.training.presets import PRESETS, get_preset, quick
from pmf.training.trainer import Trainer
from pmf.training.unread import refuse_unread, why_unread

__all__ = [
    "PRESETS",
    "Run",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "get_preset",
    "new_run_folder",
    "prepare",
    "quick",
    "refuse_unread",
    "resume_config",
    "train",
    "why_unread",
]
