# SPDX-License-Identifier: Apache-2.0
"""Mistakes with data and other arguments of a model."""

import datetime
from decimal import Decimal
from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from mistakes.setting import (
    BITS,
    FIXED,
    FIXED_BITS,
    KEY,
    LINE,
    Mistake,
    X,
    bayesian,
    chain,
    fit,
    ising,
    line,
    model_of,
    plane,
    plate,
    positive,
    rbm,
    svi,
)
from numpyro.infer import NUTS

import numpyro_ebm as ebm

PL = ebm.PseudoLikelihood
NP = np.asarray(X)
SHAPES = r"have shape {}, but its plates and event shape ask for {}\. Rows lead"
LIST = r"visible site 'v' are a `list`.*Pass `jnp.asarray\(data\)`"
MIXED = np.array([[1.0, "a"], [2.0, "b"]], dtype=object)


def shapes(found, expected):
    return SHAPES.format(
        *(str(x).replace("(", r"\(").replace(")", r"\)") for x in (found, expected))
    )


def sparse():
    from scipy.sparse import csr_matrix

    return csr_matrix(NP)


def of_covariates(data, x):
    a = numpyro.param("a", 1.0)
    with plate(x):
        y = numpyro.sample("y", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (y - a * x) ** 2)


def learn_categories(data=None):
    b = numpyro.param("b", jnp.zeros(3))
    with plate(data):
        ebm.energy("E", -b[numpyro.sample("v", ebm.Counting(3), obs=data)])


def masked(data, known):
    a = numpyro.param("a", 1.0)
    with plate(data):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data, obs_mask=known)
        ebm.energy("E", a * jnp.sum(v**2, -1))


def on(support):
    return model_of(lambda: ebm.Lebesgue((2,), support), lambda v, W: jnp.sum((v @ W) ** 2, -1))


def started(data):
    learner = svi()
    return learner.update(learner.init(KEY, X), data)


GRBM = {"W": jnp.eye(2), "b": jnp.zeros(2), "c": jnp.zeros(2), "scale": jnp.ones(2)}
ENTRIES = {  # every door for data, with a table whose column is text
    "fit": lambda data: fit(data=data),
    "init": lambda data: svi().init(KEY, data),
    "update": lambda data: svi().update(None, data),
    "evaluate": lambda data: svi().evaluate(None, data),
    "log_likelihood": lambda data: ebm.log_likelihood(KEY, FIXED, data),
    "log_normalizer": lambda data: ebm.log_normalizer(KEY, FIXED, data),
    "sample": lambda data: ebm.sample(KEY, FIXED, 1, data),
    "stein_test": lambda data: ebm.stein_test(KEY, FIXED, data),
    "fisher_divergence": lambda data: ebm.fisher_divergence(KEY, FIXED, data),
    "energy_gap": lambda data: ebm.energy_gap(KEY, FIXED, data, X),
    "MALA": lambda data: chain(ebm.MALA(FIXED), data),
    "BlockGibbs": lambda data: chain(ebm.BlockGibbs(FIXED), data),
    "normalized": lambda data: chain(NUTS(ebm.normalized(bayesian)), data),
    "generalized": lambda data: chain(NUTS(ebm.generalized(bayesian, ebm.ScoreMatching())), data),
    "Exchange": lambda data: chain(ebm.Exchange(bayesian, ebm.MALA), data),
    "NUTS on a fixed model": lambda data: chain(NUTS(FIXED), data),
    "to_arviz": lambda data: ebm.to_arviz({"v": X[:, None]}, FIXED, observed=data),
    "an objective's loss": lambda data: ebm.ScoreMatching().loss(
        KEY, {"W": jnp.eye(2)}, plane, None, data
    ),
    "grbm_log_likelihood": lambda data: ebm.models.grbm_log_likelihood(GRBM, data),
}

DATA = {
    "numbers for a vector": Mistake(lambda: fit(data=LINE), shapes((6,), (6, 2))),
    "three columns for two": Mistake(lambda: fit(data=jnp.ones((6, 3))), shapes((6, 3), (6, 2))),
    "columns lead": Mistake(lambda: fit(data=X.T), shapes((2, 6), (2, 2))),
    "an axis too many": Mistake(lambda: fit(data=X[:, None]), shapes((6, 1, 2), (6, 2))),
    "an axis of one, in a sampler's draws": Mistake(
        lambda: ebm.stein_test(KEY, FIXED, X[:, None]), shapes((6, 1, 2), (6, 2))
    ),
    "vectors for a number": Mistake(lambda: fit(line, data=X), shapes((6, 2), (6,))),
    "one row that lacks its axis": Mistake(lambda: fit(data=X[0]), r"ask for \(2,\): one energy"),
    "three columns, log_likelihood": Mistake(
        lambda: ebm.log_likelihood(KEY, FIXED, jnp.ones((6, 3))), shapes((6, 3), (6, 2))
    ),
    "three columns, NUTS": Mistake(
        lambda: chain(NUTS(FIXED), jnp.ones((6, 3))), shapes((6, 3), (6, 2))
    ),
    "three columns, update": Mistake(lambda: started(jnp.ones((6, 3))), shapes((6, 3), (6, 2))),
    "three columns with latent sites": Mistake(
        lambda: fit(rbm, data=jnp.ones((6, 3))), shapes((6, 3), (6, 2))
    ),
    "a list": Mistake(lambda: fit(data=NP.tolist()), LIST),
    "a list of bits": Mistake(lambda: fit(ising, data=[[0, 1]] * 3, loss=PL()), LIST),
    "a list, log_likelihood": Mistake(lambda: ebm.log_likelihood(KEY, FIXED, NP.tolist()), LIST),
    "a list, whose shape is asked": Mistake(
        lambda: fit(lambda data: line(data[: data.shape[0]]), data=NP[:, 0].tolist()),
        r"argument number 1 of the model is a list.*jnp.asarray",
    ),
    "a list of strings": Mistake(lambda: fit(data=[["a", "b"]] * 5), LIST),
    "a string": Mistake(lambda: fit(data="data.csv"), r"visible site 'v' are a `str`"),
    "strings": Mistake(lambda: fit(data=np.array([["a", "b"]])), "argument number 1 holds text"),
    "a dict": Mistake(lambda: fit(data={"v": X}), r"visible site 'v' are a `dict`"),
    "another number of covariates": Mistake(
        lambda: svi(of_covariates).run(KEY, 1, LINE[:4], LINE), shapes((4,), (6,))
    ),
    "one-hot vectors": Mistake(
        lambda: fit(learn_categories, data=jnp.eye(3), loss=PL()), shapes((3, 3), (3,))
    ),
    "objects": Mistake(lambda: fit(data=MIXED), r"holds objects \(float, str\)"),
    "objects without a value": Mistake(
        lambda: fit(data=np.array([[1.0, None]], dtype=object)), r"objects \(NoneType, float\)"
    ),
    "ragged rows": Mistake(
        lambda: fit(data=np.array([[1.0], [1.0, 2.0]], dtype=object)), r"holds objects \(list\)"
    ),
    "dates": Mistake(lambda: fit(data=np.array(["2020-01-01"], "M8[D]")), "holds dates"),
    "durations": Mistake(lambda: fit(data=np.array([1], "m8[D]")), "holds times"),
    "days as objects": Mistake(
        lambda: fit(data=np.array([datetime.date(2020, 1, 1)])), r"holds objects \(date\)"
    ),
    "records": Mistake(lambda: fit(data=np.zeros(3, [("a", "f4")])), "holds records"),
    "masked elements": Mistake(
        lambda: fit(data=np.ma.masked_greater(NP, 0)), "is a masked array.*obs_mask"
    ),
    "sparse": Mistake(lambda: fit(data=sparse()), r"is a sparse `csr_matrix`.*toarray"),
    "complex": Mistake(lambda: fit(data=np.asarray(X) + 1j), "'v' are complex"),
    "no rows": Mistake(lambda: fit(data=X[:0]), r"argument number 1.*is empty, of shape \(0, 2\)"),
    "no rows, log_likelihood": Mistake(
        lambda: ebm.log_likelihood(KEY, FIXED, X[:0]), r"is empty, of shape \(0, 2\)"
    ),
    "no data": Mistake(
        lambda: svi().run(KEY, 1, progress_bar=False), "no observed site.*Pass the data"
    ),
    "None for data": Mistake(lambda: ebm.stein_test(KEY, FIXED, None), "`data` is None"),
    "NaN": Mistake(lambda: fit(data=X.at[3].set(jnp.nan)), "contain NaN.*obs_mask"),
    "NaN, log_likelihood": Mistake(
        lambda: ebm.log_likelihood(KEY, FIXED, X.at[3].set(jnp.nan)), "contain NaN"
    ),
    "infinite": Mistake(lambda: fit(data=X.at[3].set(jnp.inf)), "contain infinite values"),
    "minus infinity": Mistake(
        lambda: ebm.stein_test(KEY, FIXED, X.at[3].set(-jnp.inf)), "contain infinite values"
    ),
    "spins for bits": Mistake(lambda: fit(ising, data=2 * BITS - 1, loss=PL()), "Recode them"),
    "halves for bits": Mistake(lambda: fit(ising, data=BITS * 0.5, loss=PL()), "leave its support"),
    "large values for bits": Mistake(lambda: fit(ising, data=BITS + 6, loss=PL()), "6 of 6 places"),
    "bits from 1": Mistake(
        lambda: ebm.log_likelihood(KEY, FIXED_BITS, BITS + 1), "leave its support"
    ),
    "negative numbers for positive": Mistake(lambda: fit(positive, data=LINE), "leave its support"),
    "numbers out of order": Mistake(
        lambda: fit(on(dist.constraints.ordered_vector), data=-jnp.sort(X, -1)), "leave its support"
    ),
    "weights that do not sum to one": Mistake(
        lambda: fit(on(dist.constraints.simplex), data=jnp.abs(X)), "leave its support"
    ),
    "a mask of event dimensions": Mistake(
        lambda: svi(masked).run(KEY, 1, X, X > 0), r"`obs_mask` of the site 'v' has shape \(6, 2\)"
    ),
    "other columns than those of W": Mistake(
        lambda: ebm.models.grbm_log_likelihood(GRBM, X[:, :1]), r"\(6, 1\).*for \(rows, 2\)"
    ),
    "zeros for positive": Mistake(
        lambda: fit(positive, data=jnp.zeros(3)), r"(leave|boundary of) its support"
    ),
    "a column of text": Mistake(
        lambda: fit(data=frame(species="a")), r"no numbers in the column\(s\) \['species'\]"
    ),
    "two columns of text": Mistake(
        lambda: fit(data=frame(species="a", day="b")), r"\['species', 'day'\]"
    ),
    "a column of dates": Mistake(
        lambda: fit(data=frame(day=np.datetime64("2020-01-01"))), r"column\(s\) \['day'\]"
    ),
    "text in a keyword argument": Mistake(
        lambda: svi(lambda data, *, names: plane(data)).run(KEY, 1, X, names=np.array(["a"])),
        "argument 'names' holds text",
    ),
    "text in a dict": Mistake(
        lambda: svi(lambda data: plane(data["x"])).run(KEY, 1, {"x": X, "y": np.array(["a"])}),
        r"argument number 1\['y'\] holds text",
    ),
    "text in a static argument": Mistake(
        lambda: svi(names=np.array(["a"])), "argument 'names' holds text"
    ),
    "too many arguments": Mistake(
        lambda: svi().run(KEY, 1, X, 2, X, progress_bar=False), "cannot be called with 3 argument"
    ),
} | {f"text, {k}": Mistake(partial(call, MIXED), "holds objects") for k, call in ENTRIES.items()}


def frame(**columns):
    import pandas as pd

    return pd.DataFrame(NP, columns=["a", "b"]).assign(**columns)


class Tensor:
    """What there is of a tensor of PyTorch that requires a gradient."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, "torch.float32"

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def __len__(self):
        return len(self.values)

    def detach(self):
        return self

    def cpu(self):
        return self.values


def total(v, W):
    """What booleans have no sum for."""
    return 1.0 * (v[..., 0] + v[..., 1])


PAIRS = ebm.fixed(model_of(lambda: ebm.Counting(2, (2,)), total), {"W": jnp.eye(2)})

CONVERTED = {  # taken as NP is
    "a data frame": lambda: frame(),
    "a data frame of objects": lambda: frame().astype(object),
    "objects": lambda: NP.astype(object),
    "decimals": lambda: np.array([[Decimal(float(x)) for x in row] for row in NP]),
    "a tensor": lambda: Tensor(NP),
    "no masked element": lambda: np.ma.asarray(NP),
}
BITS_CONVERTED = {  # taken as BITS are
    "booleans": lambda: np.asarray(BITS, bool),
    "bytes": lambda: np.asarray(BITS, np.uint8),
    "floats": lambda: np.asarray(BITS, float),
    "a data frame of booleans": lambda: frame().gt(0),
}
