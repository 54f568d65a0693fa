# SPDX-License-Identifier: Apache-2.0
"""Mistakes in models."""

from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from mistakes.setting import (
    BITS,
    KEY,
    LINE,
    Mistake,
    X,
    bayesian,
    chain,
    fit,
    model_of,
    plane,
    plate,
)
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import NUTS, SVI, Predictive, Trace_ELBO

import numpyro_ebm as ebm


def vector():
    return ebm.Lebesgue((2,))


def square(v, W):
    return 0.5 * jnp.sum((v @ W) ** 2, -1)


def with_vector(energy):
    return model_of(vector, energy)


def no_plate(data=None):
    v = numpyro.sample("v", vector(), obs=data)
    ebm.energy("E", square(v, numpyro.param("W", jnp.eye(2))))


def no_plate_mean(data=None):
    v = numpyro.sample("v", vector(), obs=data)
    ebm.energy("E", jnp.mean(square(v, numpyro.param("W", jnp.eye(2)))))


def energy_outside(data=None):
    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
    ebm.energy("E", square(v, numpyro.param("W", jnp.eye(2))))


def site_outside(data=None):
    v = numpyro.sample("v", vector().expand([len(data)]), obs=data)
    with plate(data):
        ebm.energy("E", square(v, numpyro.param("W", jnp.eye(2))))


def two_plates(data=None):
    with numpyro.plate("other", 3, dim=-2), plate(data):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", v**2)


def factor(data=None):
    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
        numpyro.factor("E", -square(v, numpyro.param("W", jnp.eye(2))))


def factor_of_priors(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        numpyro.factor("E", -0.5 * theta * v**2)


def param_of_the_site(data=None):
    W = numpyro.param("v", jnp.eye(2))
    with plate(data):
        ebm.energy("E", square(numpyro.sample("v", vector(), obs=data), W))


def named(name, energy="E"):
    def model(data=None):
        with plate(data):
            v = numpyro.sample("v", vector(), obs=data)
            numpyro.sample(name, vector())
            ebm.energy(energy, jnp.sum(v**2, -1))

    return model


def value_first(data=None):
    a: Any = numpyro.param(1.0, "a")  # pyright: ignore[reportArgumentType]
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        ebm.energy("E", a * jnp.sum(v**2, -1))


def plate_of(size):
    def model(data=None):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", size):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            ebm.energy("E", a * jnp.sum(v**2, -1))

    return model


def returned(data=None):
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
    return numpyro.param("a", 1.0) * jnp.sum(v**2, -1)


def swapped(data=None):
    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
        ebm.energy(jnp.sum(v**2, -1), "E")


def nameless(data=None):
    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
        ebm.energy(None, jnp.sum(v**2, -1))


def of_data(data=None):
    with plate(data):
        numpyro.sample("v", vector(), obs=data)
        ebm.energy("E", square(data, numpyro.param("W", jnp.eye(2))))


def of_nothing(data=None):
    with plate(data):
        numpyro.sample("v", vector(), obs=data)
        ebm.energy("E", numpyro.param("W", jnp.ones(())) * jnp.ones(len(data)))


def ordinary(data=None):
    with plate(data):
        numpyro.sample("v", dist.Normal(numpyro.param("m", 0.0), 1.0), obs=data)


def in_scan(data=None):
    def body(carry, x):
        ebm.energy("E", carry)
        return carry, x

    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
    scan(body, jnp.sum(v**2, -1), jnp.arange(3))


def in_cond(data=None):
    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
    cond(True, lambda x: ebm.energy("E", x), lambda x: None, jnp.sum(v**2, -1))


def in_lax_scan(data=None):
    def body(carry, x):
        ebm.energy("E", carry)
        return carry, x

    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
        lax.scan(body, jnp.sum(v**2, -1), jnp.arange(3))


def coupled(data=None):
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", (v - jnp.mean(v)) ** 2 * numpyro.param("a", 1.0))


def learn_bits(base):
    model = model_of(base, lambda v, W: -jnp.sum(v @ W, -1))
    return fit(model, data=BITS, loss=ebm.PseudoLikelihood())


def of_whole_numbers(data=None):
    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
        ebm.energy("E", v[..., 0] > numpyro.param("a", 0.5))


def of_logarithm(data=None):
    with plate(data):
        v = numpyro.sample("v", vector(), obs=data)
        ebm.energy("E", numpyro.param("a", 1.0) * jnp.sum(jnp.log(v) + v**2, -1))


MODELS = {
    "an energy in steps": Mistake(
        lambda: fit(of_whole_numbers), r"'E' is of type bool, in steps over.*\['v'\].*jnp.where"
    ),
    "an energy that is nowhere": Mistake(
        lambda: fit(of_logarithm, data=jnp.abs(X).at[1, 0].set(-1.0)),
        "density of 'E' is NaN in 1 rows.*the support that is meant",
    ),
    "no plate": Mistake(lambda: fit(no_plate), r"plates \(none\).*with numpyro.plate\("),
    "no plate, a mean": Mistake(lambda: fit(no_plate_mean), r"with numpyro.plate\("),
    "an energy outside the plate": Mistake(
        lambda: fit(energy_outside), r"plates \(none\).*with numpyro.plate\("
    ),
    "a site outside the plate": Mistake(lambda: fit(site_outside), "'v' is outside any plate"),
    "rows in the wrong plate": Mistake(
        lambda: fit(two_plates, data=jnp.ones(6)), r"'E' has shape \(6,\).*ask for \(3, 6\)"
    ),
    "no obs": Mistake(lambda: fit(model_of(vector, square, obs=False)), "no observed site"),
    "a factor": Mistake(lambda: fit(factor), "no energy statement.*numpyro.factor"),
    "a factor, NUTS": Mistake(
        lambda: chain(NUTS(factor_of_priors), LINE), "states no energy", ebm.UnhandledEnergyError
    ),
    "no energy": Mistake(lambda: fit(ordinary, data=LINE), "no energy statement"),
    "summed over rows": Mistake(
        lambda: fit(with_vector(lambda v, W: 0.5 * jnp.sum((v @ W) ** 2))),
        r"'E' has shape \(\).*Sum over event dimensions only",
    ),
    "not summed": Mistake(
        lambda: fit(with_vector(lambda v, W: (v @ W) ** 2)),
        r"'E' has shape \(6, 2\).*does not go into its plates.*jnp.sum\(..., -1\)",
    ),
    "summed over the wrong axis": Mistake(
        lambda: fit(with_vector(lambda v, W: jnp.sum((v @ W) ** 2, 0))), r"'E' has shape \(2,\)"
    ),
    "with an axis kept": Mistake(
        lambda: fit(with_vector(lambda v, W: jnp.sum((v @ W) ** 2, -1, keepdims=True))),
        r"'E' has shape \(6, 1\)",
    ),
    "the name of an energy last": Mistake(lambda: fit(swapped), "takes its name first"),
    "an energy without a name": Mistake(lambda: fit(nameless), "takes its name first"),
    "an energy of the argument": Mistake(
        lambda: fit(of_data), "compute the energy from the returned"
    ),
    "an energy of no site": Mistake(lambda: fit(of_nothing), "No energy depends on the visible"),
    "no event shape": Mistake(
        lambda: fit(model_of(ebm.Lebesgue, square)), r"declare their site with `event_shape=\(2,\)`"
    ),
    "an event shape that is a number": Mistake(
        lambda: fit(model_of(lambda: ebm.Lebesgue(2), square)), "must be a tuple, got 2"
    ),
    "an event shape with a zero": Mistake(
        lambda: fit(model_of(lambda: ebm.Lebesgue((0,)), square)), "tuple of positive integers"
    ),
    "an event shape of floats": Mistake(
        lambda: fit(model_of(lambda: ebm.Lebesgue((2.0,)), square)), "tuple of positive integers"
    ),
    "a discrete support": Mistake(
        lambda: ebm.Lebesgue((), dist.constraints.boolean), r"use `Counting\(num_values\)`"
    ),
    "a simplex without its dimension": Mistake(
        lambda: ebm.Lebesgue((), dist.constraints.simplex), "`event_shape` of at least 1"
    ),
    "a support that is none": Mistake(lambda: ebm.Lebesgue((), "positive"), "`support` must be"),
    "values and shape exchanged": Mistake(
        lambda: learn_bits(lambda: ebm.Counting((2,))), "`num_values` must be an integer"
    ),
    "values as a fraction": Mistake(
        lambda: learn_bits(lambda: ebm.Counting(2.5, (2,))), "`num_values` must be an integer"
    ),
    "one value": Mistake(lambda: ebm.Counting(1), "`num_values` must be an integer of at least 2"),
    "bounds exchanged": Mistake(
        lambda: ebm.Lebesgue((), dist.constraints.interval(1.0, 0.0)), "is empty: its lower bound"
    ),
    "a support for the shape": Mistake(
        lambda: ebm.Lebesgue(dist.constraints.positive), "`event_shape` must be a tuple"
    ),
    "an energy that is None": Mistake(
        lambda: fit(with_vector(lambda v, W: None)), "'E' is a `NoneType`, and numbers are needed"
    ),
    "a parameter by its value": Mistake(
        lambda: fit(value_first), "`numpyro.param` has a `float` for a name"
    ),
    "a plate of another size": Mistake(lambda: fit(plate_of(5)), r"\(6, 2\).* ask for \(5, 2\)"),
    "a plate of one": Mistake(lambda: fit(plate_of(1)), r"\(6, 2\).* ask for \(1, 2\)"),
    "rows in the event shape": Mistake(
        lambda: fit(model_of(lambda: ebm.Lebesgue((6, 2)), lambda v, W: jnp.sum(v**2, (-1, -2)))),
        "one energy for each element",
    ),
    "an energy that is returned": Mistake(lambda: fit(returned), "no energy statement"),
    "a parameter named as a site": Mistake(lambda: fit(param_of_the_site), "are named 'v'"),
    "two sites of a name": Mistake(lambda: fit(named("v")), "are named 'v'"),
    "an energy named as a site": Mistake(lambda: fit(named("h", "h")), "are named 'h'"),
    "an energy in a scan": Mistake(lambda: fit(in_scan), r"out of reach.*lax.scan"),
    "an energy in a cond": Mistake(lambda: fit(in_cond), r"out of reach.*lax.scan"),
    "an energy in lax.scan": Mistake(lambda: fit(in_lax_scan), "body of a loop or of another"),
    "rows that read one another": Mistake(
        lambda: fit(coupled, data=LINE), "energy 'E'.*other rows"
    ),
    "a model that is called": Mistake(lambda: fit(plane(X)), "`model` must be a function"),
    "drawn by Predictive": Mistake(
        lambda: Predictive(ebm.fixed(plane, {"W": jnp.eye(2)}), num_samples=2)(KEY),
        "numpyro_ebm.sample",
        ebm.ImproperSamplingError,
    ),
    "NUTS with a free parameter": Mistake(
        lambda: chain(NUTS(plane)), r"needs log Z\(W\)", ebm.UnhandledEnergyError
    ),
    "NUTS with priors": Mistake(
        lambda: chain(NUTS(bayesian), LINE), r"needs log Z\(theta\)", ebm.UnhandledEnergyError
    ),
    "an ELBO of an energy": Mistake(
        lambda: SVI(plane, lambda data: None, numpyro.optim.Adam(0.1), Trace_ELBO()).run(
            KEY, 1, X, progress_bar=False
        ),
        r"needs log Z\(W\)",
        ebm.UnhandledEnergyError,
    ),
}
