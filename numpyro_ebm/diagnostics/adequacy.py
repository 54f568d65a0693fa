# SPDX-License-Identifier: Apache-2.0
r"""Whether the auxiliary chains of the exchange algorithm are long enough.

.. math:: d_t = \log\tilde p(y_n; θ') - \log\tilde p(y_{n/2}; θ'), \qquad E[d_t \mid θ'] = 0

if a chain of n steps has arrived at p(· | θ') after half of them. One that still remembers the data
goes on towards θ', further the further θ' is: d has a mean, or a slope in θ'.
"""

import warnings
from typing import NamedTuple

import numpy as np
from numpyro.infer import MCMC
from scipy.special import chdtrc

from numpyro_ebm.errors import ModelError, ShortAuxiliaryWarning

__all__ = ["AuxiliaryAdequacy", "auxiliary_adequacy"]

P_VALUE = 1e-3  # a drift below is no chance
MOST_SDS = 0.1  # and one beyond matters


class AuxiliaryAdequacy(NamedTuple):
    """What :func:`auxiliary_adequacy` found.

    - **drift** - root mean square of the systematic change of log p̃(y; θ') from half way to the
      end of the auxiliary chains, as a linear function of θ', in nats a row.
    - **sds** - ``drift`` in standard deviations of log p̃(y; θ') at a given θ'.
    - **statistic** - Wald statistic of no systematic change.
    - **p_value** - of ``statistic``, by its χ² law for many draws.
    - **ratio_drift** - mean change of log p̃(y; θ') - log p̃(y; θ) over the same steps: by so many
      nats the log of the acceptance ratio still moved, on average.
    - **ratio_error** - its standard error.
    - **is_adequate** - whether the p-value is above 0.001, or ``sds`` below 0.1.
    """

    drift: float
    sds: float
    statistic: float
    p_value: float
    ratio_drift: float
    ratio_error: float
    is_adequate: bool


def auxiliary_adequacy(mcmc: MCMC) -> AuxiliaryAdequacy:
    """Judge by the draws of a run whether ``num_auxiliary_steps`` of ``Exchange`` is enough.

    It sees a chain that is on its way. One that is stuck in a mode for much longer than its length
    does not move, and no drift tells: there, start from elsewhere, or use
    :class:`~numpyro_ebm.ReplicaExchange` as ``auxiliary``.

    :param mcmc: a NumPyro ``MCMC`` that has run :class:`~numpyro_ebm.Exchange`, or a ``Gibbs`` with
        such a block *i* and ``extra_fields=["block_states.i.auxiliary"]``.
    :return: :class:`AuxiliaryAdequacy`.
    :raises ModelError: if the run has not collected the field, or what it collected is not finite.
    :warns ShortAuxiliaryWarning: if the steps are too few.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro.distributions as dist
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def model(data):
    ...     precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> kernel = ebm.Exchange(model, lambda m: ebm.MALA(m, step_size=0.5), 20, step_size=0.3)
    >>> mcmc = MCMC(kernel, num_warmup=0, num_samples=200, progress_bar=False)
    >>> mcmc.run(jax.random.key(1), jnp.linspace(-2.0, 2.0, 50))
    >>> ebm.auxiliary_adequacy(mcmc).is_adequate
    True
    """
    fields = mcmc.get_extra_fields(group_by_chain=True)
    found = [x for name, x in fields.items() if name.split(".")[-1] == "auxiliary"]
    if len(found) != 1:
        raise ModelError(
            f"auxiliary_adequacy: needs one field `auxiliary`, and the run collected {list(fields)}"
            '. Under `Gibbs` pass `extra_fields=["block_states.0.auxiliary"]` to `mcmc.run`, with '
            "the number of the block."
        )
    (trace,) = found
    drift, sds, statistic, p_value = _systematic_change(trace)
    ratio = np.asarray(trace.log_ratio, float)
    moved = _finite(ratio[:, :, 2] - ratio[:, :, 1]).ravel()
    is_adequate = bool(p_value > P_VALUE or sds < MOST_SDS)
    error = float(moved.std() / np.sqrt(moved.size))
    result = AuxiliaryAdequacy(
        drift, sds, statistic, p_value, float(moved.mean()), error, is_adequate
    )
    if not is_adequate:
        warnings.warn(
            ShortAuxiliaryWarning(
                "The auxiliary chains are too short: from half way to their end log p̃(y; θ') still "
                f"drifts by {sds:.2g} of its standard deviations (p-value {p_value:.2g}), so that "
                "fictitious data resemble the data more than draws at θ' would, and the posterior "
                "is wrong. Increase `num_auxiliary_steps`."
            ),
            stacklevel=2,
        )
    return result


def _systematic_change(trace):
    """Regression of the change of log p̃(y; θ') from half way to the end on θ'.

    Every auxiliary chain is run afresh, so that given θ' the changes are independent; their
    variance may depend on θ' (the Wald statistic has White's covariance).
    """
    density = np.asarray(trace.log_density, float)
    change = _finite(density[:, :, 2] - density[:, :, 1])
    theta = np.asarray(trace.proposal, float)
    theta = theta.reshape(*change.shape, -1)
    if change.ndim == 2:  # without groups: one
        change, theta = change[:, :, None], theta[:, :, None]
    if not change.any():  # exact draws
        return 0.0, 0.0, 0.0, 1.0
    statistic, fitted, left, degrees = 0.0, [], [], 0
    for group in range(change.shape[2]):
        y = change[:, :, group].ravel()
        x = theta[:, :, group].reshape(y.size, -1)
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-30)
        x = np.concatenate([np.ones((y.size, 1)), x], 1)
        if y.size < 10 * x.shape[1]:
            raise ModelError(
                f"auxiliary_adequacy: {y.size} draws are too few for {x.shape[1] - 1} parameters."
            )
        inverse = np.linalg.pinv(x.T @ x)
        slope = inverse @ (x.T @ y)
        rest = y - x @ slope
        covariance = inverse @ (x.T * rest**2) @ x @ inverse
        statistic += float(slope @ np.linalg.pinv(covariance) @ slope)
        fitted.append(x @ slope)
        left.append(rest)
        degrees += x.shape[1]
    drift = float(np.sqrt(np.mean(np.square(fitted))))
    # Half way and at the end the chain is as good as independent, if it is long enough.
    sds = drift / max(float(np.sqrt(np.mean(np.square(left)) / 2)), 1e-30)
    return drift, sds, statistic, float(chdtrc(degrees, statistic))


def _finite(change):
    if not np.isfinite(change).all():
        raise ModelError(
            f"auxiliary_adequacy: {np.sum(~np.isfinite(change))} of {change.size} log-densities of "
            "fictitious data are not finite."
        )
    return change
