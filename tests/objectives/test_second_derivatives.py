# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of a loss are those of its value, or refused: of every objective, and in use.

The oracle is second differences of the value, in double precision, and closed forms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation
from registry.marginals import MARGINALS
from registry.objectives import OBJECTIVES

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

POINT = np.array([0.3, -0.6])
KEY = jax.random.key(0)


def real(data):
    """A loss of no objective is quadratic in these parameters, and a latent is summed out."""
    w = numpyro.param("w", POINT)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting())
        ebm.energy("E", 0.5 * jnp.exp(w[0]) * v**2 - w[1] * h * v + 0.2 * w[0] * w[1] * h)


def discrete(data):
    w = numpyro.param("w", POINT)
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("v", ebm.Counting(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting())
        ebm.energy("E", -jnp.exp(w[0]) * x[:, 0] * x[:, 1] - w[1] * h * (x[:, 0] + w[0]))


def guide(data):
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        x = jnp.sum(v, -1) if jnp.ndim(v) > 1 else v
        numpyro.sample("h", dist.Bernoulli(logits=-0.5 * x))


def loss_of(member, marginal=None, reader=None):
    """The loss of an objective as a function of w, at one key and few rows."""
    objective, is_real = member.make(marginal), member.sites == "real"
    model = real if is_real else discrete
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=6) if is_real else rng.integers(0, 2, (6, 2)))
    params = {"w": POINT}
    problem = objective.prepare(KEY, params, model, reader, (data,), {})
    for network in objective.networks:
        found = network.parameters(KEY, problem)
        params |= {name: value + 0.3 for name, (value, _) in found.items()}
    own = objective.own_parameters(KEY, params, problem)
    params |= {name: value for name, (value, _) in own.items()}
    return lambda w: objective.loss(KEY, {**params, "w": w}, model, reader, data)


def differences(fn, at, step=3e-3):
    """The Hessian of a function of two numbers by differences of its value, to the fourth order."""

    def along(direction):
        values = [fn(at + s * step * direction) for s in (-2, -1, 0, 1, 2)]
        return jnp.dot(jnp.array([-1, 16, -30, 16, -1]) / 12, jnp.stack(values)) / step**2

    first, second = along(jnp.array([1.0, 0.0])), along(jnp.array([0.0, 1.0]))
    mixed = 0.5 * (along(jnp.ones(2)) - first - second)
    return jnp.array([[first, mixed], [mixed, second]])


DEFAULT = ("ScoreMatching", "KernelSteinDiscrepancy", "PseudoLikelihood")
CHECKED = {("ScoreMatching", "VaGES"), ("DenoisingScoreMatching", "ImportanceBound")}


@pytest.mark.parametrize(
    "name",
    [
        name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow)
        for name in OBJECTIVES
        if OBJECTIVES[name].make().is_loss
    ],
)
def test_the_hessian_is_that_of_the_value(name):
    loss = jax.jit(loss_of(OBJECTIVES[name]))
    expected = differences(loss, POINT)
    for hessian in (jax.hessian(loss), jax.jacfwd(jax.jacfwd(loss)), jax.jacrev(jax.grad(loss))):
        np.testing.assert_allclose(jax.jit(hessian)(POINT), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        variant
        for member in OBJECTIVES.values()
        for variant, formula in member.formulas.items()
        if member.sites == "real" and formula.make().is_loss
    ],
)
def test_the_hessian_of_every_variant_is_that_of_its_value(variant):
    member = next(m for m in OBJECTIVES.values() if variant in m.formulas)
    loss = jax.jit(loss_of(member._replace(make=member.formulas[variant].make)))
    expected = differences(loss, POINT)
    np.testing.assert_allclose(jax.jit(jax.hessian(loss))(POINT), expected, rtol=1e-6, atol=1e-7)


def _with_particles():
    for name, member in OBJECTIVES.items():
        for marginal in ("VaGES", "ImportanceBound", "Unrolled"):
            objective = member.make()
            if marginal in member.marginals and objective.is_loss and objective.needs != "bound":
                marks = () if (name, marginal) in CHECKED else pytest.mark.slow
                yield pytest.param(name, marginal, marks=marks)


@pytest.mark.parametrize("name, marginal", list(_with_particles()))
def test_second_derivatives_of_particles_are_refused(name, marginal):
    loss = loss_of(OBJECTIVES[name], MARGINALS[marginal].make(), guide)
    once = jax.grad(loss)
    assert jax.eval_shape(once, POINT).shape == (2,)

    def nested(w):
        many = jax.lax.scan(lambda c, _: (c, jax.vmap(once)(w[None])), 0, None, length=2)
        return jnp.sum(many[1])

    for twice in (jax.hessian(loss), jax.jacfwd(jax.jacfwd(loss)), jax.grad(jax.jit(nested))):
        with pytest.raises(ebm.ModelError, match=f"{name} has no second derivatives: {marginal}"):
            jax.eval_shape(twice, POINT)


@pytest.mark.parametrize(
    "make",
    [
        OBJECTIVES["ContrastiveDivergence"].make,
        lambda marginal: ebm.KernelSteinDiscrepancy(marginal, bandwidth=1.0, pairs="halves"),
    ],
)
def test_a_gradient_that_is_not_of_the_value_has_no_hessian(make):
    loss = loss_of(OBJECTIVES["ContrastiveDivergence"]._replace(make=make))
    with pytest.raises(ebm.ModelError, match="its gradient is not that of its value"):
        jax.eval_shape(jax.hessian(loss), POINT)


@pytest.mark.slow
def test_the_hessian_of_a_bound_is_that_of_its_value():
    loss = jax.jit(loss_of(OBJECTIVES["NCE"], ebm.ImportanceBound(3), guide))
    expected = differences(loss, POINT)
    np.testing.assert_allclose(jax.jit(jax.hessian(loss))(POINT), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_mixed_derivatives_in_parameters_and_data():
    """∂²L/∂p∂v of the row's score matching loss ½p²v² - p, from which influences are made."""

    def gaussian(data):
        p = numpyro.param("p", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * p * v**2)

    def loss(p, data):
        return ebm.ScoreMatching().loss(KEY, {"p": p}, gaussian, None, data)

    data = jnp.array([-1.0, 0.5, 2.0])
    for mixed in (jax.jacfwd(jax.grad(loss), 1), jax.jacrev(jax.grad(loss, 1), 0)):
        np.testing.assert_allclose(mixed(0.7, data), 2 * 0.7 * data / 3, rtol=1e-12)


def location(data, covariate):
    theta = numpyro.sample("theta", dist.Normal(0.0, 10.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * v**2 - theta * covariate * v)


@pytest.mark.parametrize("objective", [ebm.ScoreMatching(), ebm.SlicedScoreMatching()])
def test_laplace_of_a_generalised_posterior_has_the_posteriors_width(objective):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=200))
    data = 0.5 * x + rng.normal(size=200)
    model = ebm.generalized(location, objective, 1.0)
    guide = AutoLaplaceApproximation(model)
    fit = SVI(model, guide, optax.adam(0.05), Trace_ELBO()).run(
        KEY, 300, data, x, progress_bar=False
    )
    scale = guide.get_posterior(fit.params).scale_tril[0, 0]
    np.testing.assert_allclose(scale, (jnp.sum(x**2) + 0.01) ** -0.5, rtol=1e-6)
