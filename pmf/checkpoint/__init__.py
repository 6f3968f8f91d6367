"""Weights and runs on disk: single-process files (`ours`) and sharded checkpoints (`sharded`)."""

from pmf.checkpoint.ours import (
    BUILT_IN,
    LoadedModel,
    assign_weights,
    checkpoint_folders,
    ema_file,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    read_json,
    read_official,
    read_tensors,
    step_folder,
    step_of,
    tensors_bytes,
    trained_settings,
    weights_bytes,
)

__all__ = [
    "BUILT_IN",
    "LoadedModel",
    "assign_weights",
    "checkpoint_folders",
    "ema_file",
    "load_checkpoint",
    "load_model",
    "newest_checkpoint",
    "read_json",
    "read_official",
    "read_tensors",
    "step_folder",
    "step_of",
    "tensors_bytes",
    "trained_settings",
    "weights_bytes",
]
