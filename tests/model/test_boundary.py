# SPDX-License-Identifier: Apache-2.0
"""Data on the boundary of their support have no coordinates: refused, whoever asks for them.

Draws that are rounded to it have those of what they stand for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import mask

import numpyro_ebm as ebm
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_site import RowSite

KEY = jax.random.key(0)
INSIDE = [[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]
BOUNDARY = {
    "black": (constraints.unit_interval, INSIDE, [0.0, 0.3, 0.5]),
    "white": (constraints.unit_interval, INSIDE, [0.2, 1.0, 0.5]),
    "ends of an interval": (constraints.interval(-1.0, 2.0), INSIDE, [0.1, 2.0, 0.3]),
    "no events": (constraints.nonnegative, INSIDE, [0.4, 0.0, 2.0]),
    "a lower bound": (constraints.greater_than_eq(0.05), INSIDE, [0.05, 0.3, 0.3]),
    "an upper bound": (constraints.less_than_eq(0.9), INSIDE, [0.9, 0.3, 0.3]),
    "a share of nothing": (constraints.simplex, INSIDE, [0.0, 0.4, 0.6]),
    "nothing in the last place": (constraints.simplex, INSIDE, [0.4, 0.6, 0.0]),
    "half a turn": (constraints.circular, INSIDE, [0.1, np.pi, 0.3]),
}


def model(data, support):
    slope = numpyro.param("slope", jnp.ones(3))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((3,), support=support), obs=data)
        ebm.energy("E", v @ slope + jnp.sum(v**2, -1))


@pytest.mark.parametrize("name", BOUNDARY)
def test_data_on_the_boundary_are_refused(name):
    support, inside, edge = BOUNDARY[name]
    inside = jnp.asarray(inside)
    u = read_model(model, (inside, support)).unconstrain_visible()["v"]
    assert np.all(np.isfinite(u))
    with pytest.raises(ebm.ModelError, match="'v' lie on the boundary.* in 1 of .*dequantize"):
        read_model(model, (inside.at[1].set(jnp.array(edge)), support)).unconstrain_visible()


UNIT = constraints.unit_interval
OBJECTIVES = {
    "ScoreMatching": ebm.ScoreMatching(),
    "DenoisingScoreMatching": ebm.DenoisingScoreMatching(0.3),
    "EnergyDiscrepancy": ebm.EnergyDiscrepancy(0.5),
    "NCE": ebm.NCE(dist.Uniform(0.0, 1.0).expand([3]).to_event(1)),
    "ContrastiveDivergence": ebm.ContrastiveDivergence(lambda m: ebm.MALA(m, step_size=0.1)),
    "KernelSteinDiscrepancy": ebm.KernelSteinDiscrepancy(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_asks_for_coordinates(name):
    """All rows are looked at, not those of the first batch alone."""
    data = np.full((64, 3), 0.5, np.float32)
    data[-1, 1] = 1.0
    svi = ebm.EnergySVI(model, None, optax.adam(0.01), OBJECTIVES[name])
    with pytest.raises(ebm.ModelError, match="'v' lie on the boundary.* in 1 of 192"):
        svi.run(KEY, 2, data, UNIT, batch_size=8, progress_bar=False)


def test_new_data_are_looked_at_and_rows_that_do_not_count_are_not():
    data = jnp.array([[0.2, 0.5, 0.4], [0.0, 0.5, 1.0]])

    def masked(data, support):
        with mask(mask=jnp.array([True, False])):
            model(data, support)

    u = read_model(masked, (data, UNIT)).unconstrain_visible()["v"]
    assert np.all(np.isfinite(u))
    svi = ebm.EnergySVI(model, None, optax.adam(0.01), ebm.DenoisingScoreMatching(0.3))
    state = svi.init(KEY, data[:1], UNIT)
    with pytest.raises(ebm.ModelError, match="lie on the boundary"):
        svi.update(state, data[1:], UNIT)


def test_numbers_on_a_grid_spread_over_the_unit_interval():
    """Each over its own step, evenly, and nothing reaches the ends: however many levels."""
    levels = jnp.repeat(jnp.arange(4), 50_000)
    v = np.asarray(ebm.datasets.dequantize(KEY, levels, 4))
    assert v.dtype == np.float32
    np.testing.assert_array_equal(np.floor(4 * v), levels)
    rest = 4 * v - np.asarray(levels)
    error = np.sqrt(1 / 12 / len(rest))
    assert abs(np.mean(rest) - 0.5) < 4 * error and abs(12 * np.var(rest) - 1) < 0.02
    ends = np.asarray(ebm.datasets.dequantize(KEY, np.full(300_000, 255, np.uint8), 256))
    assert 255 / 256 <= ends.min() and ends.max() < 1
    zeros = np.asarray(ebm.datasets.dequantize(KEY, np.zeros(300_000), 65_536))
    assert 0 < zeros.min() and zeros.max() <= 1 / 65_536


@pytest.mark.parametrize(
    ("values", "num_levels", "message"),
    [
        ([0.0, 0.5], 17, "whole numbers from 0 to 16, and 1 of 2"),
        ([0, 16], 16, "from 0 to 15"),
        ([-1, 3], 16, "1 of 2"),
        ([0, float("nan")], 16, "1 of 2"),
        ([0, 1], 1, "num_levels must be an int of at least 2, got 1"),
        ([0, 1], 2.0, "got 2.0"),
        ([0, 1], True, "got True"),
    ],
)
def test_what_is_no_level_is_refused(values, num_levels, message):
    with pytest.raises(ValueError, match=message):
        ebm.datasets.dequantize(KEY, values, num_levels)


class EndOften(dist.Uniform):
    """A uniform distribution of which a share of the draws is rounded to the lower end."""

    share = 0.01

    def sample(self, key, sample_shape=()):
        x = super().sample(key, sample_shape)
        return jnp.where(
            jax.random.uniform(jax.random.fold_in(key, 7), x.shape) < self.share, self.low, x
        )


class MassAtTheEnd(EndOften):
    share = 0.5


def test_noise_that_rounds_to_an_end_is_drawn_anew_row_by_row():
    def model(data):
        mean = numpyro.param("mean", 0.5)
        with numpyro.plate("data", len(data)):
            support = constraints.interval(-1.0, 1.0)
            a = numpyro.sample("a", ebm.Lebesgue((2,), support), obs=data[:, :2])
            b = numpyro.sample("b", ebm.Lebesgue(), obs=data[:, 2])
            ebm.energy("E", jnp.sum((a - mean) ** 2, -1) + b**2)

    row_model = read_model(model, (jnp.full((30, 3), 0.1),))
    ends = EndOften(-1.0, 1.0)
    noise = Noise({"a": ends.expand([2]).to_event(1), "b": dist.Normal()}, row_model)
    first, found = noise._draw(jax.random.key(0), {}, 20), noise.draw(jax.random.key(0), {}, 20)
    rounded = ~np.isfinite(first["a"]).all(-1)
    assert 5 < rounded.sum() < 30 and np.isfinite(found["a"]).all()
    np.testing.assert_array_equal(found["b"] != first["b"], rounded)  # the whole row
    np.testing.assert_array_equal(found["a"][~rounded], first["a"][~rounded])
    often = MassAtTheEnd(-1.0, 1.0)  # is no accident
    noise = Noise({"a": often.expand([2]).to_event(1), "b": dist.Normal()}, row_model)
    assert not np.isfinite(noise.draw(jax.random.key(0), {}, 20)["a"]).all()


SUPPORTS = {
    "unit interval": (constraints.unit_interval, [0.0, 1.0]),
    "interval far from 0": (constraints.interval(3.0, 4.0), [3.0, 4.0]),
    "interval about 0": (constraints.interval(-1.0, 1.0), [-1.0, 1.0]),
    "positive": (constraints.positive, [0.0]),
    "greater than": (constraints.greater_than(100.0), [100.0]),
    "less than": (constraints.less_than(-7.0), [-7.0]),
    "circle": (constraints.circular, [-np.pi, np.pi]),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_draws_at_the_end_of_their_support_are_taken_beside_it(name):
    """By no more than rounding; what lies inside keeps its coordinates to the bit."""
    support, ends = SUPPORTS[name]
    fn = ebm.Lebesgue((3,), support=support)
    site = RowSite("v", fn, jnp.zeros((2, 3)), ("rows", "v_dim_0"))
    inside = site.transform(jnp.array([[-1.3, 0.2, 2.0], [0.1, 0.4, -0.6]]))
    for end in np.float32(ends):
        z = site.unconstrain_draw(inside.at[1, 2].set(end))
        assert np.all(np.isfinite(z))
        beside = abs(float(site.transform(z)[1, 2]) - end)
        assert beside <= 4 * np.finfo(np.float32).eps * max(abs(end), 1)
        np.testing.assert_array_equal(z[0], site.transform.inv(inside)[0])


def rounded(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", EndOften(0.0, 1.0), obs=data)
        ebm.energy("E", v)


@pytest.mark.slow
def test_base_measures_that_round_to_an_end_give_log_z():
    """∫ exp(-v) over the unit interval is 1 - 1/e, and a hundredth of the draws is 0 beside it."""
    found = ebm.log_normalizer(
        KEY,
        ebm.fixed(rounded, {}),
        jnp.full(1, 0.5),
        method="smc",
        num_particles=200,
        num_replicates=4,
    )
    exact = np.log(0.99 * (1 - np.exp(-1)) + 0.01)
    assert abs(found.value - exact) < 4 * found.mcse + 0.01
