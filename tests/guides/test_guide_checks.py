# SPDX-License-Identifier: Apache-2.0
"""A guide that does not fit its model is refused before it trains anything."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import biject_to, constraints

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.model.reading import read_model

DATA = jnp.array([0.3, -1.0, 2.0, 0.5])
KEY = jax.random.key(3)


def model_of(base):
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", base())
            ebm.energy("E", 0.5 * (v - jnp.sum(jnp.reshape(h, (len(data), -1)), -1)) ** 2)

    return model


def guide_of(q):
    def guide(data):
        with numpyro.plate("data", len(data)):
            ebm.visible("v", data)
            numpyro.sample("h", q())

    return guide


def read(base, guide):
    return Guide(guide, read_model(model_of(base), (DATA,)), (DATA,), {})


def interval(low, high):
    return dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), biject_to(constraints.interval(low, high))
    )


BINARY, FOUR = ebm.Counting, lambda: ebm.Counting(4)
REAL, VECTOR = ebm.Lebesgue, lambda: ebm.Lebesgue((3,))
POSITIVE = lambda: ebm.Lebesgue((), constraints.positive)  # noqa: E731
BOUNDED = lambda: ebm.Lebesgue((), constraints.interval(0.0, 2.0))  # noqa: E731
BELOW = lambda: ebm.Lebesgue((), constraints.less_than(2.0))  # noqa: E731


@pytest.mark.parametrize(
    "base, q",
    [
        (BINARY, lambda: dist.Normal(0.0, 1.0)),
        (BINARY, lambda: dist.RelaxedBernoulli(0.5, logits=jnp.zeros(()))),
        (FOUR, lambda: dist.Categorical(jnp.ones(3) / 3)),
        (FOUR, lambda: dist.Poisson(1.0)),
        (REAL, lambda: dist.Bernoulli(0.5)),
        (REAL, lambda: dist.HalfNormal(1.0)),
        (POSITIVE, lambda: dist.Normal(0.0, 1.0)),
        (POSITIVE, lambda: dist.Beta(1.0, 2.0)),
        (BOUNDED, lambda: interval(0.0, 1.0)),
        (BELOW, lambda: interval(0.0, 2.0)),
        (VECTOR, lambda: dist.Dirichlet(jnp.ones(3))),
    ],
)
def test_another_support_is_refused(base, q):
    with pytest.raises(ebm.ModelError, match="draws 'h' on the support.*Draw it from"):
        read(base, guide_of(q)).parameters(KEY)


@pytest.mark.parametrize(
    "base, q",
    [
        (BINARY, lambda: dist.Bernoulli(0.5)),
        (BINARY, lambda: dist.Categorical(jnp.ones(2) / 2)),
        (BINARY, lambda: dist.DiscreteUniform(0, 1)),
        (FOUR, lambda: dist.Binomial(3, 0.5)),
        (REAL, lambda: dist.StudentT(3.0)),
        (REAL, lambda: dist.Delta(0.0)),
        (POSITIVE, lambda: dist.LogNormal(0.0, 1.0)),
        (POSITIVE, lambda: dist.Gamma(2.0).mask(True)),
        (POSITIVE, lambda: dist.Delta(1.0)),
        (BOUNDED, lambda: interval(0.0, 2.0)),
        (VECTOR, lambda: dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3))),
        (VECTOR, lambda: dist.Normal(0.0, 1.0).expand([3]).to_event(1)),
    ],
)
def test_the_same_support_is_taken(base, q):
    assert read(base, guide_of(q)).parameters(KEY) == {}


def test_another_shape_is_refused():
    with pytest.raises(ebm.ModelError, match=r"draws 'h' with the shape \(4,\).*\(4, 3\)"):
        read(VECTOR, guide_of(lambda: dist.Normal(0.0, 1.0))).parameters(KEY)


def test_sites_that_the_model_lacks():
    def guide(data, **infer):
        with numpyro.plate("data", len(data)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0), infer=infer)
            numpyro.sample("h", dist.Normal(z, 1.0))

    def auxiliary(data):
        guide(data, is_auxiliary=True)

    with pytest.raises(ebm.ModelError, match="draws 'z', which is no site.*is_auxiliary"):
        read(REAL, guide).parameters(KEY)
    reader = read(REAL, auxiliary)
    assert reader.parameters(KEY) == {}
    draws = reader.draw(KEY, {}, {"v": DATA}, 2)  # draws are fine, and their density is unknown
    with pytest.raises(ebm.ModelError, match="draws 'z' beside"):
        reader.log_density({}, {"v": DATA}, {"h": draws["h"][0]})


@pytest.mark.parametrize(
    "marginal", [ebm.VaGES(2, importance_weighted=True), ebm.ImportanceBound(3)]
)
def test_no_plate_with_importance_weights(marginal):
    def no_plate(data):
        numpyro.sample("h", dist.Normal(0.5 * ebm.visible("v", data), 1.0))

    objective = ebm.DenoisingScoreMatching(0.1, marginal=marginal)
    with pytest.raises(ebm.ModelError, match=r"'h' outside.*`numpyro.plate\(\"data\""):
        objective.loss(KEY, {}, model_of(REAL), no_plate, DATA)


@pytest.mark.parametrize(
    "q",
    [
        lambda loc: dist.Normal(loc, 0.1),
        lambda loc: dist.Beta(1.0 + loc**2, 2.0),
        lambda loc: dist.LogNormal(loc, 0.1).expand([2]),
    ],
)
def test_parameters_on_another_support(q):
    def model(data):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2)

    def guide(data):
        numpyro.sample("precision", q(numpyro.param("loc", 1.0)))

    svi = ebm.EnergySVI(model, guide, optax.adam(0.1), ebm.ScoreMatching())
    with pytest.raises(ebm.ModelError, match="draws 'precision' "):
        svi.init(KEY, DATA)


def test_initial_values_of_unknown_parameters():
    def model(data):
        scale = numpyro.param("scale", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * scale * v**2)

    svi = ebm.EnergySVI(model, None, optax.adam(0.1), ebm.ScoreMatching())
    assert svi.get_params(svi.init(KEY, DATA, init_params={"scale": 2.5}))["scale"] == 2.5
    for start in (svi.init, lambda *args, **options: svi.run(KEY, 1, DATA, **options)):
        with pytest.raises(ebm.ModelError, match=r"names \['scal'\]; the parameters.*'scale'"):
            start(KEY, DATA, init_params={"scal": 2.5})
