"""Whether torch.compile can generate machine code here."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch


@functools.cache
def why_not() -> str:
    """Why Inductor cannot run; None if it can."""
    try:
        torch.compile(torch.sin)(torch.zeros(2))
    except Exception as error:  # any failure of a missing, old or broken compiler
        return f"Inductor cannot compile here: {str(error).splitlines()[0]}"
    return ""


def requires_inductor(test: Callable[..., Any]) -> Callable[..., Any]:
    """Skip the test, with the reason, where Inductor has no compiler. Looked up when the test runs."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if reason := why_not():
            pytest.skip(reason)
        return test(*args, **kwargs)

    return wrapper
