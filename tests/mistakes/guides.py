# SPDX-License-Identifier: Apache-2.0
"""Mistakes in guides."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from mistakes.setting import (
    LINE,
    Mistake,
    bayesian,
    fit,
    guide,
    noisy,
    plane,
    plate,
    rbm,
)
from numpyro.infer.autoguide import AutoNormal

import numpyro_ebm as ebm


def q_of(draw, param="A", site="v", rows=True):
    """A guide of the RBM."""

    def q(data=None):
        A = numpyro.param(param, jnp.zeros((2, 3)))
        with plate(data, "data" if rows else "rows"):
            draw(ebm.visible(site, data), A)

    return q


def bits(v, A):
    numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))


def bits_and_more(v, A):
    bits(v, A)
    numpyro.sample("z", dist.Normal(0, 1))


def visible_last(data=None):
    with plate(data):
        v = ebm.visible(data, "v")  # pyright: ignore
        numpyro.sample("h", dist.Bernoulli(logits=v @ jnp.zeros((2, 3))).to_event(1))


def reads_data(data=None):
    A = numpyro.param("A", jnp.zeros((2, 3)))
    with plate(data):
        numpyro.sample("h", dist.Bernoulli(logits=data @ A).to_event(1))


def learn(q, **options):
    return fit(rbm, q, loss=noisy(), **options)


GUIDES = {
    "a latent site is missing": Mistake(
        lambda: learn(q_of(lambda v, A: None)), "does not draw the latent site.*'h'"
    ),
    "a site too many": Mistake(lambda: learn(q_of(bits_and_more)), "draws 'z', which is no site"),
    "a misspelt site": Mistake(
        lambda: learn(q_of(lambda v, A: numpyro.sample("H", dist.Normal(v, 1).to_event(1)))),
        "does not draw the latent site.*'h'",
    ),
    "the argument instead of visible": Mistake(lambda: learn(reads_data), 'visible\\("v", data\\)'),
    "visible with its name last": Mistake(lambda: learn(visible_last), "takes its name first"),
    "visible of no site": Mistake(
        lambda: learn(q_of(bits, site="x")), r"visible\('x', ...\)`, and.*\['v'\]"
    ),
    "visible of a latent site": Mistake(lambda: learn(q_of(bits, site="h")), "are named 'h'"),
    "no to_event": Mistake(
        lambda: learn(q_of(lambda v, A: numpyro.sample("h", dist.Bernoulli(logits=v @ A)))),
        r"'h' is drawn from a Bernoulli.* of batch shape \(6, 3\).*to_event\(1\)",
    ),
    "another support": Mistake(
        lambda: learn(q_of(lambda v, A: numpyro.sample("h", dist.Normal(v @ A, 1).to_event(1)))),
        r"on the support Real\(\), and in the model it is Boolean\(\)",
    ),
    "another shape": Mistake(
        lambda: learn(q_of(lambda v, A: numpyro.sample("h", dist.Bernoulli(logits=v).to_event(1)))),
        r"draws 'h' with the shape \(6, 2\), and in the model it has \(6, 3\)",
    ),
    "a parameter of the model in another shape": Mistake(
        lambda: learn(shared_of_another_shape),
        r"parameter 'W' was given a value of shape \(2, 3\).*shape \(5, 3\)",
    ),
    "no guide": Mistake(lambda: learn(None), "needs a guide"),
    "nothing to draw": Mistake(lambda: fit(plane, guide), "draws 'h', which is no site"),
    "an AutoGuide of the model": Mistake(
        lambda: fit(bayesian, AutoNormal(bayesian), LINE),
        r"AutoNormal\(numpyro_ebm.prior\(mod",
    ),
    "too few particles": Mistake(
        lambda: fit(rbm, guide, loss=ebm.ScoreMatching(ebm.VaGES(2))), "num_particles=3"
    ),
    "a class of marginals": Mistake(
        lambda: ebm.DenoisingScoreMatching(0.1, marginal=ebm.VaGES), "must be a marginal such as"
    ),
    "a guide for a loss": Mistake(
        lambda: ebm.EnergySVI(rbm, noisy(), numpyro.optim.Adam(0.1), guide),
        "`(guide|loss)` must",
    ),
}


def shared_of_another_shape(data=None):
    W = numpyro.param("W", jnp.zeros((5, 3)))
    with plate(data):
        bits(jnp.tile(ebm.visible("v", data), 3)[:, :5], W)
