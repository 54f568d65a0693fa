# SPDX-License-Identifier: Apache-2.0
"""An estimate of log Z, with its error."""

from typing import Any, Literal, NamedTuple

import jax

from numpyro_ebm.printed import brief

__all__ = ["LogNormalizer"]


class LogNormalizer(NamedTuple):
    """An estimate of log Z(θ).

    - **value** - the estimate, in nats, for one row; of shape (rows,) where every row has its own.
    - **mcse** - its standard error; 0 where it is exact, and for a quadrature what the last
      doubling of the nodes changed.
    - **ess** - effective sample size behind it; infinite where it is exact.
    - **method** - how it was found.
    - **bias** - direction of its bias: ``"none"``; ``"below"`` where it is too small in
      expectation, so that log-likelihoods are too large; ``"unknown"`` otherwise.
    - **diagnostics** - dict of what else the method has to tell, or ``None``.

    **Example**

    >>> from numpyro_ebm.log_normalizers import LogNormalizer
    >>> LogNormalizer(value=0.919, mcse=0.01, ess=9_800.0, method="NCE").method
    'NCE'
    """

    value: jax.Array | float
    mcse: jax.Array | float
    ess: jax.Array | float
    method: str
    bias: Literal["none", "below", "unknown"] = "unknown"
    diagnostics: dict[str, Any] | None = None

    __repr__ = brief
