# SPDX-License-Identifier: Apache-2.0
r"""Derivatives of log Z and of log-likelihoods, :math:`∂_θ \log Z = -E\,∂_θ E`, by every method.

The oracles are closed forms, sums over states and fine sums over a line.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
POINT = np.array([0.7, -0.4])
LINE = np.linspace(-12, 12, 24_001)


def gaussian(theta):
    """log Z is ½ log 2π/p + ½ b²/p at a precision p = exp(θ₀) and a slope b = θ₁."""

    def model(data=None, num_rows=1):
        with numpyro.plate("data", num_rows if data is None else len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * jnp.exp(theta[0]) * v**2 - theta[1] * v)

    return model


def of_gaussian(theta):
    return 0.5 * (jnp.log(2 * jnp.pi) - theta[0] + theta[1] ** 2 * jnp.exp(-theta[0]))


def on_line(energy):
    def log_z(theta):
        return jax.nn.logsumexp(-energy(LINE, theta)) + jnp.log(LINE[1] - LINE[0])

    def make(theta):
        def model():
            with numpyro.plate("data", 1):
                v = numpyro.sample("v", ebm.Lebesgue())
                ebm.energy("E", energy(v, theta))

        return model

    return make, log_z


def levels(theta):
    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Counting(4))
            h = numpyro.sample("h", ebm.Counting(event_shape=(2,)))
            ebm.energy("E", 0.5 * theta[0] * v**2 - theta[1] * v * (h[:, 0] - theta[0] * h[:, 1]))

    return model


def of_levels(theta):
    v, a, b = jnp.array(np.meshgrid(range(4), range(2), range(2))).reshape(3, -1)
    return jax.nn.logsumexp(-0.5 * theta[0] * v**2 + theta[1] * v * (a - theta[0] * b))


def tilted(theta):
    """A base measure that depends on the parameters as well, on the positive half line."""

    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", dist.Gamma(2.0 + theta[0], 1.5))
            ebm.energy("E", jnp.exp(theta[1]) * v)

    return model


def of_tilted(theta):
    return (2.0 + theta[0]) * jnp.log(1.5 / (1.5 + jnp.exp(theta[1])))


def hidden(theta):
    """Gaussian given a bit, and both of them shifted by it."""

    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Lebesgue())
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E", 0.5 * v**2 - theta[1] * v * h + theta[0] * h)

    return model


def of_hidden(theta):
    return 0.5 * jnp.log(2 * jnp.pi) + jnp.logaddexp(0.0, 0.5 * theta[1] ** 2 - theta[0])


quartic, of_quartic = on_line(lambda v, t: 0.2 * jnp.exp(t[0]) * v**4 - t[1] * v**2)
# At far nodes it overflows, and so does its derivative.
steep, of_steep = on_line(lambda v, t: jnp.exp(t[0]) * jnp.cosh(v) - t[1] * v)

CASES = {
    "gaussian, enumerate": (gaussian, of_gaussian, "enumerate"),
    "gaussian, quadrature": (gaussian, of_gaussian, "quadrature"),
    "levels": (levels, of_levels, None),
    "hidden": (hidden, of_hidden, "enumerate"),
    "hidden, quadrature": (hidden, of_hidden, "quadrature"),
    "quartic": (quartic, of_quartic, None),
    "steep": (steep, of_steep, None),
    "tilted": (tilted, of_tilted, None),
}
DEFAULT = ("gaussian, enumerate", "levels")


def log_z_of(make, method, **options):
    def value(theta):
        model = ebm.fixed(make(theta), {})
        return ebm.log_normalizer(KEY, model, method=method, **options).value

    return value


@pytest.mark.parametrize(
    "name", [k if k in DEFAULT else pytest.param(k, marks=pytest.mark.slow) for k in CASES]
)
def test_derivatives_of_exact_log_normalizers(name):
    make, exact, method = CASES[name]
    log_z = log_z_of(make, method)
    np.testing.assert_allclose(log_z(POINT), exact(POINT), rtol=1e-6)
    expected = jax.grad(exact)(POINT)
    for gradient in (jax.grad(log_z), jax.jit(jax.grad(log_z)), jax.grad(jax.jit(log_z))):
        np.testing.assert_allclose(gradient(POINT), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        jax.hessian(log_z)(POINT), jax.hessian(exact)(POINT), rtol=1e-5, atol=1e-7
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smc", "ais"])
@pytest.mark.parametrize("make, exact", [(gaussian, of_gaussian), (levels, of_levels)])
def test_derivatives_of_annealed_log_normalizers(make, exact, method):
    """A mean over a few thousand particles, hence within a few percent; and no second ones."""
    log_z = log_z_of(make, method)
    expected = jax.grad(exact)(POINT)
    for gradient in (jax.grad(log_z), jax.jit(jax.grad(log_z))):
        np.testing.assert_allclose(gradient(POINT), expected, rtol=0.15, atol=0.05)
    with pytest.raises(ebm.ModelError, match="annealed estimate of log Z has no second"):
        jax.eval_shape(jax.hessian(log_z), POINT)


def test_parameters_that_are_held_fixed_by_name():
    def model():
        theta = numpyro.param("theta", jnp.zeros(2))
        gaussian(theta)()

    def log_z(theta):
        return ebm.log_normalizer(KEY, ebm.fixed(model, {"theta": theta}), method="enumerate").value

    np.testing.assert_allclose(jax.grad(log_z)(POINT), jax.grad(of_gaussian)(POINT), rtol=1e-10)


def test_derivatives_of_log_likelihoods_in_parameters_and_data():
    data = np.array([0.3, -1.0, 2.0])

    def total(theta, data):
        model = ebm.fixed(gaussian(theta), {})
        return jnp.sum(ebm.log_likelihood(KEY, model, data, method="enumerate"))

    def exact(theta, data):
        energy = 0.5 * jnp.exp(theta[0]) * data**2 - theta[1] * data
        return jnp.sum(-energy - of_gaussian(theta))

    for transform in (lambda f: f, jax.jit):
        found = transform(jax.grad(total, (0, 1)))(POINT, data)
        for x, y in zip(found, jax.grad(exact, (0, 1))(POINT, data), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10)


@pytest.mark.slow
def test_rows_with_covariates_have_derivatives_of_their_own():
    def model(x, theta):
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * jnp.exp(theta[0]) * v**2 - theta[1] * x * v)

    x = np.array([0.5, -1.0, 2.0])

    def log_z(theta):
        return ebm.log_normalizer(KEY, ebm.fixed(model, {}), x, theta, method="enumerate").value

    expected = jax.vmap(lambda x: jax.grad(lambda t: of_gaussian(t * jnp.array([1.0, x])))(POINT))
    np.testing.assert_allclose(jax.jacrev(log_z)(POINT), expected(x), rtol=1e-10)
