# SPDX-License-Identifier: Apache-2.0
"""Types: public signatures are complete, and mypy tells right scripts of users from wrong ones."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "numpyro_ebm"


def signatures(node, name=""):
    """The public functions and methods under a node of a syntax tree, by their qualified names."""
    for child in node.body:
        is_public = not child.name.startswith("_") if hasattr(child, "name") else False
        if isinstance(child, ast.ClassDef) and is_public:
            yield from signatures(child, f"{name}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and (
            is_public or child.name in ("__init__", "__call__")
        ):
            yield f"{name}{child.name}", child


def missing(function):
    """What a function leaves without a type."""
    given = function.args
    parameters = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    for x in parameters:
        if x is not None and x.annotation is None and x.arg not in ("self", "cls"):
            yield x.arg
    if function.returns is None and function.name != "__init__":
        yield "return"


def test_public_signatures_are_complete():
    without = {
        f"{path.relative_to(PACKAGE)}: {name}": found
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, function in signatures(ast.parse(path.read_text()))
        if (found := list(missing(function)))
    }
    assert not without


def test_what_a_signature_leaves_out_is_found():
    source = "class A:\n    def f(self, x, *, y: int = 0, **z): ...\n    def _g(self, x): ...\n"
    found = {name: list(missing(f)) for name, f in signatures(ast.parse(source))}
    assert found == {"A.f": ["x", "z", "return"]}


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


RIGHT = '''
"""Learn an energy, sample it, and look at its log Z and diagnostics."""

import jax
import jax.numpy as jnp
import numpyro  # type: ignore[import-untyped]
import numpyro.distributions as dist  # type: ignore[import-untyped]
import optax  # type: ignore[import-untyped]
from numpyro.infer import MCMC  # type: ignore[import-untyped]

import numpyro_ebm as ebm


def grbm(data: jax.Array | None = None) -> None:
    W = numpyro.param("W", jnp.zeros((2, 4)))
    scale = numpyro.param("scale", jnp.ones(2), constraint=dist.constraints.positive)
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(num_values=2, event_shape=(4,)))
        ebm.energy("E", 0.5 * jnp.sum((v / scale) ** 2, -1) - jnp.sum((v @ W) * h, -1))


def guide(data: jax.Array) -> None:
    A = numpyro.param("A", jnp.zeros((2, 4)))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))


data = ebm.datasets.checkerboard(jax.random.key(0), 1_000)
marginal = ebm.VaGES(num_particles=2, refine=ebm.LangevinRefinement(num_steps=2))
objective = ebm.DenoisingScoreMatching(0.05, marginal, variance_reduction=True)
svi = ebm.EnergySVI(grbm, guide, optax.adam(1e-3), objective, num_guide_steps=5)
fit = svi.run(jax.random.key(1), 100, data, batch_size=100, progress_bar=False)

model = ebm.fixed(grbm, fit.params)
mcmc = MCMC(ebm.MALA(model, step_size=0.1), num_warmup=100, num_samples=100)
mcmc.run(jax.random.key(2))
draws: dict[str, jax.Array] = ebm.sample(jax.random.key(3), model, 200, kernel=ebm.BlockGibbs)
log_z = ebm.log_normalizer(jax.random.key(4), model, method=["enumerate", "ais"])
error: float = float(log_z.mcse)
each: jax.Array = ebm.log_likelihood(jax.random.key(5), model, data, log_normalizer=log_z)
errors = ebm.log_likelihood(jax.random.key(5), model, data, with_error=True).mcse
idata = ebm.to_arviz(mcmc, log_normalizer=log_z)
gap: jax.Array = ebm.posterior_gap(jax.random.key(6), grbm, guide, fit.params, data).value
posterior = ebm.generalized(grbm, ebm.PseudoLikelihood(), learning_rate="calibrate")
exchange = ebm.Exchange(grbm, ebm.BlockGibbs, proposal="langevin", num_bridges=10)
table = ebm.compare({"grbm": (grbm, fit)}, data, score="hyvarinen", check_integrable=False)
replicated: dict[str, jax.Array] = ebm.predictive(jax.random.key(7), grbm, {"W": data}, data)
calibration = ebm.simulation_based_calibration(jax.random.key(8), grbm, exchange, 100, data)
p_value: float = calibration.p_value
ax = ebm.plots.density(model, xlim=(-4.0, 4.0), ylim=(-4.0, 4.0))
'''

WRONG = {
    'ebm.DenoisingScoreMatching("0.05")': "arg-type",
    'ebm.sample(key, model, "many")': "arg-type",
    'ebm.EnergySVI(model, None, None, ebm.ScoreMatching(), num_rows="all")': "arg-type",
    'ebm.log_normalizer(key, model, method="exact")': "arg-type",
    'ebm.KernelSteinDiscrepancy(kernel="gaussian")': "arg-type",
    'ebm.Exchange(model, "enumerated")': "arg-type",
    "ebm.VaGES(num_particles=2.5)": "arg-type",
    'ebm.compare({}, score="crps")': "arg-type",
    "ebm.MALA(model, adapt=True)": "call-arg",
    'ebm.energy("E")': "call-arg",
    "ebm.log_normalizer(key, model).variance": "attr-defined",
}


@pytest.mark.slow
def test_mypy_tells_right_scripts_from_wrong_ones(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(RIGHT)
    start = "import jax\n\nimport numpyro_ebm as ebm\n\n"
    start += "key, model = jax.random.key(0), ebm.fixed(ebm.models.grbm, {})\n"
    (tmp_path / "wrong.py").write_text(start + "\n".join(WRONG) + "\n")
    options = ["--strict", "--follow-imports=silent", "--config-file=", "--no-color-output"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "right.py", "wrong.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    first = start.count("\n") + 1
    expected = [("wrong.py", first + i, code) for i, code in enumerate(WRONG.values())]
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = [
        (line.split(":")[0], int(line.split(":")[1]), line.rsplit("[", 1)[-1].rstrip("]"))
        for line in errors
    ]
    assert sorted(found) == expected, done.stdout + done.stderr
