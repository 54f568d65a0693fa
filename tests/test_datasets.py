# SPDX-License-Identifier: Apache-2.0
"""Laws of the toy datasets; the oracles are closed forms, quadrature and chi-square tests."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from numpyro_ebm import datasets
from numpyro_ebm.datasets import TOYS

NAMES = sorted(TOYS)
WITH_DENSITY = [name for name in NAMES if TOYS[name].log_density is not None]
WITH_ENTROPY = [name for name in NAMES if TOYS[name].entropy is not None]

# Midpoint rule on [-6, 6)^2: all jumps of the densities lie on cell borders, no feature is
# narrower than 8 cells, and the mass outside is below 1e-15.
STEP, CELLS = 0.01, 1200
MIDPOINTS = -6 + STEP * (np.arange(CELLS) + 0.5)

ARM = 9 * math.pi**2 / 2 - 2 * (-4 / (3 * math.pi)) / 4 + 2 * (2 - 8 / (9 * math.pi**2)) / 4
SQUARED_NORM = {  # E ||x||^2
    "checkerboard": 2 * (1 / 48 + 1 / 16) + 1 / 2,
    "checkerboard_4x4": 2 * 16 / 3,
    "cosine": 2.5**2 / 3 + 2.5**2 * (0.5 - math.sin(5.0) / 10) + 0.01,
    "eight_gaussians": (16 + 2 * 0.25) / 1.414**2,
    "moons": ((5.04 - 1.6 / math.pi) + (5.64 - 6.4 / math.pi)) / 2 + 0.08,
    "pinwheel": 4 * (1 + 0.3**2 + 0.1**2),
    "rings": 0.75**2 * (1 + 4 + 9 + 16) / 4 + 2 * 0.08**2,
    "swiss_roll": (math.pi**2 * (1.5**2 + 1.5 * 4.5 + 4.5**2) / 3 + 2) / 25,
    "twenty_five_gaussians": (2 * 2 * 4 + 2 * 0.04) / 1.414**2,
    "two_spirals": (ARM + 2 / 12) / 9 + 2 * 0.01,
}


def x64():
    """Double precision inside of a ``with``, under the names of older and newer JAX."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64(True)


@pytest.fixture(scope="module")
def density():
    """``density(name)``: the density at all midpoints of the grid, in double precision."""
    known = {}

    def evaluate(name):
        if name not in known:
            with x64():
                rows = jnp.stack(jnp.meshgrid(MIDPOINTS, MIDPOINTS, indexing="ij"), -1)
                row_log_density = TOYS[name].log_density
                known[name] = np.exp(jax.jit(lambda r: jax.lax.map(row_log_density, r))(rows))
        return known[name]

    return evaluate


@pytest.mark.parametrize("name", NAMES)
def test_sample_is_a_pure_function_of_its_key(name):
    toy = getattr(datasets, name)
    x = toy(jax.random.key(1), 500)
    assert toy is TOYS[name].sample
    assert x.shape == (500, 2)
    assert x.dtype == jnp.result_type(float)
    assert jnp.isfinite(x).all()
    np.testing.assert_array_equal(x, toy(jax.random.key(1), 500))
    np.testing.assert_array_equal(x, toy(jax.random.PRNGKey(1), 500))
    assert (x != toy(jax.random.key(2), 500)).any(-1).all()
    assert len(np.unique(x, axis=0)) == 500
    assert toy(jax.random.key(1), 1).shape == (1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_jit_equals_eager(name):
    toy, key = TOYS[name].sample, jax.random.key(3)
    expected = toy(key, 500)
    by_position = jax.jit(toy, static_argnums=1)(key, 500)
    by_name = jax.jit(toy, static_argnames="num_samples")(key, num_samples=500)
    np.testing.assert_allclose(by_position, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(by_name, by_position)


@pytest.mark.parametrize("name", NAMES)
def test_double_precision(name):
    with x64():
        x = TOYS[name].sample(jax.random.key(4), 20)
        assert x.dtype == jnp.float64
        if name in WITH_DENSITY:
            assert datasets.log_density(name, x).dtype == jnp.float64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_samples", [0, -1, 2.0, "3", None, True, (2,)])
def test_bad_num_samples_raises(name, num_samples):
    with pytest.raises(ValueError, match="num_samples must be a positive int"):
        TOYS[name].sample(jax.random.key(0), num_samples)


def test_traced_num_samples_raises():
    with pytest.raises(ValueError, match="static under jax.jit"):
        jax.jit(datasets.moons)(jax.random.key(0), 5)


@pytest.mark.parametrize("name", NAMES)
def test_squared_norm(name):
    x = np.asarray(TOYS[name].sample(jax.random.key(5), 100_000), float)
    squared_norm = (x**2).sum(-1)
    error = squared_norm.std() / math.sqrt(len(x))
    assert abs(squared_norm.mean() - SQUARED_NORM[name]) < 4 * error


@pytest.mark.parametrize("name", ["pinwheel", "two_spirals"])
def test_rotational_symmetry(name):
    order = {"pinwheel": 5, "two_spirals": 2}[name]
    x = np.asarray(TOYS[name].sample(jax.random.key(6), 50_000), float)
    z = x[:, 0] + 1j * x[:, 1]
    for power in range(1, order):  # E z^k = 0 for every k that the order does not divide
        error = np.sqrt((np.abs(z**power) ** 2).mean() / len(z))
        assert abs((z**power).mean()) < 4 * error
    error = np.sqrt((np.abs(z**order) ** 2).mean() / len(z))
    assert abs((z**order).mean()) > 10 * error


@pytest.mark.parametrize("name", ["moons", "swiss_roll"])
def test_noise_around_the_curve(name):
    """The distance to the noise-free curve is nearly |N(0, s^2)| (half normal)."""
    if name == "moons":
        t, scale = np.linspace(0, math.pi, 1000), 0.2
        upper = 2 * np.stack([np.cos(t), np.sin(t)], -1)
        curve = np.concatenate([upper, np.array([2.0, 1.0]) - upper]) - np.array([1.0, 0.2])
    else:
        t, scale = np.linspace(1.5 * math.pi, 4.5 * math.pi, 2000)[:, None], 0.2
        curve = t * np.concatenate([np.cos(t), np.sin(t)], -1) / 5
    x = np.asarray(TOYS[name].sample(jax.random.key(7), 2000), float)
    distance = np.sqrt(((x[:, None] - curve) ** 2).sum(-1).min(1))
    expected = scale * math.sqrt(2 / math.pi)
    np.testing.assert_allclose(distance.mean(), expected, rtol=0.05)


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_density_integrates_to_one(name, density):
    np.testing.assert_allclose(density(name).sum() * STEP**2, 1.0, atol=1e-10)


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_samples_follow_the_density(name, density):
    """Pearson's chi-square over squares of side 1/4; squares expecting fewer than 10 are pooled."""
    num_samples, block = 50_000, 25
    side = CELLS // block
    expected = density(name).reshape(side, block, side, block).sum((1, 3)) * STEP**2 * num_samples
    x = np.asarray(TOYS[name].sample(jax.random.key(8), num_samples))
    edges = np.linspace(-6, 6, side + 1)
    observed = np.histogram2d(*x.T, bins=(edges, edges))[0]
    assert observed[expected == 0].sum() == 0

    large = expected >= 10
    expected = np.append(expected[large], expected[~large].sum())
    observed = np.append(observed[large], num_samples - observed[large].sum())
    if expected[-1] < 10:  # too little to count as a cell of its own
        assert observed[-1] <= 30
        expected, observed = expected[:-1], observed[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    dof = len(expected) - 1
    assert dof >= 7
    assert abs(statistic - dof) < 4 * math.sqrt(2 * dof)


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_entropy(name, density):
    p = density(name)
    quadrature = -np.sum(p[p > 0] * np.log(p[p > 0])) * STEP**2
    if name in WITH_ENTROPY:
        np.testing.assert_allclose(TOYS[name].entropy, quadrature, atol=1e-8)

    x = TOYS[name].sample(jax.random.key(9), 50_000)
    surprise = -np.asarray(datasets.log_density(name, x), float)
    assert np.isfinite(surprise).all()
    error = surprise.std() / math.sqrt(len(surprise))
    assert abs(surprise.mean() - quadrature) < 4 * error + 1e-5


@pytest.mark.parametrize(
    "name, quoted, no_overlap, published, error",
    [
        ("eight_gaussians", 2.83188, 2.8382, 2.8327, 0.0015),
        ("twenty_five_gaussians", 2.14503, 2.1450, 2.1437, 0.0016),
    ],
)
def test_entropies_of_the_mixtures(name, quoted, no_overlap, published, error, density):
    p = density(name)
    entropy = -np.sum(p * np.log(np.maximum(p, 1e-300))) * STEP**2
    components, scale = {"e": (8, 0.5 / 1.414), "t": (25, 0.2 / 1.414)}[name[0]]
    closed = math.log(components * 2 * math.pi * math.e * scale**2)
    assert abs(entropy - quoted) < 1e-5
    assert abs(closed - no_overlap) < 5e-5
    assert entropy < closed
    assert abs(entropy - published) < 4 * error


def test_best_checkerboard_log_likelihoods():
    x = datasets.checkerboard(jax.random.key(10), 1000)
    np.testing.assert_allclose(datasets.log_density("checkerboard", x), math.log(2), rtol=1e-6)
    assert TOYS["checkerboard"].entropy == -math.log(2)
    x = datasets.checkerboard_4x4(jax.random.key(10), 1000)
    np.testing.assert_allclose(
        datasets.log_density("checkerboard_4x4", x), -math.log(32), rtol=1e-6
    )
    assert round(TOYS["checkerboard_4x4"].entropy, 4) == 3.4657


def test_rings_density_is_the_integral_over_the_angle():
    s, points = 0.08, np.array([[0.7, 0.1], [-1.4, 0.6], [0.0, -3.1]])
    for x in points:
        total = 0.0
        for r in (0.75, 1.5, 2.25, 3.0):

            def at_angle(t, r=r, x=x):
                square = (x[0] - r * math.cos(t)) ** 2 + (x[1] - r * math.sin(t)) ** 2
                return math.exp(-square / (2 * s**2)) / (2 * math.pi * s**2)

            t = math.atan2(x[1], x[0])
            total += integrate.quad(at_angle, t - math.pi, t + math.pi, points=[t])[0]
        expected = math.log(total / (4 * 2 * math.pi))
        np.testing.assert_allclose(datasets.log_density("rings", x), expected, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_log_density_of_any_batch(name):
    function = TOYS[name].log_density
    x = TOYS[name].sample(jax.random.key(11), 5)
    flat = function(x)
    nested = jax.jit(function)(jnp.append(x, jnp.array([[jnp.nan, 0.0]]), 0).reshape(2, 3, 2))
    assert nested.shape == (2, 3)
    assert flat.dtype == nested.dtype == x.dtype
    assert jnp.isnan(nested[1, 2])
    np.testing.assert_allclose(nested.ravel()[:5], flat, rtol=1e-4, atol=1e-4)
    integers = jax.eval_shape(function, jnp.array([0, 0]))
    assert integers.shape == () and integers.dtype == jnp.result_type(float)


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_score_and_curvature_are_finite(name):
    """Score matching needs both; at the origin the norm of a point has no derivative."""
    x = jnp.append(TOYS[name].sample(jax.random.key(12), 5), jnp.zeros((1, 2)), 0)
    score = jax.grad(TOYS[name].log_density)
    both = jax.jit(jax.vmap(lambda point: (score(point), jax.jacfwd(score)(point))))
    assert all(jnp.isfinite(value).all() for value in both(x))


@pytest.mark.parametrize("x", [0.0, [1.0], [[1.0, 2.0, 3.0]]])
def test_points_of_a_wrong_shape_raise(x):
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\)"):
        datasets.log_density("rings", x)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WITH_DENSITY)) + ["no_such_toy"])
def test_unknown_density_raises(name):
    with pytest.raises(ValueError, match=f"no exact log-density for '{name}'; known for: checker"):
        datasets.log_density(name, jnp.zeros(2))


def test_registry_is_read_only_and_complete():
    with pytest.raises(TypeError):
        TOYS["other"] = TOYS["moons"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOYS["moons"].entropy = 1.0
    assert set(NAMES) == set(datasets.__all__) - {"TOYS", "Toy", "dequantize", "log_density"}


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_complete(name):
    doc = TOYS[name].sample.__doc__
    for part in (".. math::", "Source:", "Parameters\n", "Returns\n", "Raises\n", "Examples\n"):
        assert part in doc
