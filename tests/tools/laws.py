# SPDX-License-Identifier: Apache-2.0
"""What is asked of a tool: numbers, from a model and a key, that its peer gives as well."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.funsor import config_enumerate, enum, infer_discrete
from numpyro.contrib.funsor import log_density as enumerated_log_density
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import (
    MCMC,
    SVI,
    Predictive,
    Trace_ELBO,
    init_to_mean,
    init_to_uniform,
    initialize_model,
    log_likelihood,
    psis_diagnostic,
)
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

KEY = jax.random.key(17)


def latent(model, key=KEY):
    """Values of the latent sites of a model, drawn with one key."""

    def draw(key):
        sites = trace(substitute(seed(model, key), substitute_fn=_start)).get_trace()
        return {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] == "sample" and not site["is_observed"]
        }

    return jax.jit(draw)(key)


def _start(site):
    """A value for a site that may be improper; others that no transform reaches are drawn."""
    try:
        return init_to_uniform(site)
    except (NotImplementedError, ValueError):
        return None


def density(handle):
    """log-density of a handled model at draws of its latent sites, and its gradient."""

    def law(model):
        handled = seed(handle(model), KEY)
        values = latent(handled)
        discrete = {k: x for k, x in values.items() if not jnp.issubdtype(x.dtype, jnp.floating)}
        real = {k: x for k, x in values.items() if k not in discrete}

        def value(real):
            return log_density(handled, (), {}, {**discrete, **real})[0]

        return values, jax.jit(jax.value_and_grad(value))(real)

    return law


def enumerated(model):
    """The density where discrete sites are summed out."""
    values = latent(model)
    values.pop("k")
    model = enum(config_enumerate(seed(model, KEY)), -2)
    return jax.jit(lambda x: enumerated_log_density(model, (), {}, x)[0])(values)


def steps(make, *, num=4, chains=1):
    """Draws of a few steps of a kernel."""

    def law(model):
        mcmc = MCMC(
            make(model),
            num_warmup=num,
            num_samples=num,
            num_chains=chains,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(KEY)
        return mcmc.get_samples()

    return law


def updates(make_guide=None, loss=None, *, num=2, optim=None):
    """Losses of a few updates of SVI, and the parameters after them."""

    def law(model):
        guide = by_hand(model) if make_guide is None else make_guide(model)
        if make_guide is None:
            model = config_enumerate(model)
        optim_ = numpyro.optim.SGD(1e-3) if optim is None else optim
        svi = SVI(model, guide, optim_, Trace_ELBO() if loss is None else loss())
        state = svi.init(KEY)
        _, losses = jax.lax.scan(lambda state, _: svi.update(state), state, length=num)
        return losses

    def by_hand(model):
        size = jnp.size(latent(model)["b"])  # one for all rows, or one for each

        def guide():
            scale = numpyro.param("guide_scale", 0.3, constraint=dist.constraints.positive)
            b = dist.Normal(numpyro.param("guide_loc", 0.5), scale)
            with numpyro.plate("data", size) if size > 1 else nullcontext():
                numpyro.sample("b", b)

        return guide

    return law


def started(strategy):
    """Where chains start, in unconstrained coordinates."""

    def law(model):
        return initialize_model(KEY, model, init_strategy=strategy).param_info

    return law


def predicted(model, only=None, **options):
    draws = {k: jnp.stack([x, x + 0.1]) for k, x in latent(model).items() if only in (None, k)}
    found = Predictive(model, draws, **options)(KEY)
    return {k: x for k, x in found.items() if k in latent(model)}


def drawn(model):
    """Draws of the prior."""
    return {k: x for k, x in Predictive(model, num_samples=3)(KEY).items() if k in latent(model)}


def conditioned(model, name, value):
    return numpyro.handlers.condition(model, {name: _like(model, name, value)})


def intervened(model, name, value):
    return numpyro.handlers.do(model, {name: _like(model, name, value)})


def substituted(model, name, value):
    return substitute(model, {name: _like(model, name, value)})


def _like(model, name, value):
    return jnp.full_like(latent(model)[name], value)


def of_latent(fn):
    """A function of a model and of values of its latent sites, unconstrained."""

    def law(model):
        values = {k: 0.1 * jnp.ones_like(x) for k, x in latent(model).items()}
        return jax.jit(lambda x: fn(seed(model, KEY), x))(values)

    return law


def likelihoods(model):
    draws = {k: jnp.stack([x, x + 0.1]) for k, x in latent(model).items()}
    found = log_likelihood(seed(model, KEY), draws)
    return {"v": found["v"] + found.get("E", 0.0)}


def inferred(model):
    """Draws of discrete sites given the others."""
    given = {"b": latent(model)["b"]}
    model = config_enumerate(substitute(seed(model, KEY), data=given))
    drawn = infer_discrete(model, first_available_dim=-2, rng_key=KEY)
    return trace(drawn).get_trace()["k"]["value"]


def psis(model):
    guide = AutoNormal(model, init_loc_fn=init_to_mean)
    svi = SVI(model, guide, numpyro.optim.SGD(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(KEY))
    return psis_diagnostic(KEY, params, model, guide, num_particles=50)


def trained(model, guide, make_svi, params=None, *, num=4_000):
    """Losses and gradients of many single updates from one point, at different keys.

    :param make_svi: (model, guide, optimiser) -> SVI.
    :return: the parameters at the point, the losses, and the gradients by name.
    """
    svi = make_svi(model, guide, numpyro.optim.SGD(1.0))
    state = svi.init(KEY, init_params=params)
    before = svi.optim.get_params(state.optim_state)

    def update(key):
        after, loss = svi.update(state._replace(rng_key=key))
        moved = svi.optim.get_params(after.optim_state)
        return loss, jax.tree.map(jnp.subtract, before, moved)

    losses, gradients = jax.jit(jax.vmap(update))(jax.random.split(KEY, num))
    return svi.get_params(state), losses, gradients
