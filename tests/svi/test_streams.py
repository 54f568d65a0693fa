# SPDX-License-Identifier: Apache-2.0
"""Batches one after the other: the same fit as from memory, and every wrong batch said."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer.autoguide import AutoNormal

import numpyro_ebm as ebm

rng = np.random.default_rng(8)
DATA = rng.normal(1.0, 2.0, (96, 3)).astype(np.float32)
GROUP = rng.integers(0, 2, 96)


def model(data, group=None, *, shift=0.0):
    mean = numpyro.param("mean", jnp.zeros((2, 3)))
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
        center = mean[0] if group is None else mean[group]
        ebm.energy("E", 0.5 * precision * jnp.sum((v - center - shift) ** 2, -1))


def svi(objective=None, a_model=model, **options):
    objective = ebm.DenoisingScoreMatching(0.3) if objective is None else objective
    return ebm.EnergySVI(a_model, None, optax.adam(0.1), objective, **options)


ONE = svi()  # its rounds are compiled once for all tests


def run(num_steps, *args, one=ONE, **options):
    return one.run(jax.random.key(1), num_steps, *args, progress_bar=False, **options)


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert jnp.array_equal(x, y)


def cut(size, *arrays):
    """Batches in their order; the last one has fewer rows where ``size`` does not divide them."""
    return [tuple(x[i : i + size] for x in arrays) for i in range(0, len(arrays[0]), size)]


def one_by_one(batches, one=None):
    """What a run comes to: `update` at one batch after the other."""
    one = svi() if one is None else one
    state, losses = one.init(jax.random.key(1), *batches[0]), []
    for batch in batches:
        state, loss = jax.jit(one.update)(state, *batch)
        losses.append(loss)
    return state, losses


class Loader:
    """An iterable that begins anew for every epoch, as data loaders do."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Tensor:
    """An array of another library."""

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, x.shape, str(x.dtype)

    def __array__(self, dtype=None, copy=None):
        return self.x if dtype is None else self.x.astype(dtype)


def test_batches_of_an_iterable_are_those_of_update():
    batches = cut(32, DATA, GROUP)
    state, losses = one_by_one(list(itertools.islice(itertools.cycle(batches), 8)))
    sources = [
        itertools.cycle(batches),
        Loader([list(map(Tensor, batch)) for batch in batches]),
        lambda: (batch for batch in batches),
    ]
    for source in sources:
        fit = run(8, source)
        np.testing.assert_allclose(fit.losses, losses, rtol=2e-6)
        np.testing.assert_allclose(
            fit.params["mean"], svi_params(state)["mean"], rtol=1e-5, atol=1e-6
        )


def test_batches_may_be_dicts_of_tensors():
    """As those of tf.data are; and arrays whose elements are objects."""

    def by_name(batch, *, shift=0.0):
        model(batch["rows"], batch["group"], shift=shift)

    batches = cut(32, DATA, GROUP)
    one = svi(a_model=by_name)
    ways = [
        [{"rows": rows, "group": group} for rows, group in batches],
        [{"rows": Tensor(rows), "group": Tensor(group)} for rows, group in batches],
        [{"rows": rows, "group": group.astype(object)} for rows, group in batches],
    ]
    fits = [run(5, Loader(way), one=one) for way in ways]
    for fit in fits[1:]:
        assert_same(fit.losses, fits[0].losses)


def svi_params(state):
    one = svi()
    one.init(jax.random.key(1), *cut(32, DATA, GROUP)[0])
    return one.get_params(state)


def test_arguments_after_the_batches_stay():
    batches = [data for (data,) in cut(32, DATA)]
    fit = run(5, Loader(batches), GROUP[:32])
    expected = run(5, Loader([(data, GROUP[:32]) for data in batches]))
    assert_same(fit.state, expected.state)


def sized(data, *, width=2, levels=None):
    """A model whose event shape, or support, is an argument that `EnergySVI` holds."""
    mean = numpyro.param("mean", jnp.zeros(width))
    support = dist.constraints.real if levels is None else dist.constraints.interval(*levels)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((width,), support), obs=data)
        ebm.energy("E", 0.5 * jnp.sum((v - mean) ** 2, -1))


@pytest.mark.parametrize(
    "static",
    [{"width": 3}, pytest.param({"width": 3, "levels": (-20.0, 20.0)}, marks=pytest.mark.slow)],
)
def test_batches_are_judged_with_the_arguments_that_are_held(static):
    one, batches = svi(a_model=sized, **static), cut(16, DATA)
    np.testing.assert_allclose(
        run(6, iter(batches), one=one).losses, one_by_one(batches, one)[1], rtol=1e-5
    )


def test_rows_on_disk_are_those_in_memory(tmp_path):
    np.save(tmp_path / "rows.npy", DATA)
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    fit, expected = (run(20, x, GROUP, batch_size=20) for x in (stored, DATA))
    assert_same((fit.state, fit.losses), (expected.state, expected.losses))
    more = run(
        12, stored, GROUP, batch_size=20, init_state=run(8, stored, GROUP, batch_size=20).state
    )
    assert_same(more.state, expected.state)
    with pytest.raises(ebm.ModelError, match="one number of rows"):
        run(3, stored, stored[:50], batch_size=20)
    with pytest.raises(ebm.ModelError, match="as many as that"):
        run(3, stored, batch_size=97)


def chains():
    kernel = lambda model: ebm.MALA(model, step_size=0.5)  # noqa: E731
    return ebm.ContrastiveDivergence(kernel, persistent=True)


@pytest.mark.parametrize("objective", [None, pytest.param(chains, marks=pytest.mark.slow)])
def test_a_stream_goes_on_where_it_was(objective, monkeypatch):
    # Blocks of few batches, so that rounds end inside of them and between them.
    monkeypatch.setattr("numpyro_ebm.svi.streamed.BLOCK_BYTES", 5 * 32 * 3 * 4)
    objective = None if objective is None else objective()
    batches, one = [data for (data,) in cut(32, DATA)], svi(objective)
    whole = run(23, Loader(batches), one=one)
    first = run(9, Loader(batches), one=one)
    second = run(14, Loader(batches), one=one, init_state=first.state)
    assert_same(second.state, whole.state)
    # An iterator is read as far as its rounds go, and no further; of three batches by turns, ten.
    iterator = itertools.cycle(batches)
    first = run(10, iterator, one=one)
    second = run(13, iterator, one=one, init_state=first.state)
    assert_same(second.state, whole.state)


def test_a_shorter_batch_is_left_out():
    batches = [data for (data,) in cut(36, DATA)]  # 36, 36, 24
    assert_same(run(7, Loader(batches)).state, run(7, Loader(batches[:2])).state)


def test_a_wrong_batch_ends_the_run_and_loses_nothing():
    batches = [data for (data,) in cut(32, DATA)]
    nan = batches[1].copy()
    nan[3, 1] = np.nan
    expected = run(4, Loader(batches))
    wrong = {
        "NaN": nan,
        r"\['other'\] float32\[32, 3\] and the first one was float": {"other": batches[0]},
        r"is float32\[9, 2\]": batches[0][:9, :2],  # fewer rows, and something else besides
        r"float32\[32, 2\] and the first one was float32\[32, 3\]": batches[0][:, :2],
        r"float32\[40, 3\]": np.resize(DATA, (40, 3)),
        r"int64\[32, 3\]": batches[0].astype(np.int64),
        "holds text": np.full((32, 3), "a"),
        "is a masked array": np.ma.masked_less(batches[1], 0.0),
    }
    for message, batch in wrong.items():
        source = iter([*batches, batches[0], batch, batches[1]])
        with pytest.warns(ebm.InterruptedWarning, match=message) as caught:
            fit = run(9, source)
        assert len(fit.losses) == 4 and caught[0].message.result.state is fit.state
        assert_same(fit.state, expected.state)
    for batch in (nan, wrong["holds text"]):  # at the first one nothing was learned
        with pytest.raises(ebm.ModelError):
            run(2, iter([batch, batches[0]]))


def test_a_source_that_fails_ends_the_run():
    def batches():
        yield DATA[:32]
        yield DATA[32:64]
        raise OSError("the disk is gone")

    with pytest.warns(ebm.InterruptedWarning, match="OSError: the disk is gone") as caught:
        fit = run(9, batches)
    assert len(fit.losses) == 2
    assert isinstance(caught[0].message.__cause__, OSError)


def test_an_iterator_that_ends_early_says_so():
    with pytest.warns(ebm.InterruptedWarning, match="after 2 of 9 rounds"):
        fit = run(9, iter([DATA[:32], DATA[32:64]]))
    assert len(fit.losses) == 2 and np.isfinite(fit.losses).all()
    with pytest.raises(ebm.ModelError, match="yields no batch"):
        run(9, Loader([]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (list(DATA[:, 0]), "a float32, holds no array with rows"),  # the loader makes no batches
        ([None], "a NoneType, holds no array with rows"),
        ([()], "a tuple, holds no array with rows"),
        ([DATA[:32].tolist()], "a list, holds no array with rows"),
        (lambda: DATA, "makes batches returns an iterator .* got a ndarray"),
        (lambda: {"rows": DATA}, "got a dict"),
        (lambda: None, "got a NoneType"),
        ({"rows": iter([DATA[:32]])}, "an iterator of batches takes the place of the first"),
        (lambda rows: iter([rows]), "is a `function`, and the model failed on it .* data loader"),
    ],
)
def test_what_is_no_source_of_batches_is_told(source, message):
    source = Loader(source) if isinstance(source, list) else source
    with pytest.raises(ebm.ModelError, match=message):
        run(3, source)


def test_an_error_at_the_first_batch_tells_its_form():
    """A loader that gives rows one by one: the model sees a plate of as many rows as values."""
    with pytest.raises(ebm.ModelError, match="asks? for") as caught:
        run(3, Loader(list(DATA)))
    assert "The first batch of `EnergySVI.run` was float32[3]." in caught.value.__notes__


def test_batches_that_stay_short_end_the_run():
    """As the workers of a loader have a short one each; but an endless source has no last one."""
    full, *short = [DATA[:32]] + [DATA[:9]] * 8
    assert_same(run(5, Loader([full, *short])).state, run(5, Loader([full])).state)
    endless = itertools.chain([full, full], itertools.repeat(DATA[:9]))
    with pytest.warns(ebm.InterruptedWarning, match=r"\[9, 3\] and the first one was .*32"):
        fit = run(5, endless)
    assert len(fit.losses) == 2


class Zarr:
    """An array on disk without ``len``, as those of zarr."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.chunks = x, x.shape, x.dtype, (8, 3)

    def __getitem__(self, rows):
        assert (np.diff(rows) > 0).all()  # as h5py asks
        return self.x[rows]


class Table:
    """A dataset that is iterated by its batches, and has a shape, as Hugging Face's."""

    def __init__(self, batches):
        self.batches, self.shape = batches, (len(batches), 1)

    def __iter__(self):
        return iter(self.batches)


class Group:
    """Arrays by name, as of h5py, zarr and ``np.load`` of an npz file."""

    def keys(self):
        return ["x"]

    def __iter__(self):
        return iter(self.keys())

    def __getitem__(self, key):
        return DATA


def test_arrays_of_other_libraries_on_disk():
    assert_same(run(9, Zarr(DATA), batch_size=20).state, run(9, DATA, batch_size=20).state)
    batches = [data for (data,) in cut(32, DATA)]
    assert_same(run(4, Table(batches)).state, run(4, Loader(batches)).state)
    for options in ({}, {"batch_size": 8}):
        with pytest.raises(ebm.ModelError, match="a Group holds arrays by their names"):
            run(3, Group(), **options)


def test_discrete_rows_off_their_support_are_found():
    def bits(data):
        field = numpyro.param("field", jnp.zeros(3))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(2, event_shape=(3,)), obs=data)
            ebm.energy("E", -v @ field)

    good = rng.integers(0, 2, (8, 3))
    with pytest.warns(ebm.InterruptedWarning, match="leave its support"):
        fit = run(9, iter([good, good, 2 * good - 1]), one=svi(ebm.PseudoLikelihood(), bits))
    assert len(fit.losses) == 2


def test_arguments_that_are_no_batches():
    with pytest.raises(ebm.ModelError, match="would cut them once more"):
        run(2, Loader([DATA[:32]]), batch_size=8)
    with pytest.raises(ebm.ModelError, match="takes the place of the first argument"):
        run(2, DATA, iter([GROUP]))
    called = []

    def with_function(data, transform):
        called.append(transform)
        model(transform(data))

    run(2, DATA, lambda x: x, one=svi(a_model=with_function))  # a function of the model's own
    assert called


def bayesian(data):
    precision = numpyro.sample("precision", dist.HalfNormal(3.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum((v - 1.0) ** 2, -1))


@pytest.mark.slow
def test_priors_are_weighed_against_all_rows(tmp_path):
    batches = [data for (data,) in cut(32, DATA)]
    with pytest.raises(ebm.ModelError, match="num_rows=N"):
        run(2, Loader(batches), one=svi(a_model=bayesian))
    np.save(tmp_path / "rows.npy", DATA)
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    on_disk, in_memory = (
        run(9, x, one=svi(a_model=bayesian), batch_size=32) for x in (stored, DATA)
    )
    assert_same(on_disk.state, in_memory.state)
    guide = AutoNormal(ebm.prior(bayesian))
    one = ebm.EnergySVI(bayesian, guide, optax.adam(0.1), ebm.ScoreMatching(), num_rows=96)
    fit = one.run(jax.random.key(2), 3, Loader(batches), progress_bar=False)
    assert np.isfinite(fit.losses).all()
