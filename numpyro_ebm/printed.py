# SPDX-License-Identifier: Apache-2.0
"""Results that print on a few lines: numbers as they are, of arrays the shape."""

from typing import Any

import jax
import numpy as np

from numpyro_ebm._compat import not_jax_tracer

__all__ = ["brief"]

MAX_SHOWN = 8
"""As many elements of an array are printed."""


def brief(self: Any) -> str:
    """What a result says of itself, the ``__repr__`` of a ``NamedTuple`` with arrays in it.

    :param self: the ``NamedTuple``.
    :return: its name and its fields, numbers to four digits, long arrays by their shape.

    **Example**

    >>> from typing import NamedTuple
    >>> import jax.numpy as jnp
    >>> class Found(NamedTuple):
    ...     p_value: jnp.ndarray
    ...     by_row: jnp.ndarray
    ...     __repr__ = brief
    >>> Found(jnp.array(0.1234567), jnp.zeros((150, 2)))
    Found(p_value=0.1235, by_row=<array (150, 2)>)
    """
    fields = self._asdict().items()
    return f"{type(self).__name__}({', '.join(f'{k}={_shown(x)}' for k, x in fields)})"


def _shown(x):
    if isinstance(x, dict):
        return "{" + ", ".join(f"{k!r}: {_shown(value)}" for k, value in x.items()) + "}"
    if isinstance(x, float):
        return f"{x:.4g}"
    if not isinstance(x, jax.Array | np.ndarray | np.generic) or not not_jax_tracer(x):
        return repr(x)  # shapes too, of which programs are known
    if np.size(x) > MAX_SHOWN or not np.issubdtype(x.dtype, np.number):
        return f"<array {np.shape(x)}>"
    found = np.asarray(x)
    numbers = [f"{number:.4g}" for number in np.ravel(found).tolist()]
    return numbers[0] if found.ndim == 0 else f"[{', '.join(numbers)}]"
