# SPDX-License-Identifier: Apache-2.0
"""An energy that couples rows is refused, and no other.

The axis of the rows is followed through operations; whether that is right is told by the Jacobian,
over every operation of a registry.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.program.row_axes import row_axes
from numpyro_ebm.program.rows import MIXED

ROWS, WIDTH = 5, 4
rng = np.random.default_rng(0)
W = jnp.asarray(rng.normal(size=(WIDTH, 3)), jnp.float32)
V = rng.uniform(0.5, 1.5, size=(ROWS, WIDTH)).astype(np.float32)
TABLE = jnp.asarray(rng.normal(size=(7, 2)), jnp.float32)
OTHERS = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
KERNEL = jnp.asarray(rng.normal(size=(3, 1, 2)), jnp.float32)


def recurrent(v):
    def step(carry, x):
        carry = jnp.tanh(0.5 * carry + x[:, None] * W[0])
        return carry, carry.sum(-1)

    last, path = lax.scan(step, jnp.zeros((ROWS, 3)), v.T)
    return last.sum(-1) + path.sum(0)


def convolved(v):
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(v[..., None], KERNEL, (1,), "SAME", dimension_numbers=numbers)
    return jnp.sum(jax.nn.relu(y), (1, 2))


@jax.custom_jvp
def custom(x):
    return jnp.sin(x)


custom.defjvp(lambda x, t: (custom(x[0]), t[0] * jnp.cos(x[0])))


def index(v):
    return jnp.argmax(v, -1)


# Each row on its own, and known to be.
APART = {
    "elementwise": lambda v: jnp.tanh(v) * 2.0 + v**2,
    "scalars and other constants": lambda v: v * jnp.float32(3.0) + OTHERS,
    "broadcast of a column": lambda v: v[:, :1] * v,
    "sum": lambda v: jnp.sum(v, -1),
    "log-sum-exp": lambda v: jax.nn.logsumexp(v, -1),
    "softmax": lambda v: jax.nn.softmax(v, -1),
    "matmul": lambda v: v @ W,
    "matmul from the left": lambda v: W.T @ v.T,
    "einsum of pairs": lambda v: jnp.einsum("ni,nj->nij", v, v),
    "batched quadratic form": lambda v: jnp.einsum("ni,nij,nj->n", v, jnp.ones((ROWS, 4, 4)), v),
    "transposed": lambda v: v.T[:2],
    "moved to the middle": lambda v: jnp.moveaxis(v.reshape(ROWS, 2, 2), 0, 1),
    "reshape": lambda v: v.reshape(ROWS, 2, 2).sum(-1),
    "an axis merged into the rows": lambda v: jnp.tanh(v.reshape(-1, 2) @ W[:2]).reshape(ROWS, 6),
    "flat and back": lambda v: jnp.sin(v.reshape(-1)).reshape(ROWS, WIDTH),
    "one more axis": lambda v: v[:, None, :, None],
    "squeeze": lambda v: v[:, :1].squeeze(-1),
    "differences along a row": lambda v: jnp.diff(v, axis=-1),
    "cumulative sum": lambda v: jnp.cumsum(v, -1),
    "sorted": lambda v: jnp.sort(v, -1),
    "reversed": lambda v: v[:, ::-1],
    "padded": lambda v: jnp.pad(v, ((0, 0), (1, 2))),
    "concatenated": lambda v: jnp.concatenate([v, 2 * v, OTHERS], -1),
    "stacked": lambda v: jnp.stack([v, v**2]),
    "stacked at the end": lambda v: jnp.stack([v, v**2], -1),
    "split": lambda v: jnp.split(v, 2, -1)[0],
    "slice": lambda v: v[:, 1:3],
    "dynamic slice": lambda v: lax.dynamic_slice(v, (0, jnp.int32(1)), (ROWS, 2)),
    "dynamic update": lambda v: lax.dynamic_update_slice(v, OTHERS[:, :2], (0, 1)),
    "columns by number": lambda v: v[:, jnp.array([2, 0, 2])],
    "row's own column": lambda v: jnp.take_along_axis(v, index(v)[:, None], -1),
    "where": lambda v: jnp.where(v > 1.0, v, 0.5 * v),
    "clip": lambda v: jnp.clip(v, 0.7, 1.2),
    "jit": lambda v: jax.jit(lambda x: x @ W)(v),
    "checkpoint": lambda v: jax.checkpoint(lambda x: jnp.sin(x @ W))(v),
    "custom derivative": custom,
    "vmap": lambda v: jax.vmap(lambda x: jnp.outer(x, x) @ x)(v),
    "gradient": lambda v: jax.vmap(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ W))))(v),
    "cholesky": lambda v: jnp.linalg.cholesky(jnp.eye(4) + jnp.einsum("ni,nj->nij", v, v)),
    "top-k": lambda v: lax.top_k(v, 2)[0],
    "scan": recurrent,
    "convolution": convolved,
    "loop": lambda v: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, v)
    )[1],
    "one row after another": lambda v: lax.map(lambda x: jnp.tanh(x @ W), v),
    "one row after another, with data": lambda v: lax.map(lambda x: x[0] * x[1], (v, OTHERS)),
    "branches": lambda v: lax.cond(jnp.sum(OTHERS) > 0, jnp.sin, jnp.cos, v),
    "branches of a row": lambda v: lax.map(lambda x: lax.cond(x[0] > 1.0, jnp.sin, jnp.cos, x), v),
    "a place by the row's number": lambda v: v[jnp.arange(ROWS), index(v)],
    "a column set": lambda v: v.at[:, 1].set(0.0),
    "a column added to": lambda v: v.at[:, jnp.array([0, 2])].add(OTHERS[:, :2]),
}

# Rows read one another.
COUPLED = {
    "mean": lambda v: v - v.mean(0),
    "sum": lambda v: jnp.sum(v),
    "the largest": lambda v: v - jnp.max(v),
    "softmax over rows": lambda v: jax.nn.softmax(v, 0),
    "neighbours": lambda v: jnp.diff(v, axis=0, prepend=jnp.zeros((1, WIDTH))),
    "cumulative sum": lambda v: jnp.cumsum(v, 0),
    "reversed": lambda v: v + v[::-1],
    "rolled": lambda v: v * jnp.roll(v, 1, 0),
    "sorted": lambda v: jnp.sort(v, 0),
    "a sum over a merged axis": lambda v: v - v.reshape(-1, 2).mean(0).sum(),
    "merged, and another way back": lambda v: v.reshape(-1, 2).T.reshape(ROWS, WIDTH),
    "a step handed on": lambda v: lax.scan(lambda c, x: (x, x - c), jnp.zeros(2), v.reshape(-1, 2))[
        1
    ].reshape(ROWS, WIDTH),
    "Gram matrix": lambda v: jnp.sum(v @ v.T, -1),
    "contracted": lambda v: v @ (v.T @ v),
    "rows by number": lambda v: v[jnp.array([1, 0, 3, 2, 4])],
    "rows by a row's number": lambda v: v[index(v)],
    "flattened": lambda v: (v.reshape(-1)[::-1]).reshape(ROWS, WIDTH),
    "elements in another order": lambda v: v.T.reshape(ROWS, WIDTH, order="F"),
    "another split of the elements": lambda v: v.reshape(WIDTH, ROWS).T * v,
    "scan over rows": lambda v: lax.scan(lambda c, x: (c + x, c * x), v[0], v)[1],
    "batch normalisation": lambda v: (v - v.mean(0)) / jnp.sqrt(v.var(0) + 1e-3),
    "solve": lambda v: jnp.linalg.solve(jnp.eye(ROWS) + v @ v.T, OTHERS),
    "jit": lambda v: jax.jit(lambda x: x - x.mean(0))(v),
    "sums over groups": lambda v: jax.ops.segment_sum(v, jnp.array([0, 1, 0, 1, 2]), ROWS),
    "a number handed on": lambda v: lax.scan(lambda c, x: (x, c * x), v[0], v)[1],
    "a loop as long as the rows say": lambda v: lax.fori_loop(
        0, jnp.int32(jnp.sum(v)), lambda _, x: jnp.sin(x), v
    ),
    "all rows, one after another": lambda v: lax.map(lambda x: x * v.sum(), v),
    "a row set": lambda v: v.at[2].set(v[1]),
}

# Each row on its own, but no rule knows it.
UNKNOWN = {
    "there and back": lambda v: v[::-1][::-1],
    "one part after another": lambda v: jnp.concatenate([v[:2] ** 2, v[2:] ** 2]),
    "a place of all rows": lambda v: OTHERS[tuple((index(v) * 0 + 1)[:2])] * v,
    "pieces, one after another": lambda v: lax.map(
        jnp.sin, jnp.concatenate([v, v[:1]]), batch_size=2
    )[:ROWS],
    "diagonal of all pairs": lambda v: jnp.diagonal(v @ v.T),
    "as many rounds as the slowest row needs": lambda v: jax.vmap(
        lambda x: lax.while_loop(lambda y: y[0] > 0.1, lambda y: 0.5 * y, x)
    )(v),
}


def rows_read(fn, axis):
    """Whether row i of the result reads row j of the argument, by the Jacobian."""
    jacobian = np.asarray(jax.jacfwd(fn)(jnp.asarray(V)))
    jacobian = np.moveaxis(jacobian, axis, 0).reshape(ROWS, -1, ROWS, WIDTH)
    return np.abs(jacobian).max((1, 3)) > 1e-6


@pytest.mark.parametrize("name", APART)
def test_rows_that_are_apart_are_followed(name):
    (axis,) = row_axes(APART[name], jnp.asarray(V), [0])
    assert isinstance(axis, int)
    reads = rows_read(APART[name], axis)
    assert reads.any()
    np.testing.assert_array_equal(reads & ~np.eye(ROWS, dtype=bool), False)


@pytest.mark.parametrize("name", [*COUPLED, *UNKNOWN])
def test_rows_that_are_not_known_to_be_apart_are_mixed(name):
    assert row_axes({**COUPLED, **UNKNOWN}[name], jnp.asarray(V), [0]) == [MIXED]


def test_what_reads_no_row_has_none():
    found = row_axes(
        lambda x: (x["w"] @ W, x["v"].T, len(x["v"]) * 1.0), {"v": V, "w": W.T}, [0, None]
    )
    assert found == [None, 1, None]


# Models


def model_of(energy, fn=None, size=None):
    fn = ebm.Lebesgue(event_shape=(WIDTH,)) if fn is None else fn

    def model(data=None):
        shift = numpyro.param("shift", 0.0)  # at which a product with v - shift hides nothing
        with numpyro.plate("rows", ROWS if size is None else size):
            v = numpyro.sample("v", fn, obs=data)
            value = energy(v - shift)
            ebm.energy("E", jnp.sum(value.reshape(len(value), -1) ** 2, -1) + jnp.sum(v**2, -1))

    return model


def see(model, data=V):
    """What every objective does first."""
    return read_model(model, (jnp.asarray(data),)).num_rows


@pytest.mark.parametrize("name", [x for x in COUPLED if x != "sum"])
def test_energies_that_couple_rows_are_refused(name):
    with pytest.raises(
        ebm.ModelError, match="'E' of a row depends on other rows of the plate 'rows'"
    ):
        see(model_of(COUPLED[name]))


APART_AS_ENERGIES = [
    name for name in APART if not name.startswith(("matmul from", "transposed", "moved", "stacked"))
]


@pytest.mark.parametrize("name", [*APART_AS_ENERGIES, *UNKNOWN])
def test_energies_of_one_row_are_not(name):
    found = read_model(model_of({**APART, **UNKNOWN}[name]), (jnp.asarray(V),))
    assert any("not followed" in x for x in found.covariates) == (name in UNKNOWN)


def test_all_rows_are_tried_at_their_own_scale():
    """What no rule knows is evaluated at the data: a coupling far out is out of reach of others."""

    def model(data, couple):
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            far = jnp.maximum(jnp.abs(v - v[::-1]) - 150.0, 0.0)
            ebm.energy("E", v**2 + couple * far)

    data = jnp.linspace(-100.0, 100.0, 1_000)
    objective = ebm.ScoreMatching()
    objective.loss(jax.random.key(0), {}, model, None, data, 0.0)
    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        objective.loss(jax.random.key(0), {}, model, None, data, 1.0)


def test_a_plate_of_a_size_of_its_own_is_looked_at_whole():
    data = jnp.asarray(rng.normal(size=(40, WIDTH)), jnp.float32)
    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        see(model_of(COUPLED["mean"], size=40), data)
    assert see(model_of(UNKNOWN["there and back"], size=40), data) == 40


def test_parameters_are_tried_on_their_support():
    def model(data):
        rate = numpyro.param("rate", 1.0, constraint=dist.constraints.positive)
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", v**2 + jnp.log(rate) * jnp.mean(v) * v)

    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        see(model, jnp.ones(4))


HIDDEN = {
    "the first row, and no other": lambda v: v * v[::-1][::-1][0],
    "where the mean has a logarithm": lambda v: jnp.log(jnp.mean(v)),
    "far out only": lambda v: jnp.where(v > 1.5, jnp.mean(v), 0.0),
    "a little": lambda v: 1e-4 * jnp.mean(v) * v,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_couplings_that_are_easy_to_miss(name):
    def model(data):
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", v**2 + HIDDEN[name](v))

    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        see(model, jnp.ones(300))


def test_the_parity_of_another_row_is_seen():
    def model(data):
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Counting(event_shape=(4,)), obs=data)
            parity = jnp.prod(2 * v - 1, -1)
            ebm.energy("E", 1.0 * parity * jnp.roll(parity, 1) + jnp.sum(v, -1))

    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        ebm.PseudoLikelihood().loss(jax.random.key(0), {}, model, None, jnp.ones((6, 4), int))


SUPPORTS = {
    "simplex": (dist.constraints.simplex, (3,)),
    "ordered": (dist.constraints.ordered_vector, (3,)),
    "interval": (dist.constraints.open_interval(2.0, 3.0), ()),
    "Cholesky": (dist.constraints.lower_cholesky, (2, 2)),
    "from one": (dist.constraints.greater_than(1.0), ()),
}


@pytest.mark.parametrize("num_rows", [5, 300])
@pytest.mark.parametrize("name", SUPPORTS)
def test_supports_are_kept_where_the_data_are_traced(name, num_rows):
    """An energy that no rule knows, of data that are not at hand, on a support without ones."""
    support, shape = SUPPORTS[name]

    def model(data, x, couple):
        offset = x.at[0].get()  # arguments are arrays of JAX, as the user gave them
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(shape, support=support), obs=data)
            w = v[::-1][::-1] + offset + couple * v[::-1]
            ebm.energy("E", jnp.sum(w.reshape(len(w), -1) ** 2, -1))

    transform = dist.biject_to(support)
    data = transform(0.1 * jnp.ones(transform.inverse_shape((num_rows, *shape))))

    @partial(jax.jit, static_argnums=2)
    def seen(data, x, couple):
        return read_model(model, (data, x, couple)).num_rows

    assert seen(data, jnp.zeros(2), 0.0) == num_rows
    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        seen(data, jnp.zeros(2), 1.0)


def test_latents_of_other_rows_are_refused():
    def model(data):
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E", 0.5 * v**2 - v * jnp.roll(h, 1))

    objective = ebm.ScoreMatching(ebm.Enumerated())
    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        objective.loss(jax.random.key(0), {}, model, None, jnp.ones(4))


def test_discrete_rows_are_refused():
    def model(data):
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
            ebm.energy("E", jnp.sum(v * jnp.roll(v, 1, 0), -1))

    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        ebm.PseudoLikelihood().loss(jax.random.key(0), {}, model, None, jnp.ones((4, 3), int))


@pytest.mark.parametrize("make", [ebm.MALA, ebm.ULA, ebm.UnderdampedLangevin])
def test_kernels_refuse_coupled_rows(make):
    kernel = make(ebm.fixed(model_of(COUPLED["mean"]), {"shift": 0.0}), step_size=0.1)
    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        kernel.init(jax.random.key(0), 0, None, (), {})


@pytest.mark.parametrize("num_rows", [5, 300])
def test_kernels_take_observed_rows_as_given(num_rows):
    """With v observed, an energy of h that reads the mean of v has rows that are apart."""

    def model(data):
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", v**2 + (h[::-1][::-1] - v.mean()) ** 2)

    data = jnp.linspace(0.0, 1.0, num_rows)
    kernel = ebm.MALA(ebm.fixed(model, {}), step_size=0.1)
    assert kernel.init(jax.random.key(0), 0, None, (data,), {}) is not None
    with pytest.raises(ebm.ModelError, match="depends on other rows"):
        ebm.ScoreMatching().loss(jax.random.key(0), {}, model, None, data)


def test_random_numbers_of_an_energys_own_are_no_coupling():
    def model(data):
        noise = np.random.default_rng().normal(size=len(data))
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", v[::-1][::-1] ** 2 + jnp.asarray(noise) * v)

    assert see(model, jnp.ones(4)) == 4


def test_priors_and_covariates_may_be_shared():
    """Statistics of arguments, and parameters, belong to all rows."""

    def model(data, x):
        slope = numpyro.sample("slope", dist.Normal())
        with numpyro.plate("rows", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - slope * (x - x.mean()) / x.std()) ** 2)

    x = jnp.linspace(0.0, 1.0, 6)
    assert np.isfinite(
        ebm.ScoreMatching().loss(jax.random.key(0), {"slope": 1.0}, model, None, x, x)
    )
