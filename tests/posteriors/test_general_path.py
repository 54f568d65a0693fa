# SPDX-License-Identifier: Apache-2.0
"""Energies that are not seen to be affine in indicators: whoever asks for that says so once."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.discrete_form import discrete_form
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.program import multi_affine

KEY, ROWS = jax.random.key(72), jnp.array([[0, 1, 1], [1, 1, 0]])


def energy(name, theta, s):
    spins = 2.0 * s - 1.0
    if name == "proved":
        return theta * jnp.sum(spins * jnp.roll(spins, 1, -1), -1)
    return theta * (jnp.max(s, -1) if name == "maximum" else jnp.sum(spins, -1) ** 3)


def fixed_model(name):
    def model(num_rows=2):
        with numpyro.plate("data", num_rows):
            s = numpyro.sample("s", ebm.Counting(2, (3,)))
            ebm.energy("E", energy(name, 0.3, s))

    return ebm.fixed(model, {})


def trained(name, data=None):
    theta = numpyro.param("theta", jnp.array(0.3))
    with numpyro.plate("data", 2):
        s = numpyro.sample("s", ebm.Counting(2, (3,)), obs=data)
        ebm.energy("E", energy(name, theta, s))


def by_objective(name):
    model = lambda data: trained(name, data)  # noqa: E731
    loss = partial(ebm.PseudoLikelihood().loss, KEY)
    jax.eval_shape(lambda p: loss(p, model, None, ROWS), {"theta": jnp.array(0.3)})


def by_kernel(kernel):
    def use(name):
        jax.eval_shape(lambda key: kernel(fixed_model(name)).init(key, 0, None, (), {}), KEY)

    return use


def by_log_normalizer(name):
    options = {"num_particles": 8, "num_replicates": 2, "num_temperatures": 3}
    log_z = partial(ebm.log_normalizer, method="ais", progress_bar=False, **options)
    jax.eval_shape(lambda key: log_z(key, fixed_model(name)).value, KEY)


def by_exchange(name):
    def model(data=None):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 2):
            s = numpyro.sample("s", ebm.Counting(2, (3,)), obs=data)
            ebm.energy("E", energy(name, theta, s))

    kernel = ebm.Exchange(model, ebm.BlockGibbs, num_auxiliary_steps=1, step_size=0.1)
    jax.eval_shape(lambda key: kernel.init(key, 0, None, (ROWS,), {}), KEY)


USERS = {
    "objective": by_objective,
    "BlockGibbs": by_kernel(ebm.BlockGibbs),
    "DiscreteLangevin": by_kernel(lambda m: ebm.DiscreteLangevin(m, 0.2, differences="exact")),
    "log_normalizer": by_log_normalizer,
    "Exchange": by_exchange,
}
WHY = {"maximum": "`reduce_max` is no sum or product", "cube": "'s'[0] meets itself"}


@pytest.mark.parametrize(
    "user, name", [*((user, "maximum") for user in USERS), ("BlockGibbs", "cube")]
)
def test_the_general_path_is_told_once(user, name, caplog):
    multi_affine._tell_once.cache_clear()
    with caplog.at_level(logging.INFO, "numpyro_ebm.program"):
        for _ in range(2):
            USERS[user](name)
        said = [x.getMessage() for x in caplog.records]
        assert len(said) == 1 and "['s']" in said[0] and WHY[name] in said[0], said
        caplog.clear()
        USERS[user]("proved")
    assert not caplog.records


def test_what_has_no_such_form_is_told(caplog):
    """Counts without an end, and sites beside latent ones."""

    def counts(data):
        theta = numpyro.param("theta", jnp.array(0.3))
        with numpyro.plate("data", 2):
            n = numpyro.sample("n", ebm.Counting(jnp.inf), obs=data)
            ebm.energy("E", theta * n**2)

    def latent(data):
        theta = numpyro.param("theta", jnp.array(0.3))
        with numpyro.plate("data", 2):
            h = numpyro.sample("h", ebm.Counting(2))
            s = numpyro.sample("s", ebm.Counting(2, (3,)), obs=data)
            ebm.energy("E", theta * h * jnp.sum(s, -1))

    multi_affine._tell_once.cache_clear()
    p = {"theta": jnp.array(0.3)}
    with caplog.at_level(logging.INFO, "numpyro_ebm.program"):
        for _ in range(2):
            for objective, model, data in (
                (ebm.DiscreteFisher(), counts, jnp.array([1, 3])),
                (ebm.PseudoLikelihood(), latent, ROWS),
            ):
                loss = partial(objective.loss, KEY)
                jax.eval_shape(lambda p: loss(p, model, None, data), p)  # noqa: B023
    said = [x.getMessage() for x in caplog.records]
    assert len(said) == 2
    assert "['n']: they have no largest value" in said[0]
    assert "['s']: ['h'] are latent" in said[1]


def test_rows_by_their_index_have_known_values():
    """Inside of a program, too: the form knows what a plate yields, and clusters the couplings."""
    fields = jnp.array([[0.3, -0.2, 0.5], [1.0, 0.4, -0.7]])

    def model():
        with numpyro.plate("data", 2) as i:
            s = numpyro.sample("s", ebm.Counting(2, (3,)))
            ebm.energy("E", -jnp.sum(fields[i] * s, -1) - 0.3 * jnp.sum(s[:, 1:] * s[:, :-1], -1))

    @jax.jit
    def read(rng_key):
        row_model = read_fixed_model(ebm.fixed(model, {}), rng_key=rng_key)
        form = discrete_form(row_model, {"s": np.arange(2)})
        assert form is not None and form.is_known
        return rng_key

    read(KEY)
