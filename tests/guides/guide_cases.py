# SPDX-License-Identifier: Apache-2.0
"""What the tests of guides share."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import oracles
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.guides.losses import row_guide_loss


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


def split(system, model_names):
    """Parameters of the model, and of the guide."""
    own = {k: jnp.asarray(x) for k, x in system.params.items() if k in model_names}
    other = {k: jnp.asarray(x) for k, x in system.params.items() if k not in model_names}
    return own, other


def loss_of(guide_loss, system, model_names, objective=None):
    """The guide's loss at the clean data: (rng_key, guide parameters, weights) -> scalar."""
    objective = ebm.DenoisingScoreMatching(0.5, ebm.VaGES(2)) if objective is None else objective
    data = jnp.asarray(system.data)
    own, _ = split(system, model_names)

    def loss(rng_key, guide_params, weights=None):
        problem = objective.prepare(
            jax.random.key(0), {**own, **guide_params}, system.model, system.guide, (data,), {}
        )
        problem = problem._replace(
            unconstrained=problem.row_model.unconstrain_visible(), row_weights=weights
        )
        return row_guide_loss(guide_loss, rng_key, own, guide_params, problem, system.guide)

    return loss


def minimise(loss, guide_params, num_steps, step_size):
    """Adam with a step size that falls to zero."""
    optim = numpyro.optim.Adam(lambda i: step_size * jnp.maximum(0.0, 1 - i / num_steps))

    @jit
    def run(guide_params):
        def step(state, rng_key):
            gradient = jax.grad(lambda p: loss(rng_key, p))(optim.get_params(state))
            return optim.update(gradient, state), None

        keys = jax.random.split(jax.random.key(0), num_steps)
        return optim.get_params(jax.lax.scan(step, optim.init(guide_params), keys)[0])

    return run(guide_params)


GRBM_NAMES = ("W", "b", "c", "scale")
LINEAR_NAMES = ("A", "b", "scale")


SOMEWHERE = {
    "B": np.array([[0.2, -0.3, 0.4], [0.5, 0.1, -0.2]]),
    "d": np.array([0.3, -0.4]),
    "std": np.array([0.6, 1.1]),
}


def negative_elbo(p, guide_params, v):
    """KL(q ‖ p(h | v)) - log p̃(v), with the constants of the proper base measure of h."""
    mean, precision = oracles.linear_posterior(p, v)
    std = guide_params["std"]
    x = guide_params["B"] @ v + guide_params["d"] - mean
    trace = jnp.sum(jnp.diag(precision) * std**2)
    log_det = jnp.linalg.slogdet(precision)[1]
    kl = 0.5 * (trace + x @ precision @ x - 2 - log_det) - jnp.sum(jnp.log(std))
    return kl - oracles.linear_log_density(p, v)
