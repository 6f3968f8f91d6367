"""Layers that propagate a value and its tangent side by side: module(x, x_t) -> (y, y_t)."""

from .attention import AttentionBranch
from .block import Block
from .condition import Condition, ConditionTokens, LabelEmbedder, ScalarEmbedder
from .final import FinalLayer
from .mlp import MlpBranch
from .norm import RMSNorm
from .patch import PatchEmbedding
from .rotary import rotary_tables

__all__ = [
    "AttentionBranch",
    "Block",
    "Condition",
    "ConditionTokens",
    "FinalLayer",
    "LabelEmbedder",
    "PatchEmbedding",
    "RMSNorm",
    "ScalarEmbedder",
    "MlpBranch",
    "rotary_tables",
]
