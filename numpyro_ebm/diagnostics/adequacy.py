# SPDX-License-Identifier: Apache-2.0
r"""Whether the auxiliary chains of the exchange algorithm are long enough.

A chain of n steps that starts at the data x is long enough if its end y has forgotten them. Three
means vanish if it has arrived at p(· | θ') after half of its steps, and one ratio is at most 1:

.. math::
    E[\log\tilde p(y_n; θ') - \log\tilde p(y_{n/2}; θ') \mid θ'] = 0, \qquad
    E[\log r(y_n) - \log r(y_{n/2})] = 0, \qquad
    E[(x - \bar x) \cdot (y_n - y_{n/2})] = 0

.. math:: R = \frac{E|y - y'|^2}{E|y - x|^2}

with r the ratio of p̃ at θ' and at θ, and y' the fictitious data of another step. The posterior is
that of the proposals that can be accepted: each counts by the product of its acceptance with
y_n and with y_n/2, which leaves the means at zero, since the two are exchangeable then. Where a
proposal was accepted with one and not with the other, a fourth mean tells, of what the posterior
depends on:

.. math:: E[\min(1, r(x) / r(y_n)) - \min(1, r(x) / r(y_{n/2})) \mid θ'] = 0

So chains that lag where they are rejected anyhow, as those of networks at parameters of the dense
phase, are not called too short. A chain that
keeps a correlation ρ with its start has R = 1 + ρ, up to 2 for one that hardly moves; data that the
model does not fit make R smaller, and few data that lie at their mean make it larger. There
the movement

.. math:: M = E\Big[\frac{2 |y_n - y_{n/2}|^2}{|y_n - y_{n/2}|^2 + |y_n - y'|^2}\Big]

decides: 1 for a chain that forgets in half of its steps, 0.4 or less for one that hardly moves.
"""

import logging
import warnings
from typing import NamedTuple

import numpy as np
from numpyro.infer import MCMC
from scipy.special import chdtrc

from numpyro_ebm.diagnostics.heteroscedastic_regression import regress
from numpyro_ebm.diagnostics.prior_widths import median_width, prior_widths
from numpyro_ebm.diagnostics.reading import check_has_run
from numpyro_ebm.errors import ModelError, ShortAuxiliaryWarning
from numpyro_ebm.signatures import explaining

__all__ = ["AuxiliaryAdequacy", "auxiliary_adequacy"]

logger = logging.getLogger(__name__)

P_VALUE = 0.05  # of any of the four means
MOST_SDS = 0.1  # a drift beyond matters,
MOST_CHANGE = 0.1  # and one of the acceptance, as a part of it,
MOST_CORRELATION = 0.1  # and so does a memory of the data
STUCK = 0.5  # beyond, no test is needed, unless the movement is
LEAST_MOVEMENT = 0.75  # or more: right runs of tests/posteriors/test_adequacy.py have 0.87 to 1.01,
# steps of a sixtieth of the right size 0.48 to 0.53, and frozen chains up to 0.03
AS_WIDE = 0.8  # as the prior: of the median parameter


class AuxiliaryAdequacy(NamedTuple):
    """What :func:`auxiliary_adequacy` found.

    - **drift** - root mean square of the systematic change of log p̃(y; θ') from half way to the
      end of the auxiliary chains, as a linear function of θ', in nats a row.
    - **sds** - ``drift`` in standard deviations of log p̃(y; θ') at a given θ'.
    - **statistic** - Wald statistic of no systematic change.
    - **ratio_drift** - mean change of log p̃(y; θ') - log p̃(y; θ) over the same steps: by so many
      nats the log of the acceptance ratio still moved, on average.
    - **ratio_error** - its standard error.
    - **acceptance_drift** - root mean square of the systematic change of the acceptance, as a
      linear function of θ', less what noise makes of it, in units of the mean acceptance.
    - **recoil** - mean move from half way to the end along what sets the data apart from their
      mean, in units of its square: negative while the data are being forgotten.
    - **recoil_error** - its standard error.
    - **correlation** - of fictitious data with the data they start at, R - 1, between 0 and 1.
    - **movement** - M, how far y moves from half way to the end beside the way to that of another
      step: about 1, or less for a chain that is stuck.
    - **accept_prob** - mean acceptance of the auxiliary chains; NaN if their kernel reports none.
    - **step_size** - the median of their step sizes; NaN if their kernel has none.
    - **widths** - dict of the widths of the posterior in units of those of the prior, of every
      parameter (the central 68 % of either): 1 where the data say nothing, and where the auxiliary
      chains stay at the data.
    - **p_value** - of the four means together, by Bonferroni's inequality.
    - **is_adequate** - whether ``p_value`` is above 0.05, or ``sds``, ``acceptance_drift`` and
      ``correlation`` are below 0.1; never if ``movement`` is below 0.75 and ``correlation`` above
      0.5, or above 0.1 and the median of the ``widths`` above 0.8.
    """

    drift: float
    sds: float
    statistic: float
    ratio_drift: float
    ratio_error: float
    acceptance_drift: float
    recoil: float
    recoil_error: float
    correlation: float
    movement: float
    accept_prob: float
    step_size: float
    widths: dict[str, np.ndarray]
    p_value: float
    is_adequate: bool

    def __str__(self) -> str:
        """A line for each question."""
        kernel = {"acceptance": self.accept_prob, "step size": self.step_size}
        told = ", ".join(f"{name} {x:.3g}" for name, x in kernel.items() if not np.isnan(x))
        widths = ", ".join(f"{np.median(x):.2g} for '{k}'" for k, x in self.widths.items())
        lines = {
            "adequate": f"{'yes' if self.is_adequate else 'no'} (p-value {self.p_value:.2g})",
            "drift of energies": f"{self.sds:.2g} of their standard deviations",
            "of the log ratio": f"{self.ratio_drift:.2g} ± {self.ratio_error:.1g} nats",
            "of the acceptance": f"{self.acceptance_drift:.2g} of its mean",
            "memory of the data": f"correlation {self.correlation:.2g}",
            "movement": f"{self.movement:.2f} of that of other steps",
            "kernel": told or "tells nothing",
            "posterior by prior": f"width {widths}",
        }
        return "\n".join(f"{name:20}{line}" for name, line in lines.items())


@explaining
def auxiliary_adequacy(mcmc: MCMC) -> AuxiliaryAdequacy:
    """Judge by the draws of a run whether ``num_auxiliary_steps`` of ``Exchange`` is enough.

    It sees a chain that is on its way. One that is stuck in a mode for much longer than its length
    does not move, and no drift tells: there, start from elsewhere, or use
    :class:`~numpyro_ebm.ReplicaExchange` as ``auxiliary``.

    :param mcmc: a NumPyro ``MCMC`` that has run :class:`~numpyro_ebm.Exchange`, or a ``Gibbs`` with
        such a block *i* and ``extra_fields=["block_states.i.auxiliary"]``.
    :return: :class:`AuxiliaryAdequacy`.
    :raises ModelError: if the run has not collected the field, or what it collected is not finite.

    Warns :class:`~numpyro_ebm.ShortAuxiliaryWarning` if the steps are too few.

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
    check_has_run("auxiliary_adequacy", mcmc)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    found = [(name, x) for name, x in fields.items() if name.split(".")[-1] == "auxiliary"]
    if len(found) != 1:
        raise ModelError(
            f"auxiliary_adequacy: needs one field `auxiliary`, and the run collected {list(fields)}"
            '. Under `Gibbs` pass `extra_fields=["block_states.0.auxiliary"]` to `mcmc.run`, with '
            "the number of the block."
        )
    ((name, trace),) = found
    ratio = np.asarray(trace.log_ratio, float)
    accepted = np.exp(np.minimum(ratio[:, :, :1] - ratio[:, :, 1:], 0.0))
    weight = _accepted_weights(accepted)
    drift, sds, statistic, p_drift = _systematic_change(trace, weight)
    ratio_drift, ratio_error, p_ratio = _mean(ratio[:, :, 2] - ratio[:, :, 1], weight)
    acceptance_drift, p_accepted = _change_of_acceptance(trace, accepted)
    recoil, recoil_error, p_recoil = _mean(trace.recoil, weight)
    correlation, movement = _correlation(trace), _movement(trace)
    widths = prior_widths(mcmc, _block(mcmc.sampler, name))
    p_value = min(1.0, 4 * min(p_drift, p_ratio, p_accepted, p_recoil))
    is_small = sds < MOST_SDS and acceptance_drift < MOST_CHANGE and correlation < MOST_CORRELATION
    most = MOST_CORRELATION if median_width(widths) > AS_WIDE else STUCK
    is_stuck = correlation > most and movement < LEAST_MOVEMENT
    result = AuxiliaryAdequacy(
        drift,
        sds,
        statistic,
        ratio_drift,
        ratio_error,
        acceptance_drift,
        recoil,
        recoil_error,
        correlation,
        movement,
        float(np.mean(trace.accept_prob)),
        float(np.mean(trace.step_size)),
        widths,
        p_value,
        bool((p_value > P_VALUE or is_small) and not is_stuck),
    )
    if not result.is_adequate:
        said = f"{_complaint(result, is_stuck)}{_sentence(widths)}"
        warnings.warn(ShortAuxiliaryWarning(said), stacklevel=2)
    elif median_width(widths) > AS_WIDE:
        logger.info(
            "auxiliary_adequacy: the auxiliary chains move (%.2f), and the data say little.%s",
            movement,
            _sentence(widths),
        )
    return result


def _block(kernel, field):
    """The kernel of a field of the state, which may be that of a block of ``Gibbs``."""
    for part in field.split("."):
        kernel = kernel.blocks[int(part)][0] if part.isdigit() else kernel
    return kernel


def _sentence(widths):
    """A posterior as wide as its prior, in words."""
    if median_width(widths) <= AS_WIDE:
        return ""
    ratios = ", ".join(f"{np.median(x):.2f} for '{name}'" for name, x in widths.items())
    return f" The draws are as wide as the prior, by a ratio of {ratios}."


def _complaint(found, is_stuck):
    if is_stuck:
        accepted = "" if np.isnan(found.accept_prob) else f" (acceptance {found.accept_prob:.2g})"
        return (
            "The auxiliary chains hardly move: fictitious data keep a correlation of "
            f"{found.correlation:.2f} with the data they start at{accepted}. Where they stay, the "
            "data cancel out of the acceptance ratio, and the draws are those of the prior. Let "
            "the warm-up find the step size of the auxiliary kernel (`adapt_step_size=True`, "
            "`num_warmup` > 0), or increase `num_auxiliary_steps`."
        )
    return (
        "The auxiliary chains are too short: from half way to their end log p̃(y; θ') still drifts "
        f"by {found.sds:.2g} of its standard deviations, the log of the acceptance ratio by "
        f"{found.ratio_drift:.2g} ± {found.ratio_error:.1g} nats, and fictitious data keep a "
        f"correlation of {found.correlation:.2f} with the data they start at (p-value "
        f"{found.p_value:.2g}). They resemble the data more than draws at θ' would, and the "
        "posterior is wrong. Increase `num_auxiliary_steps`."
    )


def _accepted_weights(accepted):
    """Products of two acceptances, of mean 1; all 1 where nothing could be accepted."""
    product = accepted[:, :, 0] * accepted[:, :, 1]
    mean = product.mean((0, 1))
    return np.where(mean > 0, product / np.where(mean > 0, mean, 1.0), 1.0)


def _mean(x, weight):
    """Mean of what is 0 on average in each step, its standard error, and a p-value."""
    x = (_finite(np.asarray(x, float)) * weight).ravel()
    mean, error = float(x.mean()), float(x.std(ddof=1) / np.sqrt(x.size))
    return mean, error, float(chdtrc(1, (mean / error) ** 2)) if error > 0 else 1.0


def _correlation(trace):
    """R - 1, the least memory of the data with which fictitious data are so far from them."""
    distance, spread = (
        float(np.mean(_finite(np.asarray(x, float)))) for x in (trace.distance, trace.spread)
    )
    return min(max(spread / distance - 1.0, 0.0), 1.0) if distance > 0 else 1.0


def _movement(trace):
    """M, a mean of what is bounded: a few long jumps are no movement."""
    moved, spread = (_finite(np.asarray(x, float)) for x in (trace.movement, trace.spread))
    return float(np.mean(2 * moved / np.maximum(moved + spread, np.finfo(float).tiny)))


def _systematic_change(trace, weight):
    """Regression of the change of log p̃(y; θ') from half way to the end on θ'."""
    density = np.asarray(trace.log_density, float)
    change = _finite(density[:, :, 2] - density[:, :, 1])
    if not change.any():  # exact draws
        return 0.0, 0.0, 0.0, 1.0
    fitted, left, statistic, degrees = regress(change, trace.proposal, weight)
    drift = float(np.sqrt(np.mean(fitted)))
    # Half way and at the end the chain is as good as independent, if it is long enough.
    sds = drift / max(float(np.sqrt(np.mean(left) / 2)), 1e-30)
    return drift, sds, statistic, float(chdtrc(degrees, statistic))


def _change_of_acceptance(trace, accepted):
    """Regression of the change of the acceptance on θ'."""
    change = accepted[:, :, 1] - accepted[:, :, 0]
    if not change.any():
        return 0.0, 1.0
    fitted, left, statistic, degrees = regress(change, trace.proposal, np.ones(change.shape))
    noise = np.mean(left) * degrees / change.size
    drift = float(np.sqrt(max(np.mean(fitted) - noise, 0.0)) / accepted.mean())
    return drift, float(chdtrc(degrees, statistic))


def _finite(change):
    if not np.isfinite(change).all():
        raise ModelError(
            f"auxiliary_adequacy: {np.sum(~np.isfinite(change))} of {change.size} log-densities of "
            "fictitious data are not finite."
        )
    return change
