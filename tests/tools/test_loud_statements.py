# SPDX-License-Identifier: Apache-2.0
"""What NumPyro's tools ask of statements and losses: draws, loops, reparameterisation, overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.handlers import reparam, seed, substitute, trace, uncondition
from numpyro.infer import HMCECS, NUTS, autoguide
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm.program.derivatives import constant_once, half_value

DATA = jnp.array([1.2, 0.1, -0.3, 2.2, 0.9, 0.4])
X = jnp.array([0.3, -0.4, 0.1, 0.8, 0.0, -1.1])
PARAMS = {"p": 1.3, "m": 0.7}


def model(v=None, *, base=None):
    p = numpyro.sample("p", dist.Gamma(3.0, 2.0))
    m = numpyro.sample("m", dist.Normal(p, 2.0))
    with numpyro.plate("data", len(DATA)):
        v = numpyro.sample("v", ebm.Lebesgue() if base is None else base, obs=v)
        ebm.energy("E", 0.5 * p * v**2 - (m + X) * v)


ROUTES = {
    "fixed": lambda model: ebm.fixed(model, PARAMS),
    "normalized": ebm.normalized,
    "generalized": lambda model: ebm.generalized(model, ebm.ScoreMatching()),
}


@pytest.mark.parametrize(
    "fn",
    [
        ebm.Counting(3),
        ebm.Counting(2, (4,)),
        ebm.Counting(3).expand((5,)),
        ebm.Counting(3).mask(jnp.array(True)),
        ebm.Counting(3).expand((5,)).to_event(1),
        dist.Independent(ebm.Counting(2).expand((5,)), 1),
    ],
)
def test_draws_of_a_counting_measure_are_not_reparameterised(fn):
    assert not fn.has_rsample
    with pytest.raises(NotImplementedError):
        fn.rsample(jax.random.key(7))


@pytest.mark.parametrize("route", ROUTES)
def test_a_density_is_not_drawn(route):
    ours = ROUTES[route](lambda v: model(v, base=dist.Normal(0.0, 3.0)))
    with pytest.raises((ebm.ModelError, ebm.ImproperSamplingError), match="draw"):
        trace(seed(uncondition(ours), 3)).get_trace(DATA)


def looped(v):
    p = numpyro.sample("p", dist.Gamma(3.0, 2.0))

    def step(carry, y):
        with numpyro.plate("data", 2):
            y = numpyro.sample("v", ebm.Lebesgue(), obs=y)
            ebm.energy("E", 0.5 * p * (y - carry) ** 2)
        return y, None

    scan(step, jnp.zeros(2), v.reshape(3, 2))


def branched(v):
    p = numpyro.sample("p", dist.Gamma(3.0, 2.0))
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)

    def branch(factor):
        def energy(_):
            with numpyro.plate("data", len(v)):
                ebm.energy("E", 0.5 * factor * p * v**2)

        return energy

    cond(p > 1.0, branch(1.0), branch(2.0), None)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", [looped, branched])
def test_energies_in_the_body_of_a_loop_are_refused(body, route):
    with pytest.raises(ebm.ModelError, match=r"`jax.lax.scan`"):
        log_density(ROUTES[route](body), (DATA,), {}, {"p": jnp.array(1.3)})


def test_objectives_refuse_energies_in_the_body_of_a_loop():
    with pytest.raises(ebm.ModelError, match=r"`jax.lax.scan`"):
        ebm.ScoreMatching().loss(jax.random.key(3), {"p": 1.3}, looped, None, DATA)


CONFIGS = {
    "centered": {"m": LocScaleReparam(0.0)},
    "half": {"m": LocScaleReparam(0.5)},
    "both": lambda site: LocScaleReparam(0.0) if site["name"] == "m" else None,
    "transform": {"s": TransformReparam()},
}


def scaled(v):
    affine = dist.transforms.AffineTransform(0.0, 2.0)
    p = numpyro.sample("p", dist.Gamma(3.0, 2.0))
    m = numpyro.sample("m", dist.Normal(p, 2.0))
    s = numpyro.sample("s", dist.TransformedDistribution(dist.Normal(0.0, 1.0), affine))
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        ebm.energy("E", 0.5 * p * v**2 - (m + s + X) * v)


@pytest.mark.parametrize("route", ["normalized", "generalized"])
@pytest.mark.parametrize("config", CONFIGS)
def test_reparameterised_outside_is_reparameterised_inside(config, route, x64):
    config = CONFIGS[config]
    found = []
    for ours in (reparam(ROUTES[route](scaled), config), ROUTES[route](reparam(scaled, config))):
        sites = trace(seed(ours, 5)).get_trace(DATA)
        latent = {
            name: jnp.asarray(0.3, float)
            for name, site in sites.items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        found.append((sorted(latent), float(log_density(ours, (DATA,), {}, latent)[0])))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-9)


@pytest.mark.parametrize(
    "objective",
    [
        ebm.ScoreMatching(),
        ebm.SlicedScoreMatching(2),
        ebm.SlicedScoreMatching(2, variance_reduction=False),
        ebm.DenoisingScoreMatching(0.1),
        ebm.KernelSteinDiscrepancy(),
        ebm.KernelSteinDiscrepancy(pairs="square"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("at", [{"p": 1e25, "m": 0.0}, {"p": 1.0, "m": 1e25}], ids=repr)
def test_a_loss_that_overflows_is_infinite(objective, at):
    """A step of an ensemble or a slice sampler that goes too far is rejected; NaN stops it."""
    is_stein = isinstance(objective, ebm.KernelSteinDiscrepancy)
    if is_stein and at["m"] == 0.0:
        pytest.skip("products of scores of both signs overflow, to a sum that is not known")
    ours = ebm.generalized(alike if is_stein else model, objective)
    at = {name: jnp.array(x) for name, x in at.items()}
    assert float(log_density(seed(ours, 5), (DATA,), {}, at)[0]) == -jnp.inf


def alike(v):
    p = numpyro.sample("p", dist.Gamma(3.0, 2.0))
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        ebm.energy("E", 0.5 * p * v**2 - m * v)


def test_half_of_a_value_has_all_derivatives():
    def whole(f):
        return lambda x: f(constant_once(jnp.sin(x)) * jnp.sin(x))

    def by_hand(x):
        return 0.5 * jnp.sin(x) ** 2

    f = whole(half_value)
    for _ in range(3):
        assert float(f(0.7)) == pytest.approx(float(by_hand(0.7)), rel=1e-6)
        f, by_hand = jax.grad(f), jax.grad(by_hand)


@pytest.mark.parametrize("name", ["AutoDAIS", "AutoLaplaceApproximation", "AutoSemiDAIS", "list"])
def test_guides_that_read_the_density_are_refused(name):
    prior = ebm.prior(model)
    if name == "list":
        guide = autoguide.AutoGuideList(prior)
        guide.append(autoguide.AutoDelta(numpyro.handlers.block(seed(prior, 3), hide=["m"])))
        guide.append(
            autoguide.AutoLaplaceApproximation(numpyro.handlers.block(seed(prior, 3), hide=["p"]))
        )
    elif name == "AutoSemiDAIS":
        guide = autoguide.AutoSemiDAIS(prior, prior, autoguide.AutoDelta(prior))
    else:
        guide = getattr(autoguide, name)(prior)
    svi = ebm.EnergySVI(model, guide, numpyro.optim.Adam(0.1), ebm.ScoreMatching())
    with pytest.raises(ebm.ModelError, match="looks at the density"):
        svi.init(jax.random.key(3), DATA)


@pytest.mark.slow
def test_a_proxy_of_single_rows_is_refused_by_a_loss():
    def subsampled(v):
        p = numpyro.sample("p", dist.Gamma(3.0, 2.0))
        with numpyro.plate("data", len(v), subsample_size=2):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=numpyro.subsample(v, 0))
            ebm.energy("E", 0.5 * p * v**2)

    ours = ebm.generalized(subsampled, ebm.ScoreMatching())
    kernel = HMCECS(NUTS(ours), proxy=HMCECS.taylor_proxy({"p": jnp.array(1.0)}))
    with pytest.raises(ebm.ModelError, match="taylor_proxy"):
        kernel.init(jax.random.key(3), 10, None, (DATA,), {})


def by_index(is_peer, log_z="enumerate"):
    """Rows with covariates of their own, in a closure, by the indices of a subsample."""

    def subsampled(v):
        p = numpyro.sample("p", dist.Gamma(3.0, 2.0))
        with numpyro.plate("data", len(v), subsample_size=4) as i:
            if is_peer:
                numpyro.sample("v", dist.Normal(X[i] / p, p**-0.5), obs=v[i])
            else:
                v = numpyro.sample("v", ebm.Lebesgue(), obs=v[i])
                ebm.energy("E", 0.5 * p * v**2 - X[i] * v)

    return subsampled if is_peer else ebm.normalized(subsampled, log_z)


@pytest.mark.parametrize("log_z", ["enumerate", "quadrature"])
@pytest.mark.parametrize("i", [[0, 1, 2, 3], [2, 5, 1, 1], [5, 4], [3, 1, 0, 2, 4, 5]], ids=repr)
@pytest.mark.filterwarnings("ignore:subsample_size does not match")
def test_rows_of_a_subsample_have_their_own_normalizers(i, log_z, x64):
    def rows(model):
        data = {"data": jnp.array(i), "p": jnp.array(1.3)}
        site = trace(seed(substitute(model, data=data), 5)).get_trace(DATA)["v"]
        return site["fn"].log_prob(site["value"])

    np.testing.assert_allclose(rows(by_index(False, log_z)), rows(by_index(True)), rtol=1e-6)


@pytest.mark.slow
def test_a_proxy_sees_the_likelihoods_of_the_rows_it_asks_for():
    def states(is_peer):
        proxy = HMCECS.taylor_proxy({"p": jnp.array(1.0)})
        kernel = HMCECS(NUTS(by_index(is_peer)), num_blocks=2, proxy=proxy)
        state = kernel.init(jax.random.key(3), 10, None, (DATA,), {})
        gibbs = {"data": state.z["data"]}
        found = [state.gibbs_state]
        for i in range(3):
            gibbs, moved = kernel._gibbs_update(jax.random.key(10 + i), gibbs, found[-1])
            found.append(moved)
        return [x.ref_subsample_log_liks["data"] for x in found], gibbs["data"]

    (found, indices), (expected, same) = states(False), states(True)
    assert np.array_equal(indices, same)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sites_that_a_handler_gives_values_are_read():
    """`substitute` outside is what `fixed` values would be inside."""
    ours = substitute(ebm.normalized(model), data={"m": jnp.array(0.7)})
    inside = log_density(ebm.normalized(model), (DATA,), {}, {"p": 1.3, "m": 0.7})[0]
    assert log_density(ours, (DATA,), {}, {"p": 1.3})[0] == pytest.approx(float(inside))
