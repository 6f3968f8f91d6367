"""Fused ops, each with its tangent: the public functions are exactly `__all__`.

Every op accepts float32, bfloat16, float16 or float64, has differentiable outputs, and works with
autograd, torch.func, forward-mode AD, autocast, checkpointing and torch.compile. Its `_jvp` twin (all ops
except newton_schulz have one) computes value and tangent in one pass and is itself an ordinary differentiable
op; use the twins for training and compiling.

DTensors may be sharded along every dimension that an op does not reduce over (batch, heads, tokens of the
elementwise ops). Ops that treat tokens independently, and attention, accept jagged nested tensors; attn_mask
accepts `torch.nn.attention.bias`. Subclasses that override nothing are treated as plain tensors; others, and
sparse, quantized or nested strided tensors, raise a TypeError that names them.
"""

from . import _flops
from .attention import attention, attention_jvp
from .attention_varlen import attention_varlen, attention_varlen_jvp
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

_flops.register_all()
