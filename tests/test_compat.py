# SPDX-License-Identifier: Apache-2.0
"""Names that no documentation promises: each is where it was and does what it did."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.funsor import enum, plate_to_enum_plate
from numpyro.contrib.funsor.enum_messenger import trace
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm
from numpyro_ebm import _compat

pytestmark = pytest.mark.smoke

PACKAGE = Path(ebm.__file__).parent  # of the installed wheel, where that is what is tested

LIBRARIES = re.compile(r"(jax|numpyro|blackjax|arviz)(\.|$)")

# What the documentation of each library describes.
PROMISED = re.compile(
    r"jax(\.(numpy|lax|nn|random|tree|tree_util|typing|sharding|flatten_util|dtypes))?"
    r"|jax\.(ad_checkpoint|scipy(\.\w+)?)"
    r"|numpyro(\.(distributions(\.(constraints|transforms))?|diagnostics|handlers|infer(\.(autoguide|mcmc|svi))?|optim))?"
    r"|blackjax|arviz"
)
INTERNALS = re.compile(r"jax\.(core|extend|_src)|blackjax\.(base|mcmc|smc|util)")

PROMISED_NAMES = {
    ("numpyro.contrib.module", "eqx_module"),
    ("numpyro.primitives", "Messenger"),
    ("numpyro.primitives", "plate"),
    *(("numpyro.infer.util", name) for name in ("constrain_fn", "initialize_model", "log_density")),
    *(("numpyro.infer.util", name) for name in ("potential_energy", "transform_fn")),
    *(("numpyro.contrib.funsor", name) for name in ("config_enumerate", "enum")),
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_undocumented_names_come_from_one_place(path):
    if path.name == "_compat.py":
        return
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and LIBRARIES.match(node.module):
            names = {(node.module, alias.name) for alias in node.names}
            assert PROMISED.fullmatch(node.module) or names <= PROMISED_NAMES, names
        if isinstance(node, ast.Attribute):
            assert not re.match(
                r"(jax\.(core|extend|_src)|blackjax\.(base|mcmc|smc|util))", ast.unparse(node)
            )


def test_every_name_is_there():
    missing = [name for name in _compat.__all__ if getattr(_compat, name, None) is None]
    assert not missing


def test_numpyro_has_its_handlers_and_flags():
    assert isinstance(_compat.handler_stack, list) and not _compat.handler_stack
    with numpyro.handlers.seed(rng_seed=0):
        assert [type(x) for x in _compat.handler_stack] == [numpyro.handlers.seed]
        assert not _compat.is_enumerating()
    seen = []

    def model():
        seen.append(_compat.is_enumerating())
        with numpyro.plate("rows", 3):
            numpyro.sample("h", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})

    with plate_to_enum_plate():
        recorded = trace(enum(model, -2)).get_trace()
    assert seen == [True] and recorded["h"]["value"].shape == (2, 1)
    assert _compat.GIBBS_SITES_KWARG == "_gibbs_sites"
    assert _compat.mask_of(dist.Normal().mask(False)) is False
    answer = {"type": "question", "fn": lambda: 7, "args": (), "kwargs": {}, "value": None}
    assert _compat.apply_stack(answer)["value"] == 7
    assert _compat.is_prng_key(jax.random.key(0)) and not _compat.is_prng_key(jnp.zeros(3))
    assert isinstance(_compat.find_stack_level(), int)
    labels = _compat.eval_provenance(lambda x, y: {"sum": x + y, "x": 2 * x}, x=1.0, y=2.0)
    assert labels == {"sum": frozenset({"x", "y"}), "x": frozenset({"x"})}
    program = jax.make_jaxpr(lambda x, y: (x + y, 2 * x))(1.0, 2.0).jaxpr
    x, y = frozenset({"x"}), frozenset({"y"})
    assert list(_compat.track_deps_jaxpr(program, [x, y])) == [x | y, x]


def test_numpyro_transforms_values_and_keeps_the_arguments_of_a_run():
    def model(x, scale=1.0):
        numpyro.sample("z", dist.LogNormal(0.0, scale))

    found = _compat.unconstrain_fn(model, (None,), {}, {"z": jnp.array(2.0)})
    np.testing.assert_allclose(found["z"], np.log(2.0), rtol=1e-6)
    mcmc = MCMC(NUTS(model), num_warmup=2, num_samples=2, progress_bar=False)
    mcmc.run(jax.random.key(0), None, scale=2.0)
    assert _compat.run_arguments(mcmc) == ((None,), {"scale": 2.0})


def test_render_model_is_known():
    seen = []

    def model():
        seen.append(_compat.is_inspected())
        numpyro.sample("z", dist.Normal())

    numpyro.handlers.seed(model, 0)()
    numpyro.infer.inspect.get_model_relations(model)
    assert seen[0] is False and any(seen)


def test_jax_shows_its_programs():
    closed = jax.make_jaxpr(lambda x: 2.0 * x + jnp.arange(2.0))(jnp.ones(2))
    assert isinstance(closed, _compat.ClosedJaxpr)
    literals = [v for e in closed.eqns for v in e.invars if isinstance(v, _compat.Literal)]
    assert any(float(v.val) == 2.0 for v in literals if np.ndim(v.val) == 0)
    for evaluate in (
        lambda x: _compat.eval_jaxpr(closed.jaxpr, closed.consts, x)[0],
        lambda x: _compat.jaxpr_as_fun(closed)(x)[0],
    ):
        np.testing.assert_allclose(evaluate(jnp.ones(2)), [2.0, 3.0])
    traced = []
    jax.jit(lambda x: traced.append(x) or x)(1.0)
    assert isinstance(traced[0], _compat.Tracer) and not _compat.not_jax_tracer(traced[0])
    assert isinstance(closed.jaxpr.invars[0].aval, _compat.ShapedArray)
    from jax._src.core import DropVar

    (variable,) = closed.jaxpr.invars
    assert _compat.is_dropped(DropVar(variable.aval)) and not _compat.is_dropped(variable)


def test_blackjax_has_its_parts():
    one_step = _compat.overdamped_langevin(jax.value_and_grad(lambda x: -0.5 * jnp.sum(x**2)))
    state = _compat.DiffusionState(jnp.ones(2), jnp.array(-1.0), -jnp.ones(2))
    key, noise = jax.random.key(0), _compat.generate_gaussian_noise(jax.random.key(0), jnp.ones(2))
    step = 0.1
    np.testing.assert_allclose(
        one_step(key, state, step).position, 1 - step + np.sqrt(2 * step) * noise, rtol=1e-5
    )
    direction = _compat.generate_unit_vector(key, jnp.ones(3))
    np.testing.assert_allclose(jnp.sum(direction**2), 1.0, rtol=1e-5)
    start, update, final = _compat.welford_algorithm(is_diagonal_matrix=True)
    found = start(2)
    for row in jnp.array([[0.0, 1.0], [2.0, 5.0], [4.0, 9.0]]):
        found = update(found, row)
    np.testing.assert_allclose(final(found)[0], [4.0, 16.0])
    log_w = jax.random.normal(key, (1_000,))
    assert _compat.psis_weights(log_w)[0].shape == (1_000,)
    assert _compat.build_schedule(100).shape == (100, 2)
    assert _compat.systematic(key, jnp.array([0.0, 1.0]), 2).tolist() == [1, 1]
    for state, fields in {
        _compat.MALAState: ("position", "logdensity", "logdensity_grad"),
        _compat.HMCState: ("position", "logdensity", "logdensity_grad"),
        _compat.GHMCState: ("position", "momentum", "logdensity", "logdensity_grad", "slice"),
        _compat.IntegratorState: ("position", "momentum", "logdensity", "logdensity_grad"),
    }.items():
        assert state._fields == fields
