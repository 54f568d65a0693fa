# SPDX-License-Identifier: Apache-2.0
"""What a call that cannot be meant says: which site or argument is wrong, and what to write."""

import pickle
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import calls, data, models
from mistakes.setting import BITS, FIXED, KEY, X, plane

import numpyro_ebm as ebm
from numpyro_ebm import error_pages

INDEX_OF_ERRORS = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
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
    notes = getattr(caught.value, "__notes__", [])  # JAX adds its own
    assert [x for x in notes if error_pages.PAGE in x] == pages_of(message)


def pages_of(message):
    """The note that a message has, by the tables of the manual."""
    sections = re.split(r"^## ", INDEX_OF_ERRORS, flags=re.MULTILINE)[1:]
    for section in sections:
        if any(words in message for words in messages_of(section)):
            anchor = re.sub(r"\W+", "-", section.partition("\n")[0].lower())
            return [f"Why, and what helps: {error_pages.PAGE}#{anchor}"]
    return []


def test_there_are_two_hundred():
    assert len(MISTAKES) >= 200


@pytest.mark.parametrize("name", data.CONVERTED)
def test_numbers_of_other_libraries_are_taken_as_they_are(name):
    pytest.importorskip("pandas")
    found = ebm.log_likelihood(KEY, FIXED, data.CONVERTED[name](), log_normalizer=0.0)
    np.testing.assert_allclose(found, -0.5 * np.sum(np.asarray(X) ** 2, -1), rtol=1e-5)
    found = ebm.models.grbm_log_likelihood(data.GRBM, data.CONVERTED[name]())
    np.testing.assert_allclose(found, ebm.models.grbm_log_likelihood(data.GRBM, X), rtol=1e-5)


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


def messages_of(page):
    """The first columns of the tables of messages."""
    words = re.findall(r"^\| ([^|{]+) \|[^|]+\|[^|]+\|$", page, re.MULTILINE)
    return [x for x in words if x not in ("message", "class", "---")]


def test_the_index_of_errors_has_the_words_of_the_messages():
    joined = re.compile(r"""["']\s*\n\s*(?:\+\s*)?[rf]*["']""")
    paths = [x for x in Path(ebm.__file__).parent.rglob("*.py") if x.stem != "error_pages"]
    source = "\n".join(joined.sub("", path.read_text(encoding="utf-8")) for path in paths)
    words = messages_of(INDEX_OF_ERRORS)
    assert len(words) > 40
    assert [x for x in words if x not in source] == []


@pytest.mark.parametrize("words", messages_of(INDEX_OF_ERRORS))
def test_an_error_of_the_index_points_to_its_section(words):
    for kind in (ebm.ModelError, ebm.UnhandledEnergyError, ebm.ImproperSamplingError):
        error = kind(f"'v' {words} (2,).")
        assert error.__notes__ == pages_of(words) != []
        assert str(error) == f"'v' {words} (2,)."
        assert pickle.loads(pickle.dumps(error)).__notes__ == error.__notes__
    assert not hasattr(ebm.ModelError("Of something else."), "__notes__")
