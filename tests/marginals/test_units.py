# SPDX-License-Identifier: Apache-2.0
"""Units that do not interact are summed in closed form."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import oracles
import pytest
from marginal_cases import units

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")


def units_joint(num_hidden=3, **options):
    rng = np.random.default_rng(3)
    data, W = rng.normal(size=(4, 2)), jnp.asarray(rng.normal(size=(2, num_hidden)))
    model = partial(units, num_hidden=num_hidden, **options)
    return read_model(model, (jnp.asarray(data),), {}, {"W": W}), data, W


@pytest.mark.parametrize("num_hidden", [3, 200])
def test_units_that_do_not_interact_cost_one_gradient(num_hidden, x64):
    """Two hundred units have 2^200 states, and a closed form that the energy's operations show."""
    row_model, data, W = units_joint(num_hidden)
    marginal = ebm.Enumerated()
    marginal.check(row_model, None, 2)
    assert marginal.num_states(row_model) == 1

    def of(W, v):
        return marginal.log_density(row_model, {"W": W}, {"v": v})

    def closed(W, v):
        return jnp.sum(jax.nn.softplus(v @ W), -1) - 0.5 * jnp.sum(v**2, -1)

    v = jnp.asarray(data)
    for derivative in (
        lambda f: f,
        lambda f: jax.jacrev(lambda W, v: jnp.sum(f(W, v))),
        lambda f: jax.jacrev(jax.grad(lambda W, v: jnp.sum(f(W, v)), 1)),
        lambda f: jax.hessian(lambda W, v: jnp.sum(f(W, v)), 1),
    ):
        np.testing.assert_allclose(
            oracles.jit(derivative(of))(W, v), oracles.jit(derivative(closed))(W, v), atol=1e-10
        )


@pytest.mark.parametrize(
    "options",
    [
        {"energy": lambda field, h: jnp.sum(field * h, -1) + h[:, 0] * h[:, 1]},
        {"energy": lambda field, h: jnp.sum(field * h**2, -1)},  # h² = h, but who knows
        {"energy": lambda field, h: jnp.sum(jnp.where(h == 1, field, 0.0), -1)},
        {"energy": lambda field, h: jnp.sum(jnp.array([0.0, 1.0])[h] * field, -1)},
        {"site": ebm.Counting(3, event_shape=(3,))},
        {"site": dist.Bernoulli(0.3).expand([3]).to_event(1)},
    ],
)
def test_other_units_are_enumerated(options, x64):
    """Anything else is summed state by state, and right as well."""
    row_model, data, W = units_joint(**options)
    assert ebm.Enumerated().num_states(row_model) > 1
    num_values = 3 if isinstance(options.get("site"), ebm.Counting) else 2
    expected = -np.inf
    energy = options.get("energy", lambda field, h: jnp.sum(field * h, -1))
    for state in itertools.product(range(num_values), repeat=3):
        h = jnp.broadcast_to(jnp.array(state), (4, 3))
        base = 0.0
        if "site" in options and num_values == 2:
            base = np.sum(np.log([0.7, 0.3])[list(state)])
        expected = np.logaddexp(expected, energy(data @ np.asarray(W), h) + base)
    expected = expected - 0.5 * np.sum(data**2, -1)
    found = ebm.Enumerated().log_density(row_model, {"W": W}, {"v": jnp.asarray(data)})
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_many_rows_in_single_precision():
    """JAX 0.10.2 summed 16 states wrongly from 2,304 rows on, under `jit` and on CPU."""
    system = oracles.grbm_system(num_rows=5_000)
    params = jax.tree.map(lambda x: jnp.asarray(x, "float32"), oracles.LATERAL)
    data = 3 * jnp.asarray(system.data, "float32")
    row_model = read_model(oracles.lateral, (data,), {}, params)
    found = jax.jit(lambda p, v: ebm.Enumerated().log_density(row_model, p, {"v": v}))(params, data)
    exact = jax.vmap(lambda v: jax.nn.logsumexp(oracles.lateral_log_joint(params, v)))(data)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
