# SPDX-License-Identifier: Apache-2.0
"""What the statements of the language ask the handlers around them."""

from collections.abc import Callable
from typing import Any

from numpyro_ebm._compat import apply_stack, handler_stack, is_inspected

__all__ = ["INVERSE_TEMPERATURE", "NORMALIZER", "ask", "who_resolves"]

NORMALIZER = "energy_normalizer"
"""Type of the message by which an energy asks the handlers around it whether log Z is resolved."""

INVERSE_TEMPERATURE = "energy_inverse_temperature"
"""Type of the message by which an energy asks the handlers around it for a factor."""


def ask(kind: str, default: Callable[[], Any] = lambda: None) -> Any:
    """The answer of the handlers around a statement; ``default()`` if none has one."""
    message = {"type": kind, "fn": default, "args": (), "kwargs": {}, "value": None}
    return apply_stack(message)["value"]


def who_resolves() -> str | None:
    """The handler that resolves the normalizer here; ``None`` if there is none."""
    return ask(NORMALIZER, _under_inspection) if handler_stack else "outside of a model"


def _under_inspection():
    """`render_model` evaluates densities for their dependencies, and never uses their values."""
    return "inspection" if is_inspected() else None
