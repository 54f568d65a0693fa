# SPDX-License-Identifier: Apache-2.0
"""Draw the visible and latent sites of a fixed model in one call."""

import math

import jax
from jax import lax
from numpyro.infer import MCMC, DiscreteGibbs, Gibbs, Predictive

from numpyro_ebm.errors import ModelError
from numpyro_ebm.infer.kernels import MALA
from numpyro_ebm.joint import read_fixed
from numpyro_ebm.marginal.enumerated import (
    Enumerated,
    event_states,
    factorises,
    state_log_densities,
    unit_logits,
)

__all__ = ["sample"]


def sample(
    rng_key,
    model,
    num_samples,
    *args,
    kernel=None,
    num_chains=None,
    num_warmup=500,
    thinning=10,
    init_params=None,
    progress_bar=False,
    **kwargs,
):
    r"""Draw all unobserved sites of a fixed energy-based model.

    .. math:: (v, h) \sim p(v, h) \propto \tilde p(v, h; θ)

    Many short chains run side by side. What moves them follows from the supports: continuous sites
    by :class:`~numpyro_ebm.MALA` on their marginal, after which discrete sites are drawn from their
    exact conditional; where the discrete sites are too many to be summed out, ``MALA`` and
    NumPyro's ``DiscreteGibbs`` take turns in ``Gibbs``; all-discrete models are drawn exactly if
    they can be enumerated, else by ``DiscreteGibbs``.

    :param rng_key: random key.
    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param int num_samples: number of draws.
    :param args: arguments of the model.
    :param kernel: a NumPyro ``MCMCKernel`` on ``model`` to use instead.
    :param int num_chains: number of chains; the smaller of ``num_samples`` and 100 if ``None``.
    :param int num_warmup: warm-up steps of each chain.
    :param int thinning: steps between two draws of a chain.
    :param init_params: initial unconstrained values, chains leading.
    :param bool progress_bar: show NumPyro's progress bar.
    :param kwargs: keyword arguments of the model.
    :return: dict of sites, of shape (num_samples, rows, ...) each, draws leading.
    :raises ModelError: if the model has free parameters or nothing to sample, or the numbers are
        not positive integers.

    .. note:: Draws of one chain are dependent, and separated modes may be out of its reach: for
       diagnostics run ``MCMC`` with several chains and look at R-hat and the effective sample size.

    **Example**

    >>> import jax.numpy as jnp
    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)}
    >>> draws = ebm.sample(jax.random.key(0), ebm.fixed(ebm.models.grbm, params), 200)
    >>> draws["v"].shape, draws["h"].shape
    ((200, 1, 2), (200, 1, 4))
    """
    for name, number in (("num_samples", num_samples), ("thinning", thinning)):
        if not isinstance(number, int) or number < 1:
            raise ModelError(f"sample: `{name}` must be a positive integer, got {number!r}.")
    num_chains = min(num_samples, 100) if num_chains is None else num_chains
    key_chains, key_discrete = jax.random.split(rng_key)
    joint = read_fixed(model, args, kwargs)
    enumerable = _enumerable(joint)
    if kernel is None and not joint.visible and enumerable and _all_event(joint):
        keys = jax.random.split(key_discrete, num_samples)
        return lax.map(lambda key: _draw_event_sites(key, joint, {}), keys)
    if kernel is None:
        kernel = _compose(model, joint, enumerable)
    vectorized = not isinstance(kernel, Gibbs | DiscreteGibbs)
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=math.ceil(num_samples / num_chains) * thinning,
        thinning=thinning,
        num_chains=num_chains,
        chain_method="vectorized" if vectorized else jax.vmap,
        progress_bar=progress_bar and vectorized,
    )
    mcmc.run(key_chains, *args, init_params=init_params, **kwargs)
    draws = {name: x[:num_samples] for name, x in mcmc.get_samples().items()}
    missing = [name for name in joint.latent if name not in draws]
    if missing:
        draws = _draw_discrete(key_discrete, model, joint, draws, args, kwargs)
    return draws


def _enumerable(joint):
    try:
        Enumerated().check(joint, None, 1)
    except ModelError:
        return False
    return True


def _all_event(joint):
    return all(site.fn.event_shape for site in joint.latent.values())


def _compose(model, joint, enumerable):
    """The kernel for the supports at hand."""
    if not joint.visible:
        return DiscreteGibbs(model)
    if not joint.latent or enumerable:
        return MALA(model)
    return Gibbs(
        [(MALA(model), sorted(joint.visible)), (DiscreteGibbs(model), sorted(joint.latent))]
    )


def _draw_discrete(rng_key, model, joint, draws, args, kwargs):
    """Draw the enumerated sites from their exact conditional, given draws of the others."""
    key_event, key_scalar = jax.random.split(rng_key)
    num_samples = len(next(iter(draws.values())))
    values = {name: draws[name] for name in joint.visible}
    if any(site.fn.event_shape for site in joint.latent.values()):
        keys = jax.random.split(key_event, num_samples)
        # One draw at a time: all states of all rows are in memory at once.
        event = lax.map(lambda x: _draw_event_sites(x[0], joint, x[1]), (keys, values))
        draws, values = {**draws, **event}, {**values, **event}
    if any(not site.fn.event_shape for site in joint.latent.values()):
        predictive = Predictive(model, values, infer_discrete=True, parallel=True)
        predicted = predictive(key_scalar, *args, **kwargs)
        draws = {**draws, **{name: predicted[name] for name in joint.latent if name not in values}}
    return draws


def _draw_event_sites(rng_key, joint, values):
    """One exact draw of the latent sites with event dimensions, given the continuous sites."""
    if factorises(joint):
        _, logits = unit_logits(joint, {}, values)
        keys = jax.random.split(rng_key, len(logits))
        return {
            name: jax.random.bernoulli(key, jax.nn.sigmoid(x)).astype(
                joint.latent[name].value.dtype
            )
            for key, (name, x) in zip(keys, logits.items(), strict=True)
        }
    states = event_states(joint)
    logits = state_log_densities(joint, {}, values, states)
    chosen = jax.random.categorical(rng_key, logits, axis=0)  # (rows,)
    return {name: x[chosen].astype(joint.latent[name].value.dtype) for name, x in states.items()}
