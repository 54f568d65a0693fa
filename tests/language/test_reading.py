# SPDX-License-Identifier: Apache-2.0
"""Reading a model: rows, sites, parameters, and models that cannot be read."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from language_cases import X, gaussian, outside
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.model import provenance
from numpyro_ebm.model.reading import read_model


def test_rows_are_free_of_the_subsampling_scale_and_the_users_is_their_weight():
    def subsampled(data):
        with numpyro.plate("data", 10 * len(data), subsample_size=len(data)):
            v = numpyro.sample("v", dist.Normal(0.0, 1.0), obs=data)
            ebm.energy("E", 0.5 * v**2)

    expected = dist.Normal(0, 1).log_prob(X) - 0.5 * X**2
    row_model = read_model(subsampled, (X,))
    np.testing.assert_allclose(row_model.log_density({}, {}), expected, rtol=1e-6)
    assert row_model.num_rows == 3 and row_model.total_rows == 30
    scaled = read_model(handlers.scale(subsampled, scale=0.5), (X,))
    np.testing.assert_allclose(scaled.log_density({}, {}), expected, rtol=1e-6)
    np.testing.assert_array_equal(scaled.row_weights, [0.5] * 3)
    assert row_model.row_weights is None


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize("base", [lambda: ebm.Counting(256), ebm.Lebesgue])
def test_whole_numbers_of_few_bits_do_not_overflow(dtype, base):
    """Their cubes and sums are those of integers, or of reals where the site is real."""
    data = np.minimum([1, 200, 100], np.iinfo(np.uint8 if dtype is bool else dtype).max)
    data = data.astype(dtype)

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", base(), obs=data)
            ebm.energy("E", 1e-6 * ((v + v) * v * v))

    found = read_model(model, (data,)).log_density({}, {})
    np.testing.assert_allclose(found, -2e-6 * data.astype(float) ** 3, rtol=1e-6)


def test_sites_of_every_shape_are_read():
    def model(images, labels, covariates):
        w = numpyro.param("w", jnp.ones(2))
        prior = numpyro.sample("prior", dist.Normal(0, 1))
        with numpyro.plate("data", len(images), dim=-1):
            a = numpyro.sample("a", ebm.Lebesgue((2, 2)), obs=images)
            y = numpyro.sample("y", ebm.Counting(3), obs=labels)
            z = numpyro.sample("z", ebm.Lebesgue((), dist.constraints.positive))
            ebm.energy("E", jnp.sum(a, (-1, -2)) * y * prior + z * (covariates @ w))
            with numpyro.plate("units", 4, dim=-2):
                u = numpyro.sample("u", ebm.Lebesgue())
                ebm.energy("E_u", 0.5 * u**2 * z)

    images, labels = jnp.ones((3, 2, 2)), jnp.array([0, 1, 2])
    covariates = jnp.arange(6.0).reshape(3, 2)
    row_model = read_model(model, (images, labels, covariates))
    assert set(row_model.visible) == {"a", "y"} and set(row_model.latent) == {"z", "u"}
    assert set(row_model.parameters) == {"w", "prior"} and set(row_model.priors) == {"prior"}
    assert row_model.latent["u"].dims == ("units", "data")
    assert row_model.visible["a"].dims == ("data", "a_dim_0", "a_dim_1")
    values = {"z": jnp.array([1.0, 2.0, 3.0]), "u": jnp.ones((4, 3))}
    rows = row_model.log_density({"w": jnp.ones(2), "prior": 2.0}, values)
    expected = -(4 * labels * 2.0 + values["z"] * covariates.sum(1) + 2 * values["z"])
    np.testing.assert_allclose(rows, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "support, base",
    [
        (dist.constraints.positive, dist.LogNormal(0.3, 0.8)),
        (dist.constraints.unit_interval, dist.Beta(2.0, 3.0)),
    ],
)
def test_the_log_jacobian_of_other_supports(support, base):
    """In unconstrained coordinates the density is NumPyro's own transformed one."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((), support), obs=data)
            ebm.energy("E", -base.log_prob(v))

    v = jnp.array([0.2, 0.5, 0.9])
    row_model = read_model(model, (v,))
    u = row_model.unconstrain_visible()
    np.testing.assert_allclose(row_model.constrain(u)[0]["v"], v, rtol=1e-5)
    transform = dist.biject_to(support)
    reference = dist.TransformedDistribution(base, transform.inv).log_prob(u["v"])
    np.testing.assert_allclose(row_model.unconstrained_log_density({}, u, {}), reference, rtol=1e-4)


def test_networks_are_parameters():
    nnx = pytest.importorskip("flax.nnx")
    eqx = pytest.importorskip("equinox")
    linen = pytest.importorskip("flax.linen")
    from numpyro.contrib.module import eqx_module, flax_module, nnx_module

    nets = {
        "nnx": lambda: nnx_module("net", nnx.Linear(2, 1, rngs=nnx.Rngs(0))),
        "linen": lambda: flax_module("net", linen.Dense(1), input_shape=(2,)),
        "eqx": lambda: jax.vmap(eqx_module("net", eqx.nn.Linear(2, 1, key=jax.random.key(0)))),
    }
    for make in nets.values():

        def model(data, make=make):
            net = make()
            with numpyro.plate("data", len(data)):
                v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
                ebm.energy("E", net(v)[:, 0])

        row_model = read_model(model, (jnp.ones((3, 2)),))
        assert list(row_model.parameters) == ["net$params"]
        gradient = jax.grad(lambda p, j=row_model: j.log_density(p, {}).sum())(row_model.parameters)
        assert all(np.any(x != 0) for x in jax.tree.leaves(gradient))


def test_a_slice_of_a_joint_array_is_not_mistaken_for_the_data():
    def model(both):
        with numpyro.plate("data", len(both)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=both[:, :2])
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) * both[:, 2])

    assert read_model(model, (jnp.ones((4, 3)),)).num_rows == 4


def test_covariates_of_the_shape_of_the_data_are_fine():
    def model(data, x):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E", jnp.sum(v * x, -1) * h)

    def guide(data, x):
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Bernoulli(logits=jnp.sum(v * x, -1)))

    args = (jnp.ones((4, 2)), 2 * jnp.ones((4, 2)))
    provenance.check_guide(read_model(model, args), guide, {})


def disjoint(data):
    with numpyro.plate("one", 3):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", v**2)
    with numpyro.plate("two", 3):
        w = numpyro.sample("w", ebm.Lebesgue(), obs=data)
        ebm.energy("F", w**2)


def nested(data):
    with numpyro.plate("one", 3, dim=-1), numpyro.plate("two", 2, dim=-2):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=jnp.stack([data, data]))
        ebm.energy("E", v**2)


def no_energy(data):
    with numpyro.plate("data", 3):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        numpyro.factor("E", -(v**2))


def energy_outside(data):
    with numpyro.plate("data", 3):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ebm.energy("E", jnp.sum(v**2))


def reads_argument(data):
    with numpyro.plate("data", 3):
        numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", data**2)


def tilts_argument(data):
    with numpyro.plate("data", 3):
        numpyro.sample("v", dist.Normal(0, 1), obs=data)
        ebm.energy("E", data**2)


def half_argument(data):
    with numpyro.plate("data", 3):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=jnp.asarray(data))
        ebm.energy("E", v**2 * data)


def ignores_visible(data):
    with numpyro.plate("data", 3):
        numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", jnp.zeros(3))


def wrong_rows(data):
    with numpyro.plate("data", 3):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data[:1])
        ebm.energy("E", v**2 + jnp.zeros(3))


@pytest.mark.parametrize(
    "model, message",
    [
        (outside, "'v' is outside any plate.*numpyro.plate"),
        (disjoint, "data plate.*'one', 'two'.*share none"),
        (nested, "data plate.*share the plates.*'one', 'two'"),
        (no_energy, "no energy statement.*numpyro.factor"),
        (energy_outside, "'E' is outside any plate"),
        (reads_argument, "'E' reads the data of the visible site 'v'|No energy depends.*'v'"),
        (tilts_argument, "'E' reads the data.*'v' from the model's argument"),
        (half_argument, "'E' reads the data.*returned `v`"),
        (ignores_visible, "No energy depends on the visible site 'v'"),
        (wrong_rows, r"'v' have shape \(1,\)"),
    ],
)
def test_models_that_cannot_be_read(model, message):
    with pytest.raises(ebm.ModelError, match=message):
        read_model(model, (X,))


def test_nan_in_the_data():
    with pytest.raises(ebm.ModelError, match="'v' contain NaN"):
        read_model(gaussian, (X.at[0].set(jnp.nan),))
    for value in (jnp.inf, -jnp.inf):
        with pytest.raises(ebm.ModelError, match="'v' contain infinite values.*isfinite"):
            read_model(gaussian, (X.at[0].set(value),))


def latent_model(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting(2))
        ebm.energy("E", v * h)


def guide_of(logits):
    def guide(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Bernoulli(logits=logits(data)))

    return guide


@pytest.mark.parametrize(
    "logits, message",
    [
        (lambda data: data, 'reads the data.*numpyro_ebm.visible."v", data'),
        (lambda data: data + ebm.visible("v", data), "reads the data"),
        (lambda data: jnp.zeros(len(data)), "ignores the visible sites.*importance_weighted"),
    ],
)
def test_guides_must_see_the_visible_value(logits, message):
    row_model = read_model(latent_model, (X,))
    with pytest.raises(ebm.ModelError, match=message):
        provenance.check_guide(row_model, guide_of(logits), {})


@pytest.mark.slow
def test_a_blind_guide_is_allowed_under_importance_weights():
    loss = ebm.DenoisingScoreMatching(0.1, ebm.VaGES(4, importance_weighted=True))
    blind = guide_of(lambda data: jnp.zeros(len(data)))
    assert np.isfinite(loss.loss(jax.random.key(0), {}, latent_model, blind, X))


def test_a_guide_must_draw_every_latent():
    row_model = read_model(latent_model, (X,))
    guide = Guide(lambda data: ebm.visible("v", data), row_model, (X,), {})
    with pytest.raises(ebm.ModelError, match="does not draw the latent site.*'h'"):
        guide.check(guide.trace(jax.random.key(0), {}, row_model.visible_values))


def test_numpyros_enumeration_of_event_units_says_what_to_write():
    def units(data=None):
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Counting(2, (3,)), infer={"enumerate": "parallel"})
            ebm.energy("E", 0.5 * v**2 - v * jnp.sum(h, -1))

    mcmc = MCMC(NUTS(ebm.fixed(units, {})), num_warmup=2, num_samples=2, progress_bar=False)
    with pytest.raises(ebm.ModelError, match="Declare the units in a plate"):
        mcmc.run(jax.random.key(0))


def test_a_model_may_calculate_in_a_loop():
    """`scan` over its parameters: what it is read with at first does not stay."""

    def model(data):
        rate = numpyro.param("rate", 0.5)
        _, path = scan(lambda c, x: (c + rate * x, c + rate * x), 0.0, jnp.arange(3.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - path[-1]) ** 2)

    traced = read_model(model, (X,), {}, {"rate": 1.0}).traced
    assert traced.bind(None, {"rate": jnp.array(2.0)}).parameters["rate"] == 2.0
    svi = ebm.EnergySVI(model, None, numpyro.optim.SGD(0.1), ebm.ScoreMatching())
    state, loss = jax.jit(svi.update)(svi.init(jax.random.key(3), X), X)
    gap = np.mean(X) - 3 * 0.5
    np.testing.assert_allclose(loss, 0.5 * np.mean((X - 1.5) ** 2) - 1.0, rtol=1e-5)
    np.testing.assert_allclose(svi.get_params(state)["rate"], 0.5 + 0.1 * 3 * gap, rtol=1e-5)
