"""Operators without a rule: PyTorch's forward-mode formula, or an error."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from .mode import DIFFERENTIATES, LAZY, TangentMode

__all__ = ["formula", "unknown"]

aten = torch.ops.aten
_Keys = torch._C.DispatchKey


def formula(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Value and tangent from PyTorch's forward-mode formula, which raises if there is none."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(DIFFERENTIATES)
    given = []

    def dual(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        t = mode.get(x)
        if t is None:
            return x.detach()
        if x.is_inference() or t.is_inference():  # autograd does not see them
            x, t = x.clone(), t.clone()
        if t.untyped_storage().nbytes() != x.untyped_storage().nbytes():
            # make_dual would copy t into memory like x's, and fail if elements share it or sizes are dynamic.
            x, t = x.clone(), t.clone()
        given.append(t.untyped_storage()._cdata)
        return forward_ad.make_dual(x.detach(), t)

    def value(y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        primal, tangent = forward_ad.unpack_dual(y)
        out = aten.detach(primal)
        if tangent is not None and not tangent._is_zerotensor():
            t = aten.detach(tangent)
            mode.set(out, t.clone() if t.untyped_storage()._cdata in given else t)
        return out

    with contextlib.ExitStack() as entered:
        if torch.is_inference_mode_enabled():
            entered.enter_context(torch.inference_mode(False))
        for key in (*LAZY, _Keys.AutogradFunctionality, _Keys.ADInplaceOrView):
            entered.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        entered.enter_context(torch.no_grad())
        entered.enter_context(forward_ad._set_fwd_grad_enabled(True))
        entered.enter_context(forward_ad.dual_level())
        dual_args, dual_kwargs = tree_map(dual, (tuple(args), kwargs))
        missing = f"Jvp: PyTorch has no forward mode for {func}: compute it with other operators"
        try:
            out = func(*dual_args, **dual_kwargs)
        except NotImplementedError as error:
            if "forward AD" not in str(error):
                raise
            raise NotImplementedError(missing) from error
        if (
            isinstance(out, Tensor)
            and out.is_floating_point()
            and forward_ad.unpack_dual(out).tangent is None
        ):
            raise NotImplementedError(missing)  # such as Bessel functions; rounding has a tangent of zeros
        return tree_map(value, out)


def unknown(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    raise NotImplementedError(
        f"Jvp: {func} has no rule for tangents; if it has a forward mode, call with detach_tangent=False, "
        "which is torch.func.jvp"
    )
