"""Value and tangent of single operators: (mode, func, args, kwargs) -> what func returns.

Most operators in networks are linear, or have a symmetric Jacobian, so that the operator's own backward
kernel computes the tangent: elementwise functions, softmax, and normalisations without their affine part.
Operators without a rule use PyTorch's forward-mode formula and raise if there is none.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pmf import ops
from pmf.ops._dispatch import functions
from pmf.ops._products import product

from .formula import formula, unknown
from .mode import TangentMode, same_strides

__all__ = ["rules"]

Rule = Callable[[TangentMode, Any, Sequence[Any], dict[str, Any]], Any]
aten = torch.ops.aten


class _Rules(dict[Any, Rule]):
    """The rule for each operator's tangents."""

    def __missing__(self, func: Any) -> Rule:
        rule = self[func] = _find(func)
        return rule


rules = _Rules()


def _find(func: Any) -> Rule:
    namespace, _, name = func._schema.name.partition("::")
    if namespace.startswith("pmf"):
        return _OURS.get(name, _ours)
    if not any("Tensor" in str(result.type) for result in func._schema.returns):
        if func._schema.is_mutable:
            return unknown
        return _constant
    if namespace not in ("aten", "prims"):
        return unknown
    if func._schema.is_mutable:
        return _in_place
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return _composite  # also `to`, which is declared a view
    if func.is_view:
        return _view
    return formula


def _rule(*overloads: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        rules.update(dict.fromkeys(overloads, function))
        return function

    return register


# Operators that are linear in their first argument, or constant.


@_rule(
    aten.clone.default, aten._to_copy.default, aten.neg.default, aten._unsafe_view.default,
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum.default,
    aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten.tril.default, aten.triu.default,
    aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default,
    aten.repeat.default, aten.roll.default, aten.flip.default,
    aten.index_select.default, aten.gather.default, aten.index.Tensor,
    aten.mul.Scalar, aten.div.Scalar,
)  # fmt: skip
def _linear(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out, t = mode.value(func, *args, **kwargs), mode.get(args[0])
    if t is not None and out.dtype != torch.bool and (out.is_floating_point() or out.is_complex()):
        mode.set(out, func(t, *args[1:], **kwargs))
    return out


@_rule(
    aten.detach.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default,
    aten.full_like.default, aten.rand_like.default, aten.randn_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_empty.default, aten.new_full.default, aten.new_empty_strided.default,
    aten.bernoulli.p, aten.bernoulli.default, aten.is_same_size.default, aten.view.dtype, aten.histc.default,
)  # fmt: skip
def _constant(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    if func is aten.detach.default:
        mode.detach(out)
    return out


def _view(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    t = mode.get(x)
    assert t is not None  # no other argument has values
    out = func(*args, **kwargs)
    out_t = _strided(t, *args, **kwargs) if func is aten.as_strided.default else func(t, *args[1:], **kwargs)
    if isinstance(out, Tensor):
        mode.alias(out, out_t)
    else:
        for part, part_t in zip(out, out_t, strict=True):
            mode.alias(part, part_t)
    return out


def _strided(t: Tensor, x: Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> Tensor:
    """The tangent of x.as_strided(...)."""
    if not same_strides(t, x):
        raise NotImplementedError(
            f"Jvp: as_strided of a value {list(x.shape)} whose elements have gaps between them in memory, or "
            "share it: call contiguous() before"
        )
    beyond = 0 if storage_offset is None else storage_offset - x.storage_offset()
    return t.as_strided(size, stride, t.storage_offset() + beyond)


@_rule(aten.cat.default, aten.stack.default)
def _joined(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    out = mode.value(func, *args, **kwargs)
    parts = [x.new_zeros(()).expand(x.shape) if (t := mode.get(x)) is None else t for x in args[0]]
    mode.set(out, func(parts, *args[1:], **kwargs))
    return out


@_rule(aten.constant_pad_nd.default)
def _padded(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    out = mode.value(func, *args, **kwargs)
    mode.set(out, func(mode.get(args[0]), args[1], 0))
    return out


# Sums and products.


@_rule(aten.add.Tensor, aten.sub.Tensor)
def _sum(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    a, b = args
    out, t_a, t_b = mode.value(func, a, b, **kwargs), mode.get(a), mode.get(b)
    if t_a is not None and t_b is not None:
        mode.set(out, getattr(torch, func._opname)(t_a, t_b, **kwargs, out=mode.buffer(out)))
    elif t_b is not None:
        factor = kwargs.get("alpha", 1) * (-1 if func is aten.sub.Tensor else 1)
        mode.set(out, t_b * factor)
    else:
        assert t_a is not None
        mode.set(out, t_a.clone() if t_a.shape == out.shape else t_a)
    return out


@_rule(aten.add.Scalar, aten.sub.Scalar)
def _shifted(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    out, t = mode.value(func, *args, **kwargs), mode.get(args[0])
    mode.set(out, None if t is None else t.clone())
    return out


@_rule(aten.mul.Tensor)
def _times(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    a, b = args
    out, t_a, t_b = mode.value(func, a, b), mode.get(a), mode.get(b)
    t = None if t_a is None else torch.mul(t_a, b, out=mode.buffer(out))
    if t_b is not None:
        t = torch.mul(t_b, a, out=mode.buffer(out)) if t is None else t.addcmul_(a, t_b)
    mode.set(out, t)
    return out


@_rule(aten.div.Tensor)
def _quotient(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    if mode.get(args[1]) is not None:
        return formula(mode, func, args, kwargs)
    out, t = mode.value(func, *args), mode.get(args[0])
    mode.set(out, None if t is None else t / args[1])
    return out


@_rule(aten.mm.default, aten.bmm.default)
def _product(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    if kwargs:
        return formula(mode, func, args, kwargs)
    a, b = args
    out, t_a, t_b = mode.value(func, a, b), mode.get(a), mode.get(b)
    multiply = product if func is aten.mm.default else torch.bmm
    t = None if t_a is None else multiply(t_a, b, out=mode.buffer(out))
    if t_b is not None:
        t = multiply(a, t_b, out=mode.buffer(out)) if t is None else t.add_(multiply(a, t_b))
    mode.set(out, t)
    return out


@_rule(aten.addmm.default)
def _affine(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    bias, a, b = args
    t = mode.get(a)
    if kwargs or mode.get(bias) is not None or mode.get(b) is not None or t is None:
        return formula(mode, func, args, kwargs)
    out = mode.value(func, bias, a, b)
    mode.set(out, product(t, b, mode.buffer(out)))
    return out


@_rule(aten.convolution.default)
def _convolution(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    x, weight, bias, *rest = args
    if mode.get(weight) is not None or mode.get(bias) is not None:
        return formula(mode, func, args, kwargs)
    out = mode.value(func, *args)
    mode.set(out, func(mode.get(x), weight, None, *rest))
    return out


# A symmetric Jacobian: the backward kernel computes the tangent.


@_rule(aten.gelu.default, aten.silu.default, aten.mish.default, aten.hardswish.default)
def _of_input(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    out = mode.value(func, *args, **kwargs)
    backward, buffer = getattr(aten, func._opname + "_backward"), mode.buffer(out)
    if buffer is not None and "grad_input" in backward.overloads():
        mode.set(out, backward.grad_input(mode.get(args[0]), *args, **kwargs, grad_input=buffer))
    else:
        mode.set(out, backward(mode.get(args[0]), *args, **kwargs))
    return out


@_rule(aten.tanh.default, aten.sigmoid.default)
def _of_output(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    out = mode.value(func, *args)
    mode.set(out, getattr(aten, func._opname + "_backward")(mode.get(args[0]), out))
    return out


@_rule(aten.relu.default)
def _relu(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    out = mode.value(func, *args)
    mode.set(out, aten.threshold_backward(mode.get(args[0]), out, 0))
    return out


@_rule(aten._softmax.default)
def _softmax(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    out, x = mode.value(func, *args), args[0]
    if out.dtype != x.dtype:
        return formula(mode, func, args, kwargs)
    mode.set(out, aten._softmax_backward_data(mode.get(x), out, args[1], x.dtype))
    return out


@_rule(aten.native_layer_norm.default)
def _layer_norm(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, shape, weight, bias, _ = args
    t = mode.get(x)
    if t is None or mode.get(weight) is not None or mode.get(bias) is not None:
        return _norm(mode, func, args, kwargs)
    out, mean, rstd = outputs = mode.value(func, *args)
    mode.leave(mean, rstd)
    if weight is not None and weight.dtype != x.dtype:  # 16-bit input, 32-bit weights and statistics
        x, t = x.to(weight.dtype), t.to(weight.dtype)
    # Of its arguments the kernel reads the statistics, perhaps the first samples' only, as if contiguous.
    rest = (mean.contiguous(), rstd.contiguous(), None, None, [True, False, False])
    t = aten.native_layer_norm_backward(t, x, shape, *rest)[0]
    mode.set(out, t if weight is None else torch.mul(t, weight, out=mode.buffer(t)))
    return outputs


@_rule(aten.native_group_norm.default)
def _group_norm(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, weight, bias, batch, channels, size, groups, _ = args
    t = mode.get(x)
    if t is None or mode.get(weight) is not None or mode.get(bias) is not None:
        return formula(mode, func, args, kwargs)
    out, mean, rstd = outputs = mode.value(func, *args)
    mode.leave(mean, rstd)
    sizes = (batch, channels, size, groups, [True, False, False])
    t = aten.native_group_norm_backward(t.contiguous(), x.contiguous(), mean, rstd, None, *sizes)[0]
    mode.set(out, t if weight is None else t * _per_channel(weight, x))
    return outputs


@_rule(aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
def _batch_norm(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, weight, bias, running_mean, running_var, training, _, eps = args
    t = mode.get(x)
    if t is None or mode.get(weight) is not None or mode.get(bias) is not None:
        return _norm(mode, func, args, kwargs)
    out, mean, rstd = outputs = mode.value(func, *args, **kwargs)
    mode.leave(mean, rstd)
    statistics = (running_mean, running_var, mean, rstd, training, eps, [True, False, False])
    t = aten.native_batch_norm_backward(t.contiguous(), x, None, *statistics)[0]
    mode.set(out, t if weight is None else t * _per_channel(weight, x))
    return outputs


@_rule(
    aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default, aten._batch_norm_with_update.default,
    aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_functional.default,
)  # fmt: skip
def _norm(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """PyTorch's formulas of layer and batch norm have zero tangents for the statistics."""
    outputs = formula(mode, func, args, kwargs)
    if mode.get(args[0]) is not None:
        mode.leave(*outputs[1:])
    return outputs


def _per_channel(weight: Tensor, x: Tensor) -> Tensor:
    return weight.view(1, -1, *(1,) * (x.dim() - 2))


@_rule(aten.native_dropout.default)
def _dropout(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, p, training = args
    t = mode.get(x)
    out, kept = outputs = mode.value(func, *args)
    if training is False:
        mode.set(out, None if t is None else t.clone())
    elif t is not None:
        mode.set(out, t * kept * (0.0 if p == 1 else 1 / (1 - p)))
    return outputs


# Attention, and the other operators of this library.


@_rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _torchs_attention(
    mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """For calls that `replace_sdpa` does not reach: C++, and recomputed blocks."""
    query, key, value, dropout_p, is_causal = (*args, 0.0, False)[:5] if len(args) < 5 else args
    if dropout_p != 0.0:
        return unknown(mode, func, args, kwargs)
    out, lse = func(*args, **kwargs)
    with torch.no_grad():
        tangents = [mode.get(x) for x in (query, key, value)]
        mask, scale = kwargs.get("attn_mask"), kwargs.get("scale")
        args = (query, key, value, *tangents, mask, is_causal)
        mode.set(out, ops.attention_jvp(*args, scale=scale)[1])
    return out, lse


def _attention(
    mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    query, key, value, mask, *rest = args
    if mode.get(mask) is not None:
        return _ours(mode, func, args, kwargs)
    tangents = (mode.get(x) for x in (query, key, value))
    found = torch.ops.pmf.attention_jvp_forward(query, key, value, *tangents, mask, *rest)
    out, lse, out_t, lse_t = found
    mode.set(out, out_t)
    mode.set(lse, lse_t)
    return out, lse


def _with_twin(twin: Callable[..., tuple[Tensor, Tensor]], primals: int) -> Rule:
    """A rule from a public function (primals, tangents, the rest) -> (value, tangent)."""

    def rule(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            out, out_t = twin(*args[:primals], *(mode.get(x) for x in args[:primals]), *args[primals:])
        mode.set(out, out_t)
        return out

    return rule


def _ours(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Use the tangent that the operator's Function defines for torch.func.jvp, or its reference's."""
    name = func._schema.name.partition("::")[2]
    function = next((f for f in functions.values() if getattr(f, "op", None) == name), None)
    if function is None:
        return unknown(mode, func, args, kwargs)
    out = func(*args, **kwargs)
    with torch.no_grad():
        tangents = function.Arguments(*(mode.get(x) for x in args))
        if any(getattr(tangents, name) is not None for name in function.by_reference):
            with mode:
                found = tuple(map(mode.get, function.reference(*args)))
        else:
            found = function.tangent(function.Arguments(*args), tangents)
    for value, tangent in zip((out,) if isinstance(out, Tensor) else out, found, strict=False):
        mode.set(value, tangent)
    return out


_OURS: dict[str, Rule] = {
    "attention_forward": _attention,
    "rms_norm": _with_twin(ops.rms_norm_jvp, 2),
    "swiglu": _with_twin(ops.swiglu_jvp, 2),
    "gated_residual": _with_twin(ops.gated_residual_jvp, 3),
    "product": lambda mode, func, args, kwargs: _product(mode, aten.mm.default, args, kwargs),
    "add_product": lambda mode, func, args, kwargs: _affine(mode, aten.addmm.default, args, kwargs),
}


# In-place operators.

_LINEAR_IN_PLACE = {aten.add_.Tensor, aten.sub_.Tensor}
_RANDOM = {
    aten.bernoulli_.float, aten.bernoulli_.Tensor, aten.normal_.default, aten.uniform_.default,
    aten.exponential_.default, aten.log_normal_.default, aten.cauchy_.default, aten.geometric_.default,
    aten.random_.default, aten.random_.to, getattr(aten.random_, "from"),
    aten.zero_.default, aten.fill_.Scalar,
}  # fmt: skip
_TURNING = {
    aten.transpose_.default, aten.t_.default, aten.unsqueeze_.default, aten.squeeze_.default,
    aten.squeeze_.dim, aten.squeeze_.dims, aten.swapaxes_.default, aten.swapdims_.default,
}  # fmt: skip


def _in_place(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, written = args[0] if args else None, [argument.is_write for argument in func._schema.arguments]
    if sum(written) != 1 or not written[0] or not isinstance(x, Tensor):
        return unknown(mode, func, args, kwargs)  # out=, and lists
    if func is aten.copy_.default:
        func(*args, **kwargs)
        mode.write(x, args[1])
    elif func in _RANDOM:
        func(*args, **kwargs)
        mode.write(x, None)
    elif func is aten.as_strided_.default:
        t = mode.get(x)
        assert t is not None
        t = _strided(t, *args, **kwargs)
        func(*args, **kwargs)
        mode.alias(x, t)
    elif torch.Tag.inplace_view in func.tags and func not in _TURNING:
        return unknown(mode, func, args, kwargs)  # set_ and resize_
    elif func in _TURNING:
        t = mode.get(x)
        func(*args, **kwargs)
        func(t, *args[1:], **kwargs)
        mode.alias(x, t)
    elif func in _LINEAR_IN_PLACE and mode.stored(x) is not None:
        func(*args, **kwargs)
        t, t_b = mode.both(x, args[1])
        if t_b is not None:
            func(t, t_b, **kwargs)
    else:
        if (pure := _pure(func)) is None:
            return unknown(mode, func, args, kwargs)
        new = mode.run(pure, args, kwargs)
        aten.copy_(x, new)
        mode.write(x, new)
    return x


@functools.cache
def _pure(func: Any) -> Any:
    """The operator that returns what one in place writes: its overload may have another name."""
    if not func._opname.endswith("_"):
        return None
    packet = getattr(aten, func._opname.removesuffix("_"), None)
    names = sorted(packet.overloads(), key=func._overloadname.__ne__) if packet is not None else []
    overloads = (getattr(packet, name) for name in names)
    return next((each for each in overloads if _types(each) == _types(func)), None)


def _types(func: Any) -> list[str]:
    return [str(argument.type) for argument in func._schema.arguments]


# Everything else.


def _composite(mode: TangentMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Under inference_mode PyTorch leaves decomposing operators to us."""
    with mode:
        return func.decompose(*args, **kwargs)
