# SPDX-License-Identifier: Apache-2.0
"""What a call that cannot be meant says: which site or argument is wrong, and what to write."""

import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import calls, data, diagnostics, guides, kinds, models, others, posteriors
from mistakes.setting import BITS, FIXED, KEY, X, fit, model_of, plane

import numpyro_ebm as ebm
from numpyro_ebm import error_pages
from numpyro_ebm.inputs import numbers_of

INDEX_OF_ERRORS = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
ANCHORS = {
    re.sub(r"\W+", "-", title.lower()): table
    for title, table in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", INDEX_OF_ERRORS, re.MULTILINE)
}
MESSAGES = [
    (anchor, words)
    for anchor, table in ANCHORS.items()
    for words in re.findall(r"^\| ([^|{]+) \|[^|]+\|[^|]+\|$", table, re.MULTILINE)
    if words not in ("message", "class", "---")
]
NOTES = {error_pages.note(anchor) for anchor in ANCHORS}
BETWEEN_STRINGS = re.compile(r"""["']\s*\n\s*(?:\+\s*)?[rf]*["']""")
PACKAGE = Path(ebm.__file__).parent
SOURCE = {
    ".".join(("numpyro_ebm", *path.relative_to(PACKAGE).with_suffix("").parts)): (
        BETWEEN_STRINGS.sub("", path.read_text(encoding="utf-8"))
    )
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem not in ("__init__", "error_pages", "_compat")
}
TABLES = {
    "data": data.DATA,
    "models": models.MODELS,
    "guides": guides.GUIDES,
    "training": calls.TRAINING,
    "sampling": calls.SAMPLING,
    "posteriors": posteriors.POSTERIORS,
    "diagnostics": diagnostics.DIAGNOSTICS,
    "classes": kinds.CLASSES,
    "networks": kinds.NETWORKS,
    "files": kinds.FILES,
    "statistics": kinds.STATISTICS,
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
    ours = notes_of(caught.value)
    assert len(ours) == 1 and ours <= NOTES or "() missing" in message, "Python's own, of a call"


def notes_of(error):
    """What an error says of the manual; JAX adds notes of its own."""
    return {x for x in getattr(error, "__notes__", []) if error_pages.PAGE in x}


def test_there_are_two_hundred():
    assert len(MISTAKES) >= 200


@pytest.mark.parametrize("name", data.CONVERTED)
def test_numbers_of_other_libraries_are_taken_as_they_are(name):
    pytest.importorskip("pandas")
    found = ebm.log_likelihood(KEY, FIXED, data.CONVERTED[name](), log_normalizer=0.0)
    np.testing.assert_allclose(found, -0.5 * np.sum(np.asarray(X) ** 2, -1), rtol=1e-5)
    found = ebm.models.grbm_log_likelihood(data.GRBM, data.CONVERTED[name]())
    np.testing.assert_allclose(found, ebm.models.grbm_log_likelihood(data.GRBM, X), rtol=1e-5)


def test_arrays_of_other_libraries_keep_their_order():
    """Names of arguments are in no alphabetical order: `positive` before `negative`."""
    pandas = pytest.importorskip("pandas")
    low, high = pandas.Series([0.0, 1.0, 2.0]), pandas.Series([3.0, 4.0])
    assert ebm.diagnostics.auroc(high, low).value == 1.0
    found = numbers_of("start", z=high, b=low, c=jnp.zeros(1))
    assert [len(x) for x in found] == [2, 3, 1]


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


def test_an_option_that_may_be_meant_points_to_the_manual():
    with pytest.raises(TypeError, match="Did you mean `noise_scale`") as caught:
        ebm.DenoisingScoreMatching(noise_scal=0.1)
    assert notes_of(caught.value) == {error_pages.note("arguments-of-a-call")}


@pytest.mark.parametrize("words", others.OTHERS)
def test_a_mistake_that_others_meet_has_the_words_of_the_page(words):
    for mistake in others.OTHERS[words]:
        with pytest.raises(mistake.error) as caught:
            mistake.call()
        assert words in str(caught.value) or words.endswith("without words")
        assert re.search(mistake.says, str(caught.value))


def test_all_words_of_others_are_provoked():
    entries = re.findall(
        r"^- (?:An )?(.+?)(?:: |, from)", ANCHORS["errors-of-numpyro-and-jax"], re.MULTILINE
    )
    quoted = {re.sub(r'^"(.+)"$', r"\1", x) for x in entries}
    assert quoted == set(others.OTHERS)


@pytest.mark.parametrize(("anchor", "words"), MESSAGES)
def test_messages_are_in_the_section_to_which_their_errors_point(anchor, words):
    found = {error_pages.section(module, words) for module in SOURCE if words in SOURCE[module]}
    assert anchor in found


@pytest.mark.parametrize("module", SOURCE)
def test_every_module_has_a_section(module):
    if "Error(" in SOURCE[module]:
        assert error_pages.note(error_pages.section(module, "")) in NOTES


def test_modules_and_words_of_sections_exist():
    parts = {".".join(module.split(".")[1:n]) for module in SOURCE for n in (2, 3)}
    assert {x for named in error_pages.SECTIONS.values() for x in named} <= parts
    assert {(s, x) for s, words in error_pages.ELSEWHERE.items() for x in words} <= set(MESSAGES)


@pytest.mark.parametrize("energy", ["if", "NumPy"])
def test_models_that_are_no_programs_of_jax_are_told_so(energy):
    def value(v, W):
        if energy == "if":
            return jnp.sum(v @ W, -1) if v[0, 0] > 0 else 0.0
        return np.sum(np.asarray(v) ** 2, -1)

    with pytest.raises(jax.errors.JAXTypeError) as caught:
        fit(model_of(lambda: ebm.Lebesgue((2,)), value))
    assert notes_of(caught.value) == {error_pages.note("models")}
    assert sum("A model is a program of JAX" in note for note in caught.value.__notes__) == 1


def test_errors_of_others_and_of_pickles():
    with pytest.raises(ebm.ModelError) as caught:
        ebm.MALA(FIXED, step_size=-1.0)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert copied.__notes__ == caught.value.__notes__
    assert str(copied) == str(caught.value)
    assert not hasattr(ebm.ModelError("Of a model's own."), "__notes__")
