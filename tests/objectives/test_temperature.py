# SPDX-License-Identifier: Apache-2.0
"""Contrastive divergence at a temperature, which a fit remembers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from divergence_cases import KEY, Stay
from numpyro.distributions import constraints
from numpyro.infer import NUTS, SVI, Gibbs
from numpyro.infer.util import log_density
from oracles import jit

import numpyro_ebm as ebm

MALA = partial(ebm.MALA, step_size=0.1)


def gaussian(data=None, rows=1, name="precision"):
    precision = numpyro.param(name, 1.0, constraint=constraints.positive)
    with numpyro.plate("data", rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def switched(data=None, rows=1):
    """E = a h v + v²/2 with h of 0 or 1."""
    a = numpyro.param("a", 1.0)
    with numpyro.plate("data", rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting(2))
        ebm.energy("E", 0.5 * v**2 + a * h * v)


def tilted(data=None, rows=1):
    """The base measure has no temperature."""
    a = numpyro.param("a", 1.0)
    with numpyro.plate("data", rows if data is None else len(data)):
        v = numpyro.sample("v", dist.Exponential(2.0), obs=data)
        ebm.energy("E", a * v**2)


def levels(data=None, rows=1):
    a = numpyro.param("a", 1.0)
    with numpyro.plate("data", rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(4), obs=data)
        ebm.energy("E", a * v**2)


DATA = jnp.array([0.5, 1.0, 2.5])
CASES = {  # model, data, where the chains are, T log p̃ up to a constant
    "latents": (
        switched,
        DATA,
        dist.Normal(-0.5, 1e-6),
        -0.5,
        lambda a, v, T: T * jnp.logaddexp(-(v**2) / (2 * T), -(v**2 / 2 + a * v) / T),
    ),
    "a base measure": (
        tilted,
        DATA,
        dist.LogNormal(np.log(1.5), 1e-6),
        1.5,  # chains on the support of rates: the Jacobian is that of the logarithm
        lambda a, v, T: -a * v**2 + T * (jnp.log(v) - 2 * v),
    ),
    "discrete": (
        levels,
        jnp.array([0, 1, 3]),
        dist.Categorical(probs=jnp.array([0.0, 0.0, 1.0, 0.0])),
        2,
        lambda a, v, T: -a * v**2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_phases_are_at_the_temperature(case):
    """The loss is T times the contrast of log p̃ of the tempered model."""
    model, data, initial, chain, closed_form = CASES[case]
    objective = ebm.ContrastiveDivergence(Stay, initial=initial, temperature=0.3)

    def closed(a):
        return closed_form(a, chain, 0.3) - jnp.mean(closed_form(a, data, 0.3))

    loss = lambda a: objective.loss(KEY, {"a": a}, model, None, data)  # noqa: E731
    found = jit(jax.value_and_grad(loss))(0.7)
    np.testing.assert_allclose(found, jax.value_and_grad(closed)(0.7), rtol=1e-4)


def test_the_penalty_is_of_the_energy_itself():
    def loss(energy, gradient):
        objective = ebm.ContrastiveDivergence(
            Stay, energy_penalty=energy, gradient_penalty=gradient, temperature=0.1
        )
        return objective.loss(KEY, {"precision": 2.0}, gaussian, None, DATA)

    data = np.asarray(DATA)
    np.testing.assert_allclose(loss(0.5, 0.0), np.mean(data**4), rtol=1e-5)
    np.testing.assert_allclose(loss(0.5, 0.25), np.mean(data**4 + 2 * data**2), rtol=1e-5)


@pytest.mark.slow
def test_steps_and_noise_apart_are_a_temperature(tmp_path):
    """A Gaussian of precision λ, chains z - α λ z + σ ξ: their variance is σ²/(αλ(2 - αλ)).

    Persistent chains learn the λ at which that is the variance of the data, and T/λ is the
    variance of the model that the fit says it is.
    """
    alpha, sigma, sd = 0.3, 0.35, 0.5
    data = sd * jax.random.normal(KEY, (2_000,))
    variance = float(jnp.mean(data**2))
    objective = ebm.ContrastiveDivergence(
        partial(ebm.ULA, step_size=sigma**2 / 2),
        10,
        persistent=True,
        temperature=sigma**2 / (2 * alpha),
    )
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.01), objective)
    fit = svi.run(KEY, 400, data, progress_bar=False, ema=0.99)
    temperature = fit.params["fit_temperature"]
    np.testing.assert_allclose(temperature, sigma**2 / (2 * alpha), rtol=1e-6)
    assert temperature == fit.ema_params["fit_temperature"]
    ebm.save(tmp_path / "fit", fit)
    assert temperature == ebm.load(tmp_path / "fit").params["fit_temperature"]
    expected = (1 - np.sqrt(1 - sigma**2 / variance)) / alpha
    np.testing.assert_allclose(fit.ema_params["precision"], expected, rtol=0.04)
    draws = ebm.sample(KEY, ebm.fixed(gaussian, fit.ema_params), 4_000)["v"]
    of_model = float(temperature / fit.ema_params["precision"])
    np.testing.assert_allclose(np.var(draws), of_model, rtol=5 * (2 / 4_000) ** 0.5)
    assert abs(of_model / variance - 1) > 0.1  # the bias of the steps, which chains cannot hide


def test_the_fit_says_its_temperature():
    """Also where another fit begins; and `temper` multiplies it."""
    objective = ebm.ContrastiveDivergence(MALA, temperature=0.25)
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.1), objective)
    params = svi.get_params(svi.init(KEY, DATA, init_params={"precision": jnp.array(1.5)}))
    assert params["fit_temperature"] == 0.25
    energy, model = float(1.5 * jnp.sum(DATA**2) / 2), ebm.fixed(gaussian, params)
    assert log_density(model, (DATA,), {}, {})[0] == pytest.approx(-4 * energy)
    hot = ebm.temper(model, 0.5)
    assert log_density(hot, (DATA,), {}, {})[0] == pytest.approx(-2 * energy)
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.ScoreMatching())
    state = svi.init(KEY, DATA, init_params=params)
    assert svi.get_params(state) == {"precision": pytest.approx(1.5)}


def test_at_one_there_is_nothing_to_say():
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.1), ebm.ContrastiveDivergence(MALA))
    assert svi.model is gaussian and list(svi.get_params(svi.init(KEY, DATA))) == ["precision"]


def labelled(x=None, y=None, rows=1):
    """JEM, with its label normalised given x."""
    slope = numpyro.param("slope", jnp.array([-1.0, 1.0]))
    with numpyro.plate("data", rows if x is None else len(x)):
        v = numpyro.sample("x", ebm.Lebesgue(), obs=x)
        logits = v[:, None] * slope
        numpyro.sample("y", dist.Categorical(logits=logits), obs=y)
        ebm.energy("E", 0.5 * v**2 - jax.nn.logsumexp(logits, -1))


def test_the_parts_of_a_sum_share_it():
    """Cross-entropy says none; the label's law given x has none either."""
    chains = ebm.ContrastiveDivergence(MALA, 1, temperature=0.25)
    labels = ebm.PseudoLikelihood()
    both = chains.on("x") + labels.on("y", given="x")
    assert both.temperature == 0.25 and (2 * labels + labels).temperature is None
    svi = ebm.EnergySVI(labelled, None, optax.adam(0.1), both)
    params = svi.get_params(svi.init(KEY, DATA, jnp.array([0, 1, 1])))
    assert params["fit_temperature"] == 0.25
    with pytest.raises(ebm.ModelError, match=r"different temperatures, \[0.25, 1.0\]"):
        chains + ebm.ContrastiveDivergence(MALA)


@pytest.mark.slow
def test_numpyros_svi_learns_at_the_temperature():
    """Its loss is that of the tempered model, as by hand; and a sum is at that of its parts."""
    labels = ebm.PseudoLikelihood().on("y", given="x")
    at = ebm.ContrastiveDivergence(MALA, 2, temperature=0.25).on("x") + labels
    by_hand = 0.25 * ebm.ContrastiveDivergence(MALA, 2).on("x") + labels
    found = [
        SVI(model, lambda x, y: None, numpyro.optim.Adam(0.05), loss)
        .run(KEY, 5, DATA, jnp.array([0, 1, 1]), progress_bar=False)
        .params["slope"]
        for model, loss in ((labelled, at), (ebm.temper(labelled, 4.0), by_hand))
    ]
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.slow
def test_logits_of_a_joint_energy_model_are_at_the_temperature():
    pytest.importorskip("equinox")
    network = ebm.models.mlp_network(KEY, 2, num_outputs=3, widths=(4,))
    model = numpyro.handlers.seed(ebm.models.jem(network, 2, 3), 0)
    v = jnp.array([[0.5, -1.0]])
    trace = numpyro.handlers.trace(model).get_trace(v, jnp.zeros(1, int))
    params = {"network$params": trace["network$params"]["value"], "fit_temperature": 0.25}
    fixed = ebm.fixed(ebm.models.jem(network, 2, 3), params)
    joint = [log_density(fixed, (v, jnp.array([y])), {}, {})[0] for y in range(3)]
    found = jax.nn.softmax(ebm.models.jem_logits(network, params, v)[0])
    np.testing.assert_allclose(found, jax.nn.softmax(jnp.stack(joint)), rtol=1e-5)


def hot_blocks(model):
    hot = ebm.temper(model, 4.0)
    return Gibbs([(ebm.MALA(hot, 0.1), ["v"]), (ebm.BlockGibbs(hot), ["h"])])


@pytest.mark.parametrize(
    "kernel",
    [
        hot_blocks,
        lambda m: ebm.ULA(ebm.temper(m, 4.0), 0.1),
        lambda m: NUTS(ebm.temper(m, 4.0)),
        lambda m: ebm.ULA(ebm.temper(m, 2.0), 0.1).wrap_model(lambda x: ebm.temper(x, 2.0)),
        lambda m: ebm.MALA(ebm.integrated(ebm.temper(m, 0.5), ["v"]), 0.1),
        lambda m: ebm.MALA(numpyro.handlers.block(ebm.temper(m, 4.0), hide=["z"]), 0.1),
    ],
)
def test_a_kernel_at_a_temperature_of_its_own_is_refused(kernel):
    """A temperature of the model itself, inside of what the kernel is given, is none."""
    params = {"a": jnp.array(0.5)}
    objective = ebm.ContrastiveDivergence(kernel)
    with pytest.raises(ebm.ModelError, match="on a tempered model.*Say it"):
        objective.loss(KEY, params, switched, None, DATA)


def test_a_tempered_model_is_learned_as_it_is():
    objective = ebm.ContrastiveDivergence(Stay, initial=dist.Normal(-0.5, 1e-6))
    model = ebm.temper(gaussian, 4.0)
    found = objective.loss(KEY, {"precision": 2.0}, model, None, DATA)
    expected = 4.0 * (np.mean(np.asarray(DATA) ** 2) - 0.25)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_refused():
    for bad in (0.0, -1.0, np.inf):
        with pytest.raises(ebm.ModelError, match="`temperature` must be positive"):
            ebm.ContrastiveDivergence(MALA, temperature=bad)
    objective = ebm.ContrastiveDivergence(MALA, temperature=2.0)
    model = partial(gaussian, name="fit_temperature")
    svi = ebm.EnergySVI(model, None, optax.adam(0.1), objective)
    with pytest.raises(ebm.ModelError, match="'fit_temperature' has the name"):
        svi.get_params(svi.init(KEY, DATA))
    with pytest.raises(ebm.ModelError, match="'fit_temperature' of the model has the name"):
        ebm.log_normalizer(KEY, ebm.fixed(model, {"fit_temperature": 2.0}))
