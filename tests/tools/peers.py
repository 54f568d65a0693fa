# SPDX-License-Identifier: Apache-2.0
"""Models with energies on every route, each beside the same density in plain NumPyro.

The sites have the same names, so that a tool that draws with one key draws the same.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import cond, scan

import numpyro_ebm as ebm

ROUTES = ("fixed", "normalized", "generalized")
GROUP = np.array([0, 1, 1, 0, 1, 0])
X = np.array([0.3, -0.4, 0.1, 0.8, 0.0, -1.1])  # a covariate, closed over
DATA = np.array([1.2, 0.1, -0.3, 2.2, 0.9, 0.4])
PROBS = np.array([0.2, 0.5, 0.3])
CENTERS = np.array([-1.0, 0.5, 2.0])
LOG_2PI = float(np.log(2 * np.pi))


def of_rows(v, p, shift, route, is_peer, i=slice(None)):
    """v | p, shift ~ N(shift / p, 1 / p), or its score matching loss ½ (p v - shift)² - p."""
    v = jnp.asarray(DATA if v is None else v)[i]
    if not is_peer:
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        ebm.energy("E", 0.5 * p * v**2 - shift * v)
    elif route == "normalized":
        numpyro.sample("v", dist.Normal(shift / p, p**-0.5), obs=v)
    else:
        numpyro.factor("E", -(0.5 * (p * v - shift) ** 2 - p))


def basic(route, is_peer, size=None):
    """A precision, a mean for each of two groups, a `param` w; or latent p and m in every row."""

    def bayesian(v=None):
        w = numpyro.param("w", 1.0)
        p = numpyro.sample("p", dist.Gamma(3.0, 2.0))
        with numpyro.plate("groups", 2):
            m = numpyro.sample("m", dist.Normal(0.0, 2.0))
        with numpyro.plate("data", len(DATA), subsample_size=size) as i:
            shift = m[jnp.asarray(GROUP)[i]] + w * jnp.asarray(X)[i]
            of_rows(v, p, shift, route, is_peer, i)

    def in_rows(v=None):
        w = 1.3 if is_peer else numpyro.param("w", 1.0)
        v = jnp.asarray(DATA if v is None else v)
        with numpyro.plate("data", len(DATA), subsample_size=size) as i:
            p = numpyro.sample("p", dist.Gamma(3.0, 2.0))
            m = numpyro.sample("m", dist.Normal(0.0, 2.0))
            mean = m + w * jnp.asarray(X)[i]
            if is_peer:
                numpyro.sample("v", dist.Normal(mean, p**-0.5), obs=v[i])
                return
            v = numpyro.sample("v", ebm.Lebesgue(), obs=v[i])
            ebm.energy("E", 0.5 * p * (v - mean) ** 2 - 0.5 * jnp.log(p) + 0.5 * LOG_2PI)

    return in_rows if route == "fixed" else bayesian


class StartingFlat(dist.CategoricalProbs):
    """A categorical distribution whose draws, where chains start, are those of `Counting`."""

    def sample(self, key, sample_shape=()):
        return ebm.Counting(3).expand(self.batch_shape).sample(key, sample_shape)


def discrete(route, is_peer):
    """A discrete parameter k and a mean b; or both in every row."""

    def bayesian(v=None):
        k = numpyro.sample("k", dist.Categorical(jnp.asarray(PROBS)))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(DATA)):
            shift = jnp.asarray(CENTERS)[k] + b + jnp.asarray(X)
            of_rows(v, 1.5, shift, route, is_peer)

    def in_rows(v=None):
        v = jnp.asarray(DATA if v is None else v)
        log_probs = jnp.log(jnp.asarray(PROBS))
        with numpyro.plate("data", len(DATA)):
            flat = StartingFlat(jnp.asarray(PROBS)) if is_peer else ebm.Counting(3)
            k = numpyro.sample("k", flat)
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
            mean = jnp.asarray(CENTERS)[k] + b + jnp.asarray(X)
            if is_peer:
                numpyro.sample("v", dist.Normal(mean, 1.0), obs=v)
                return
            v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
            ebm.energy("E", 0.5 * (v - mean) ** 2 - log_probs[k] + 0.5 * LOG_2PI)

    return in_rows if route == "fixed" else bayesian


def vectors(route, is_peer):
    """Sites for reparameterisations: a direction, an angle, a vector, an affine transform."""

    def model(v=None):
        affine = dist.transforms.AffineTransform(0.0, 2.0)

        def sites():
            a = numpyro.sample("a", dist.VonMises(0.5, 2.0))
            d = numpyro.sample("d", dist.ProjectedNormal(jnp.array([1.0, 0.5])))
            u = numpyro.sample("u", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
            t = numpyro.sample("t", dist.TransformedDistribution(dist.Normal(0.0, 1.0), affine))
            return jnp.cos(a) + d[..., 0] + u[..., 1] + t

        x, y = jnp.asarray(X), jnp.asarray(DATA if v is None else v)
        if route != "fixed":
            shift = sites() + x
            with numpyro.plate("data", len(DATA)):
                of_rows(v, 1.5, shift, route, is_peer)
            return
        with numpyro.plate("data", len(DATA)):
            mean = sites() + x
            if is_peer:
                numpyro.sample("v", dist.Normal(mean, 1.0), obs=y)
                return
            y = numpyro.sample("v", ebm.Lebesgue(), obs=y)
            ebm.energy("E", 0.5 * (y - mean) ** 2 + 0.5 * LOG_2PI)

    return model


def batched(route, is_peer):
    """Two groups with a mean each and nothing else, for guides that are batched over them."""

    def bayesian(v=None):
        with numpyro.plate("groups", 2):
            m = numpyro.sample("m", dist.Normal(0.0, 2.0))
        with numpyro.plate("data", len(DATA)):
            of_rows(v, 1.5, m[jnp.asarray(GROUP)] + jnp.asarray(X), route, is_peer)

    return basic(route, is_peer) if route == "fixed" else bayesian


def in_a_body(loop):
    """The rows in the body of a loop of NumPyro's."""

    def case(route, is_peer):
        def model(v=None):
            is_fixed = route == "fixed"
            b = numpyro.param("w", 0.0) if is_fixed else numpyro.sample("b", dist.Normal(0.0, 1.0))

            def body(*_):
                with numpyro.plate("data", len(DATA)):
                    of_rows(v, 1.5, b + jnp.asarray(X), route, is_peer)
                return 0.0, None

            loop(body)

        return model

    return case


CASES = {
    "scanned": in_a_body(lambda body: scan(body, 0.0, None, length=1)),
    "branched": in_a_body(lambda body: cond(True, body, body, None)),
    "basic": basic,
    "discrete": discrete,
    "subsampled": lambda route, is_peer: basic(route, is_peer, size=4),
    "vectors": vectors,
    "batched": batched,
}


def pair(case, route):
    """A model on a route, and its peer."""
    ours, peer = CASES[case](route, False), CASES[case](route, True)
    if route == "fixed":
        return ebm.fixed(ours, {"w": 1.3}), peer
    if route == "normalized":
        return ebm.normalized(ours), peer
    return ebm.generalized(ours, ebm.ScoreMatching()), peer
