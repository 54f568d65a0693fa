# SPDX-License-Identifier: Apache-2.0
"""What a call that cannot be meant says: which site or argument is wrong, and what to write."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import calls, data, models
from mistakes.setting import BITS, FIXED, KEY, X, plane

import numpyro_ebm as ebm

TABLES = {
    "data": data.DATA,
    "models": models.MODELS,
    "guides": models.GUIDES,
    "training": calls.TRAINING,
    "sampling": calls.SAMPLING,
    "posteriors": calls.POSTERIORS,
    "diagnostics": calls.DIAGNOSTICS,
}
SLOW = {
    "an AutoGuide of the model",
    "a factor, NUTS",
    "a misspelt field, BlockGibbs",
    "three columns, update",
    "NUTS with a free parameter",
    "a misspelt field",
    "an integral that diverges",
}
MISTAKES = [
    pytest.param(mistake, id=f"{table}: {name}", marks=[pytest.mark.slow] * (name in SLOW))
    for table, entries in TABLES.items()
    for name, mistake in entries.items()
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(mistake):
    with pytest.raises(mistake.error) as caught:
        mistake.call()
    message = str(caught.value)
    assert re.search(mistake.says, message, re.DOTALL), message
    assert len(message) < 1_000, "nobody reads on"
    assert "Tracer" not in message


def test_there_are_two_hundred():
    assert len(MISTAKES) >= 200


@pytest.mark.parametrize("name", data.CONVERTED)
def test_numbers_of_other_libraries_are_taken_as_they_are(name):
    pytest.importorskip("pandas")
    found = ebm.log_likelihood(KEY, FIXED, data.CONVERTED[name](), log_normalizer=0.0)
    np.testing.assert_allclose(found, -0.5 * np.sum(np.asarray(X) ** 2, -1), rtol=1e-5)


def test_a_fixed_model_keeps_keyword_arguments():
    model = ebm.fixed(plane, {"W": jnp.eye(3)}, n=3)
    found = ebm.log_likelihood(KEY, model, jnp.ones((2, 3)), log_normalizer=0.0)
    np.testing.assert_allclose(found, [-1.5, -1.5])
    with pytest.raises(ebm.ModelError, match=r"shape \(3, 3\).*shape \(2, 2\)"):
        ebm.log_likelihood(KEY, model, jnp.ones((2, 2)), n=2)


@pytest.mark.parametrize("name", data.BITS_CONVERTED)
def test_bits_of_other_types_are_taken_as_they_are(name):
    pytest.importorskip("pandas")
    found = ebm.log_likelihood(KEY, data.PAIRS, data.BITS_CONVERTED[name](), log_normalizer=0.0)
    np.testing.assert_allclose(found, -np.sum(np.asarray(BITS), -1))


def test_the_index_of_errors_has_the_words_of_the_messages():
    root = Path(ebm.__file__).parent
    joined = re.compile(r"""["']\s*\n\s*(?:\+\s*)?[rf]*["']""")
    source = "\n".join(joined.sub("", path.read_text()) for path in root.rglob("*.py"))
    page = (root.parent / "docs" / "errors.md").read_text()
    words = re.findall(r"^\| ([^|{]+) \|[^|]+\|[^|]+\|$", page, re.MULTILINE)
    words = [x for x in words if x not in ("message", "class", "---")]
    assert len(words) > 40
    assert [x for x in words if x not in source] == []
