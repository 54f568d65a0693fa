# SPDX-License-Identifier: Apache-2.0
"""What the tests of marginals share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from oracles import flat, jit

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.marginals import choose
from numpyro_ebm.model.reading import read_model


def bound(marginal, system, rng_key, params, *, order=2, data=None):
    """A marginal at the data of a system: the estimate, and the point in rows."""
    data = jnp.asarray(system.data if data is None else data)
    row_model = read_model(system.model, (data,), {}, params)
    guide = None if system.guide is None else Guide(system.guide, row_model, (data,), {})
    point = row_model.unconstrain_visible()
    return marginal.bind(rng_key, row_model, guide, params, point, order=order), point


W = np.array([[1.0, -0.7], [0.4, 0.9]])


def bowl(v):
    return 0.5 * jnp.sum(v**2, -1)


def grbm_log_joint(p, v, h):
    field = (v @ p["W"] + p["c"]) @ h
    return field - 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2, -1)


DATA = np.random.default_rng(3).normal(size=(3, 2))


def lateral_in_a_plate(data):
    """The energy couples the units of a plate from outside of it: no product of sums."""
    with numpyro.plate("data", len(data), dim=-1):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        with numpyro.plate("hidden", 2, dim=-2):
            h = numpyro.sample("h", ebm.Counting())
        ebm.energy("E", bowl(v) - jnp.sum(h * (v @ W).T, -2))


def estimates(marginal, system, order):
    """What a marginal says of the score, its gradient, and the same of the Hessian trace."""
    params = jax.tree.map(jnp.asarray, system.params)

    def one(rng_key):
        estimate, point = bound(marginal, system, rng_key, params, order=order)
        (u,) = point.values()

        def score(params):
            return jax.grad(lambda u: jnp.sum(estimate.log_density(params, {"v": u})))(u)

        def trace(params):
            def along(e):
                gradient = jax.grad(lambda u: jnp.sum(estimate.log_density(params, {"v": u})))
                return jnp.sum(jax.jvp(gradient, (u,), (jnp.broadcast_to(e, u.shape),))[1] * e, -1)

            return jnp.sum(jax.vmap(along)(jnp.eye(u.shape[-1])), 0)

        out = estimate.score(point)["v"], score(params), jax.jacrev(score)(params)
        return (*out, trace(params), jax.jacrev(trace)(params)) if order == 3 else out

    def exact():
        points = jnp.asarray(system.unconstrain(system.data))
        score = lambda p: jax.vmap(partial(system.score, p))(points)  # noqa: E731
        trace = lambda p: jax.vmap(partial(system.trace, p))(points)  # noqa: E731
        out = score(params), score(params), jax.jacrev(score)(params)
        return (*out, trace(params), jax.jacrev(trace)(params)) if order == 3 else out

    return one, np.asarray(jit(lambda: flat(exact()))())


def units(data, *, num_hidden=3, site=None, energy=None):
    """A GRBM whose hidden site and its energy can be exchanged."""
    W = numpyro.param("W", jnp.zeros((2, num_hidden)))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(event_shape=(num_hidden,)) if site is None else site)
        field = v @ W
        coupled = jnp.sum(field * h, -1) if energy is None else energy(field, h)
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - coupled)


def gaussian_latents(model, params, data):
    """The row log-density of the marginal that is the default of a model."""
    data = jnp.asarray(data)
    row_model = read_model(model, (data,), {}, params)
    marginal = choose(row_model)
    assert isinstance(marginal, ebm.GaussianLatents)
    return lambda p, v: marginal.log_density(row_model, p, {"v": v})
