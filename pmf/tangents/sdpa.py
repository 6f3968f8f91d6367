"""F.scaled_dot_product_attention, whoever calls it, as `pmf.ops.attention`.

No single door reaches every caller, so three are held open together:

- the attribute of torch.nn.functional, for F.multi_head_attention_forward and whoever writes `F.` or imports
  inside a function;
- a TorchFunctionMode, for names imported before; PyTorch hides it from the code below torch.nn.functional;
- the fused path of nn.MultiheadAttention in eval mode, which calls neither, is switched off.

Attribute and fused path belong to the process, so they are counted under a lock: two threads that enter and
leave in any order leave nothing behind. Inside torch.compile the tracer undoes what it sees, without a lock.
"""

import contextlib
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pmf import ops
from pmf.ops._subclasses import kind_of
from pmf.ops.attention import MAX_WIDTH, causal_bias

__all__ = ["replace_sdpa"]

_torchs = F.scaled_dot_product_attention


class replace_sdpa(contextlib.ContextDecorator):  # noqa: N801 (a function to its users)
    """Within it, F.scaled_dot_product_attention is `pmf.ops.attention`: flash speed with a forward mode.

        with pmf.replace_sdpa():
            out, out_t = torch.func.jvp(network, (x,), (x_t,))

    The network is anybody's and stays as it is: nn.MultiheadAttention, timm, diffusers, transformers. Also a
    decorator; it nests, works inside and around torch.compile, and leaves nothing behind, after an exception
    either.

    Calls that `pmf.ops.attention` cannot serve (dropout, widths above 256, nested tensors and other
    subclasses) are PyTorch's own as before. In forward mode, where PyTorch's fused kernels raise, those with
    dropout or of such widths take its math backend, and other subclasses raise TypeError.

    A block under torch.utils.checkpoint is computed again with the same attention, wherever backward runs.
    """

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            self._before = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = _attention
        else:
            _count(1)
        self._mode = _Imported()
        self._mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)
        if torch.compiler.is_compiling():
            F.scaled_dot_product_attention = self._before
        else:
            _count(-1)

    def _recreate_cm(self) -> "replace_sdpa":
        """Decorated functions may be entered again before they are left."""
        return replace_sdpa()


class _Imported(TorchFunctionMode):
    """Reaches those who imported the function by name before."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _torchs:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_lock = threading.Lock()
_inside = 0
_fused_path = True


def _count(step: int) -> None:
    """One more or one less replacement in the process; the first replaces and the last restores."""
    global _inside, _fused_path
    torch.overrides.get_overridable_functions()  # cached by PyTorch at its first call: not with our function
    with _lock:
        _inside += step
        if step == 1 and _inside == 1:
            _fused_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            F.scaled_dot_product_attention = _attention
        elif step == -1 and _inside == 0:
            F.scaled_dot_product_attention = _torchs
            torch.backends.mha.set_fastpath_enabled(_fused_path)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and kind_of(attn_mask) == "bias" and _is_plain(query) and _is_plain(key):
        # Its __torch_function__ looks for torch.nn.functional's own, and would let its memory be read.
        attn_mask, is_causal = causal_bias(attn_mask, is_causal, query, key)
    if _is_served(query, key, value, attn_mask, dropout_p):
        _compute_again_alike()
        return ops.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    backend: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if _in_forward_mode():
        for x in (query, key, value, attn_mask):
            if x is not None and (not _is_plain(x) or x.is_nested):
                kind = "a nested tensor" if x.is_nested else f"a {type(x).__name__}"
                raise TypeError(
                    f"scaled_dot_product_attention: {kind} has no forward mode; pass plain tensors"
                )
        backend = sdpa_kernel(SDPBackend.MATH)  # PyTorch's only one with a forward mode
    with backend:
        return _torchs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _is_served(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float) -> bool:
    """Whether `pmf.ops.attention` computes this call; errors about the others are PyTorch's."""
    data = (query, key, value)
    given = data if attn_mask is None else (*data, attn_mask)
    if dropout_p != 0.0 or not all(map(_is_plain, given)) or any(x.is_nested for x in given):
        return False
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        return False
    same_place = all(x.device == query.device for x in given) and query.device.type in ("cpu", "cuda")
    floating = query.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    if not (same_place and floating and all(x.dtype == query.dtype for x in data)):
        return False
    shaped = all(x.dim() >= 2 and 1 <= x.shape[-1] <= MAX_WIDTH for x in data)
    return shaped and query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]


def _is_plain(x: Any) -> bool:
    """A tensor, or what stands for one while PyTorch traces."""
    return type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or (
        isinstance(x, Tensor) and type(x).__module__.startswith("torch._subclasses.")
    )


def _in_forward_mode() -> bool:
    if torch.compiler.is_compiling():
        from pmf.ops import _compiled  # imports torch._dynamo, which costs seconds

        return _compiled.in_func_jvp()
    jvp = torch._C._functorch.TransformType.Jvp
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(transform.key() == jvp for transform in stack)


def _compute_again_alike() -> None:
    """Inside a block under torch.utils.checkpoint: let it be computed again with this attention.

    Backward may run outside of the context, where PyTorch's own attention would save other tensors. Should a
    PyTorch keep its frames elsewhere, nothing happens here, and checkpoint itself raises: what the
    Function saves (`pmf.ops.attention`) never passes for what PyTorch's saves.
    """
    if torch.compiler.is_compiling():
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    for cell in (getattr(hooks[0], "__closure__", None) or ()) if hooks else ():
        frame = cell.cell_contents
        run = getattr(frame, "recompute_fn", None)
        if run is not None and not isinstance(getattr(run, "__self__", None), _Recomputed):
            frame.recompute_fn = _Recomputed(run).run


class _Recomputed:
    """A block's function, within `replace_sdpa`."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def run(self, *args: Any) -> Any:
        with replace_sdpa():
            return self.block(*args)
