"""The versions of the eager path that torch.compile traces; imported only while it traces."""

from typing import Any

import torch

from . import _dispatch

__all__ = ["apply", "in_func_jvp", "in_transform"]


@torch.compiler.allow_in_graph
def apply(name: str, by_kernel: bool, *args: Any) -> Any:
    """The eager path itself, as one graph node."""
    return _dispatch.apply(name, by_kernel, *args)


# Looked up while tracing, when the transforms to be compiled in are active.


@torch.compiler.assume_constant_result
def in_func_jvp() -> bool:
    """Whether a torch.func.jvp is being traced."""
    jvp = torch._C._functorch.TransformType.Jvp
    return any(t.key() == jvp for t in torch._C._functorch.get_interpreter_stack() or ())


@torch.compiler.assume_constant_result
def in_transform() -> bool:
    """Whether any transform of torch.func is being traced."""
    return torch._C._functorch.maybe_current_level() is not None
