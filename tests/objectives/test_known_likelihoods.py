# SPDX-License-Identifier: Apache-2.0
"""Networks that are trained by objectives without a likelihood, whose exact likelihood is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import numpyro_ebm as ebm

pytest.importorskip("equinox")
pytestmark = pytest.mark.slow
KEY = jax.random.key(0)

# A ring of eight Gaussians, in Gray code

BITS, SCALE = 5, 0.15
EDGES = np.linspace(-2.5, 2.5, 2**BITS + 1)
ANGLES = np.pi / 4 * np.arange(8)
CENTERS = 1.8 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)


def gray(cells):
    """The Gray code of cells: neighbours differ by one bit. (..., 2) -> (..., 2 BITS)."""
    code = cells ^ (cells >> 1)
    bits = (code[..., None] >> np.arange(BITS - 1, -1, -1)) & 1
    return bits.reshape(*cells.shape[:-1], 2 * BITS)


def draw_cells(num):
    rng = np.random.default_rng(0)
    x = CENTERS[rng.integers(0, 8, num)] + SCALE * rng.normal(size=(num, 2))
    return np.digitize(x, EDGES[1:-1])


def table_of_cells():
    """All pairs of cells, and their probabilities; cells at the ends hold what lies beyond."""
    edges = np.concatenate([[-np.inf], EDGES[1:-1], [np.inf]])
    shares = np.diff(stats.norm.cdf((edges - CENTERS[..., None]) / SCALE), axis=-1)  # (8, 2, cells)
    law = np.einsum("ki,kj->ij", shares[:, 0], shares[:, 1]) / 8
    return np.stack(np.meshgrid(*[np.arange(2**BITS)] * 2, indexing="ij"), -1), law


def test_energy_discrepancy_learns_a_ring_in_gray_code():
    """KL(p ‖ p_θ) over all 2^10 states; uniform bits are at 2.0 nats, the fit at 0.01."""
    cells, law = table_of_cells()
    network = ebm.models.mlp_network(KEY, 2 * BITS, widths=(64, 64))
    model = ebm.models.neural_energy(network, 2 * BITS, base=ebm.Counting(event_shape=(2 * BITS,)))
    optim = optax.adam(optax.cosine_decay_schedule(3e-3, 3_000, 0.02))
    objective = ebm.EnergyDiscrepancy(num_samples=16, flip_probability=0.1)
    svi = ebm.EnergySVI(model, None, optim, objective)
    rows = jnp.asarray(gray(draw_cells(20_000)))
    fit = svi.run(jax.random.key(1), 3_000, rows, batch_size=256, progress_bar=False)
    states = jnp.asarray(gray(cells).reshape(-1, 2 * BITS))
    found = np.asarray(ebm.log_likelihood(KEY, ebm.fixed(model, fit.params), states), float)
    np.testing.assert_allclose(np.exp(found).sum(), 1.0, rtol=1e-4)
    p = law.ravel()
    divergence = np.sum(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - found), 0.0))
    assert 10 * np.log(2) + np.sum(p[p > 0] * np.log(p[p > 0])) > 2.0
    assert 0 < divergence < 0.03
