"""The ops in plain PyTorch: short, differentiable, any dtype. Every kernel is tested against them.

Each takes the arguments of the public function of the same name in `pmf.ops` (but no dropout_p,
detach_tangent or list of matrices), computes in the dtype of its inputs, and never uses a compiled kernel.
For an accurate result, call it in float64.
"""

from .attention import (
    attention,
    attention_jvp,
    attention_varlen,
    attention_varlen_jvp,
)
from .gated_residual import gated_residual, gated_residual_jvp
from .newton_schulz import newton_schulz
from .patch_embed import patch_embed, patch_embed_jvp
from .patch_velocity import patch_velocity, patch_velocity_jvp
from .rms_norm import rms_norm, rms_norm_jvp
from .rotary_qk_norm import rotary_qk_norm, rotary_qk_norm_jvp
from .swiglu import swiglu, swiglu_jvp

__all__ = [
    "attention",
    "attention_jvp",
    "attention_varlen",
    "attention_varlen_jvp",
    "gated_residual",
    "gated_residual_jvp",
    "newton_schulz",
    "patch_embed",
    "patch_embed_jvp",
    "patch_velocity",
    "patch_velocity_jvp",
    "rms_norm",
    "rms_norm_jvp",
    "rotary_qk_norm",
    "rotary_qk_norm_jvp",
    "swiglu",
    "swiglu_jvp",
]
