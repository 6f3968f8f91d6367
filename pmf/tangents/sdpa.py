"""Replace F.scaled_dot_product_attention with `pmf.ops.attention`, for all callers.

No single hook reaches every caller, so three are combined:

- the attribute of torch.nn.functional, for F.multi_head_attention_forward and code that writes `F.` or
  imports inside a function;
- a TorchFunctionMode, for names imported earlier; PyTorch hides it from code below torch.nn.functional;
- the fused path of nn.MultiheadAttention in eval mode, which calls neither, is disabled.

Attribute and fused path are global to the process, so uses are counted under a lock: threads may enter and
exit in any order, and the last one restores both. Inside torch.compile the tracer undoes what it sees,
without a lock.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pmf import ops
from pmf.ops._attention_inputs import MAX_WIDTH, causal_bias
from pmf.ops._subclasses import kind_of

__all__ = ["replace_sdpa"]

torchs = F.scaled_dot_product_attention


class replace_sdpa(contextlib.ContextDecorator):  # noqa: N801 (a function to its users)
    """Inside it, F.scaled_dot_product_attention is `pmf.ops.attention`: flash speed with a forward mode.

        with pmf.replace_sdpa():
            out, out_t = torch.func.jvp(network, (x,), (x_t,))

    Works with any unmodified network: nn.MultiheadAttention, timm, diffusers, transformers. Also a decorator;
    it nests, works inside and around torch.compile, and restores everything, even after an exception.

    Calls that `pmf.ops.attention` does not support (dropout, widths above 256, nested tensors and other
    subclasses) go to PyTorch. In forward mode, where PyTorch's fused kernels raise, calls with dropout or
    such widths use its math backend, and other subclasses raise TypeError.

    A block under torch.utils.checkpoint is recomputed with the same attention, wherever backward runs.
    """

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            self._before = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = attention
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
        """Decorated functions may be re-entered before they return."""
        return replace_sdpa()


class _Imported(TorchFunctionMode):
    """Reaches callers that imported the function by name earlier."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torchs:
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def replace_attribute() -> Iterator[None]:
    """`replace_sdpa` for a caller that has its own TorchFunctionMode, since each mode sees every call."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


_lock = threading.Lock()
_inside = 0
_fused_path = True


def _count(step: int) -> None:
    """Adjust the process-wide count of replacements; the first replaces and the last restores."""
    global _inside, _fused_path
    torch.overrides.get_overridable_functions()  # PyTorch caches it on first use: do so without our function
    with _lock:
        _inside += step
        if step == 1 and _inside == 1:
            _fused_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            F.scaled_dot_product_attention = attention
        elif step == -1 and _inside == 0:
            F.scaled_dot_product_attention = torchs
            torch.backends.mha.set_fastpath_enabled(_fused_path)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and kind_of(attn_mask) == "bias" and is_plain(query) and is_plain(key):
        # Its __torch_function__ recognises only torch.nn.functional's function and would expose raw memory.
        attn_mask, is_causal = causal_bias(attn_mask, is_causal, query, key)
    # Function modes see PyTorch's attention as one call, too; each size that is read would be another.
    hidden = contextlib.nullcontext() if torch.compiler.is_compiling() else torch._C.DisableTorchFunction()
    with hidden:
        found = _ours(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if found is not None:
        return found
    backend: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if _in_forward_mode():
        for x in (query, key, value, attn_mask):
            if x is not None and (not is_plain(x) or x.is_nested):
                kind = "a nested tensor" if x.is_nested else f"a {type(x).__name__}"
                raise TypeError(
                    f"scaled_dot_product_attention: {kind} has no forward mode; pass plain tensors"
                )
        backend = sdpa_kernel(SDPBackend.MATH)  # PyTorch's only backend with a forward mode
    with backend:
        return torchs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """`pmf.ops.attention` where it computes this call."""
    if not _is_served(query, key, value, attn_mask, dropout_p):
        return None
    _compute_again_alike()
    return ops.attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _is_served(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float) -> bool:
    """Whether `pmf.ops.attention` computes this call; PyTorch reports errors in the others."""
    data = (query, key, value)
    given = data if attn_mask is None else (*data, attn_mask)
    if dropout_p != 0.0 or not all(map(is_plain, given)) or any(x.is_nested for x in given):
        return False
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        return False
    same_place = all(x.device == query.device for x in given) and query.device.type in ("cpu", "cuda")
    floating = query.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    if not (same_place and floating and all(x.dtype == query.dtype for x in data)):
        return False
    shaped = all(x.dim() >= 2 and 1 <= x.shape[-1] <= MAX_WIDTH for x in data)
    return shaped and query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]


def is_plain(x: Any) -> bool:
    """Whether x is a plain tensor, or stands for one while PyTorch traces."""
    return type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or (
        isinstance(x, Tensor) and type(x).__module__.startswith("torch._subclasses.")
    )


def _in_forward_mode() -> bool:
    if torch.compiler.is_compiling():
        from pmf.ops import _compiled  # imports torch._dynamo, which takes seconds

        return _compiled.in_func_jvp()
    jvp = torch._C._functorch.TransformType.Jvp
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(transform.key() == jvp for transform in stack)


def _compute_again_alike() -> None:
    """Inside a block under torch.utils.checkpoint, make its recomputation use this attention.

    Backward may run outside the context, where PyTorch's attention would save different tensors. If a future
    PyTorch stores its frames elsewhere, this is a no-op and checkpoint itself raises: the tensors saved by
    the Function (`pmf.ops.attention`) never match those saved by PyTorch's.
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
    """A block's function, run inside `replace_sdpa`."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def run(self, *args: Any) -> Any:
        with replace_sdpa():
            return self.block(*args)
