# SPDX-License-Identifier: Apache-2.0
"""Models made of networks, where a network is simple enough for a closed form."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density
from scipy import stats
from scipy.special import log_softmax, logsumexp

import numpyro_ebm as ebm
from numpyro_ebm.models import (
    conditional_energy,
    deep_eblvm,
    deep_eblvm_guide,
    grbm,
    grbm_guide,
    jem,
    jem_logits,
    latent_prior,
    mlp_network,
    neural_energy,
    noise_conditional_energy,
)

eqx = pytest.importorskip("equinox")
KEY = jax.random.key(5)
RNG = np.random.default_rng(5)


class Quadratic(eqx.Module):
    """½ a t² - b t of a linear map t of the input."""

    map: jax.Array
    a: float = 1.0
    b: float = 0.0

    def __call__(self, x):
        t = self.map @ x
        return 0.5 * self.a * t**2 - self.b * t


class Linear(eqx.Module):
    matrix: jax.Array

    def __call__(self, x):
        return self.matrix @ x


class NoisedGaussian(eqx.Module):
    """What makes a noise-conditional energy of data of scale s that of N(m, t² + σ²)."""

    s: float
    m: float
    t: float

    def __call__(self, x):
        sigma = jnp.exp(x[1])
        variance = self.s**2 + sigma**2
        v = x[0] * jnp.sqrt(variance)
        wanted = 0.5 * (v - self.m) ** 2 / (self.t**2 + sigma**2)
        return jnp.sum(sigma / self.s * (0.5 * v**2 / variance - wanted))


def made(model, *args):
    """The model with its initial parameters, and these."""
    sites = trace(seed(model, KEY)).get_trace(*args)
    params = {name: x["value"] for name, x in sites.items() if x["type"] == "param"}
    return ebm.fixed(model, params), params


def log_joint(model, *args, **values):
    return log_density(model, args, {}, {k: jnp.asarray(x) for k, x in values.items()})[0]


def test_the_energy_of_a_network_tilts_its_base():
    network = mlp_network(KEY, (2, 3), widths=(4,))
    base = dist.Normal(0.5, 2.0).expand((2, 3)).to_event(2)
    v = RNG.normal(size=(5, 2, 3)).astype(np.float32)
    model, _ = made(neural_energy(network, (2, 3), base=base), v)
    expected = stats.norm(0.5, 2.0).logpdf(v).sum() - float(jax.vmap(network)(v).sum())
    np.testing.assert_allclose(log_joint(model, v), expected, rtol=1e-5)


def test_an_energy_that_is_told_its_noise_holds_data_with_noise():
    """A level for each row; the network is told the row in its own units, and the level."""
    v = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    sigma = np.array([0.05, 0.4, 1.0, 3.0], np.float32)
    free = noise_conditional_energy(NoisedGaussian(0.6, 0.3, 1.7), (2, 3), data_scale=0.6)
    model, _ = made(free, v)
    expected = 0.5 * (v - 0.3) ** 2 / (1.7**2 + sigma[:, None, None] ** 2)
    found = -log_density(model, (v, sigma), {}, {})[0]
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-4)
    alike = -log_density(model, (v,), {"sigma": 0.4}, {})[0]
    np.testing.assert_allclose(alike, (0.5 * (v - 0.3) ** 2 / (1.7**2 + 0.4**2)).sum(), rtol=1e-4)


@pytest.mark.parametrize("num_classes", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_label_of_a_jem_has_the_softmax_of_the_logits(num_classes):
    network = mlp_network(KEY, 2, num_outputs=num_classes, widths=(4,))
    v, y = RNG.normal(size=(6, 2)).astype(np.float32), np.arange(6) % num_classes
    free = jem(network, 2, num_classes)
    model, params = made(free, v, y)
    logits = np.asarray(jem_logits(network, params, v), float)
    np.testing.assert_allclose(logits, jax.vmap(network)(v), rtol=1e-6)
    joint = np.array([log_joint(model, v[:1], np.full(1, k)) for k in range(num_classes)])
    np.testing.assert_allclose(log_softmax(joint), log_softmax(logits[0]), atol=1e-5)
    conditional = ebm.PseudoLikelihood().on("y", given="v")
    loss = jax.jit(lambda y, known: conditional.loss(KEY, params, free, None, v, y, known))
    of_rows = -log_softmax(logits, -1)
    expected = of_rows[np.arange(6), y].mean()
    np.testing.assert_allclose(loss(y, np.ones(6, bool)), expected, rtol=1e-5)
    known, other = np.arange(6) < 4, (y + 1) % num_classes  # rows whose label is not looked at
    gain = loss(other, known) - loss(np.where(known, y, other), known)
    expected = (of_rows[np.arange(4), other[:4]] - of_rows[np.arange(4), y[:4]]).sum() / 6
    np.testing.assert_allclose(gain, expected, rtol=1e-4)
    np.testing.assert_array_equal(loss(other, known), loss(np.where(known, other, y), known))


def test_the_density_of_a_jem_sums_its_classes():
    network = mlp_network(KEY, 2, num_outputs=3, widths=(4,))
    v = RNG.normal(size=(6, 2)).astype(np.float32)
    model, params = made(jem(network, 2, 3), v)
    found = ebm.energy_gap(KEY, model, v, v).data
    logits = np.asarray(jem_logits(network, params, v), float)
    expected = -logsumexp(logits, -1) - stats.norm.logpdf(v).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_linear_gaussian_latent_prior_has_the_known_posterior_and_likelihood():
    """f = ½ a z² - b z: the prior is N(b / (1 + a), 1 / (1 + a)), the rest is regression."""
    a, b, s, w = 3.0, 4.0, 0.5, np.array([1.0, -0.5, 0.8])
    prior, decoder = Quadratic(jnp.ones(1), a, b), Linear(jnp.asarray(w[:, None], jnp.float32))
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    model, _ = made(latent_prior(prior, decoder, 1, noise_scale=s), x)

    def density(z):
        return log_joint(model, x, z=z[:, None])

    precision = 1 + a + w @ w / s**2
    mean = (b + x @ w / s**2) / precision
    np.testing.assert_allclose(jax.grad(density)(jnp.asarray(mean)), 0.0, atol=1e-4)
    np.testing.assert_allclose(jax.grad(density)(jnp.asarray(mean - 1)), precision, rtol=1e-4)
    found = ebm.log_likelihood(KEY, model, x)
    covariance = s**2 * np.eye(3) + np.outer(w, w) / (1 + a)
    expected = stats.multivariate_normal(w * b / (1 + a), covariance).logpdf(x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_deep_eblvm_with_binary_latents_is_their_sum():
    keys = jax.random.split(KEY, 3)
    g = [
        mlp_network(keys[0], 2, num_outputs=4, widths=(3,)),
        mlp_network(keys[1], 4, num_outputs=3, widths=(3,)),
        mlp_network(keys[2], 7, widths=(5,)),
    ]
    model = deep_eblvm(*g, shape=2, latent=ebm.Counting(2, event_shape=(3,)))
    v = RNG.normal(size=(5, 2)).astype(np.float32)
    found = ebm.energy_gap(KEY, made(model, v)[0], v, v).data
    for row, energy in zip(v, found, strict=True):
        features = g[0](row)
        values = [
            -float(g[2](jnp.concatenate([features, jnp.array(h) + g[1](features)])))
            for h in itertools.product((0.0, 1.0), repeat=3)
        ]
        expected = -logsumexp(values) - stats.norm.logpdf(row).sum()
        np.testing.assert_allclose(energy, expected, rtol=1e-5)


def test_the_guide_of_a_deep_eblvm_is_gaussian():
    network = mlp_network(KEY, 2, num_outputs=6, widths=(3,))
    v, h = RNG.normal(size=(4, 2)), RNG.normal(size=(4, 3))
    mean, log_scale = np.split(np.asarray(jax.vmap(network)(jnp.asarray(v))), 2, -1)
    found = log_joint(seed(deep_eblvm_guide(network, 3), KEY), v, h=h)
    expected = stats.norm(mean, np.exp(log_scale)).logpdf(h).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_terms_of_models_with_covariates_and_decoders_are_as_written():
    """Networks that tell every entry of their input from every other one."""
    x, y, z = (RNG.normal(size=(4, n)).astype(np.float32) for n in (2, 3, 1))
    network, decoder = (
        mlp_network(KEY, n, num_outputs=k, widths=(4,)) for n, k in ((5, None), (1, 3))
    )
    base = dist.Normal(0.5, 2.0).expand((3,)).to_event(1)
    model, _ = made(conditional_energy(network, 3, base=base), y, x)
    energies = jax.vmap(network)(np.concatenate([x, y], -1))
    expected = stats.norm(0.5, 2.0).logpdf(y).sum() - float(energies.sum())
    np.testing.assert_allclose(log_joint(model, y, x), expected, rtol=1e-5)
    network = mlp_network(KEY, 1, widths=(4,))
    model, _ = made(latent_prior(network, decoder, 1, noise_scale=0.4), y)
    of_rows = stats.norm(jax.vmap(decoder)(z), 0.4).logpdf(y).sum()
    expected = stats.norm.logpdf(z).sum() - float(jax.vmap(network)(z).sum()) + of_rows
    np.testing.assert_allclose(log_joint(model, y, z=z), expected, rtol=1e-5)


def test_the_guide_of_a_grbm_contains_its_posterior():
    W, c, v = RNG.normal(size=(2, 3)), RNG.normal(size=3), RNG.normal(size=(4, 2))
    params = {"W": W, "c": c, "b": RNG.normal(size=2), "scale": np.array([0.7, 1.3])}
    q = ebm.fixed(partial(grbm_guide, num_visible=2, num_hidden=3), {"A": W, "d": c})
    model = ebm.fixed(partial(grbm, num_visible=2, num_hidden=3), params)
    states = [np.tile(h, (4, 1)) for h in itertools.product((0, 1), repeat=3)]
    found = [log_joint(seed(q, KEY), v, h=h) - log_joint(model, v, h=h) for h in states]
    np.testing.assert_allclose(found, found[0], rtol=1e-4)  # log p(v), whatever h is
    assert logsumexp([log_joint(seed(q, KEY), v[:1], h=h[:1]) for h in states]) == pytest.approx(
        0.0, abs=1e-4
    )


def test_logits_of_a_jem_are_at_the_temperature_of_the_fit():
    network = mlp_network(KEY, 2, num_outputs=3, widths=(4,))
    v = RNG.normal(size=(4, 2)).astype(np.float32)
    _, params = made(jem(network, 2, 3), v, np.zeros(4, int))
    found = jem_logits(network, {**params, "fit_temperature": 0.25}, v)
    np.testing.assert_allclose(found, 4.0 * jax.vmap(network)(v), rtol=1e-5)


@pytest.mark.slow
def test_a_quadratic_conditional_energy_is_a_regression():
    """E = ½ a (y - c·x)² - log N(y; 0, 1): Gaussian, with a normalizer for every row."""
    a, c = 3.0, np.array([0.7, -1.2])
    network = Quadratic(jnp.array([-c[0], -c[1], 1.0]), a)
    x, y = RNG.normal(size=(4, 2)).astype(np.float32), RNG.normal(size=4).astype(np.float32)
    model, _ = made(conditional_energy(network), y, x)
    found = ebm.log_likelihood(KEY, model, y, x)
    expected = stats.norm(a * x @ c / (1 + a), (1 + a) ** -0.5).logpdf(y)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_is_no_part_of_a_model_is_refused():
    network = mlp_network(KEY, 2, num_outputs=4, widths=(3,))
    rows = mlp_network(KEY, (2, 2), num_outputs=2, widths=(3,))
    v = np.zeros((3, 2))
    for model, args, words in (
        (neural_energy(lambda x: 0.0, 2), (v,), "`network` must be an equinox module"),
        (jem(network, 2, 3), (v, np.zeros(3, int)), "num_outputs=3"),
        (deep_eblvm_guide(network, 3), (v,), "num_outputs=6"),
        (conditional_energy(network), (v,), r"model\(y, x\)"),
        (noise_conditional_energy(rows, 2, data_scale=1.0), (v,), "without `num_outputs`"),
        (latent_prior(network, None, 2), (v,), "`decoder` must be an equinox module"),
    ):
        with pytest.raises(ebm.ModelError, match=words):
            trace(seed(model, KEY)).get_trace(*args)
    for make in (
        lambda: neural_energy(network, 2, base=dist.Normal(0.0, 1.0)),
        lambda: neural_energy(network, (2, 2), base=dist.Normal(0.0, 1.0).expand((2,)).to_event()),
        lambda: noise_conditional_energy(network, 2, data_scale=0.0),
        lambda: jem(network, 2, 1),
        lambda: latent_prior(network, network, 0),
        lambda: latent_prior(network, network, 2, noise_scale=-1.0),
        lambda: deep_eblvm(network, network, network, 2, ebm.Counting(2)),
        lambda: jem_logits(network, {}, v),
    ):
        with pytest.raises(ebm.ModelError):
            make()
