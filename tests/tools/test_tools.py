# SPDX-License-Identifier: Apache-2.0
"""NumPyro's tools on energy models, against the same density in plain NumPyro."""

from functools import partial

import jax
import numpy as np
import pytest
from numpyro.infer import SVI, Trace_ELBO
from registry.numpyro_tools import SAME, TOOLS, Nothing, Refused
from tools import laws
from tools.peers import CASES, DATA, ROUTES, pair

import numpyro_ebm as ebm

PAIRS = [
    pytest.param(name, route, marks=[pytest.mark.slow] if route in tool.slow else [])
    for name, tool in TOOLS.items()
    for route in ROUTES
    if not isinstance(getattr(tool, route), Nothing)
]


@pytest.mark.parametrize(("name", "route"), PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_a_tool_gives_what_it_gives_for_its_peer(name, route, x64):
    tool = TOOLS[name]
    verdict = getattr(tool, route)
    ours, peer = pair(tool.case, route)
    if isinstance(verdict, Refused):
        with pytest.raises(Exception, match=verdict.match):
            tool.law(ours)
        return
    assert verdict == SAME
    found, expected = jax.tree.map(np.asarray, (tool.law(ours), tool.law(peer)))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(expected))
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)
    jax.tree.map(close, found, expected)


GUIDES = [
    pytest.param(name, marks=[] if name in ("AutoNormal", "AutoDAIS") else [pytest.mark.slow])
    for name, tool in TOOLS.items()
    if tool.guide is not None
]


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.filterwarnings("ignore")
def test_a_guide_is_trained_as_on_the_peer(name, x64):
    """Mean loss and gradients of `EnergySVI`, N times its own, are those of `SVI` on the peer."""
    tool = TOOLS[name]
    model = CASES[tool.case]("generalized", False)
    peer = pair(tool.case, "generalized")[1]

    def make_ours(model, guide, optim):
        return ebm.EnergySVI(model, guide, optim, ebm.ScoreMatching())

    guide = tool.guide(ebm.prior(model))
    if isinstance(tool.energy_svi, Refused):
        with pytest.raises(ebm.ModelError, match=tool.energy_svi.match):
            laws.trained(model, guide, make_ours)
        return
    params, *found = laws.trained(model, guide, make_ours)
    make_peer = partial(SVI, loss=Trace_ELBO())
    _, *expected = laws.trained(peer, tool.guide(peer), make_peer, params)
    found = jax.tree.map(lambda x: len(DATA) * x, found)

    def compare(a, b):
        error = np.sqrt((np.var(a, 0) + np.var(b, 0)) / len(a))
        assert np.all(np.abs(np.mean(a, 0) - np.mean(b, 0)) < 5 * error + 1e-6)

    jax.tree.map(compare, *jax.tree.map(np.asarray, (found, expected)))
