# SPDX-License-Identifier: Apache-2.0
"""What the host is told while a run goes on, and how a run ends early."""

import signal
from contextlib import suppress
from types import SimpleNamespace

import jax
import numpy as np
import numpyro
import optax
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.svi.compiled import CompiledRounds

DATA = np.random.default_rng(4).normal(1.0, 1.0, 50)


def gaussian(data):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - mean) ** 2)


def svi():
    return ebm.EnergySVI(gaussian, None, optax.sgd(0.1), ebm.DenoisingScoreMatching(0.3))


ONE = svi()  # its rounds are compiled once


def run(num_steps, one=ONE, **options):
    return one.run(jax.random.key(1), num_steps, DATA, progress_bar=False, **options)


def test_a_callback_sees_every_loss_once_and_changes_nothing():
    plain, seen = run(47), []
    fit = run(47, callback=lambda *told: seen.append(told), every=10)
    assert [step for step, _, _ in seen] == [10, 20, 30, 40]
    assert all(int(state.step) == step for step, state, _ in seen)
    np.testing.assert_array_equal(np.concatenate([x for _, _, x in seen]), plain.losses[:40])
    np.testing.assert_array_equal(fit.losses, plain.losses)
    assert all(x.base is None for _, _, x in seen)  # one that is kept holds nothing else
    # A run that goes on counts from the first round of all.
    later = []
    run(27, init_state=run(20).state, callback=lambda *x: later.append(x), every=27)
    (step, _, losses), *others = later
    assert (step, others) == (47, [])
    np.testing.assert_array_equal(losses, plain.losses[20:])


def test_a_callback_costs_no_rounds_that_are_not_taken(monkeypatch):
    """Orders of the rows are drawn for the rounds of a chunk, and each of them once."""
    drawn, draw = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (drawn.append(seed), draw(seed))[1])
    plain = run(42, batch_size=20)
    drawn.clear()
    fit = run(42, batch_size=20, callback=lambda *_: None, every=7)
    assert [seed[-1] for seed in drawn] == list(range(21))  # an epoch has two batches
    np.testing.assert_array_equal(fit.losses, plain.losses)


@pytest.mark.slow
def test_a_callback_ends_a_run():
    means = []

    def patience(step, state, losses):
        means.append(np.mean(losses))
        return step == 15

    fit = run(1_000, callback=lambda *x: np.bool_(patience(*x)), every=5)
    assert len(fit.losses) == 15 and int(fit.state.step) == 15 and len(means) == 3
    np.testing.assert_array_equal(fit.losses, run(15).losses)
    # What is true only in Python's eyes does not end it in silence.
    for told in (lambda *x: x[2].mean(), lambda *x: {"loss": x[2]}):
        with pytest.raises(ebm.ModelError, match="returns True to end the run"):
            run(15, callback=told, every=5)


@pytest.fixture
def press():
    """Press Ctrl-C; workers of pytest-xdist ignore the signal, and a run leaves it as it was."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    left = signal.signal(signal.SIGINT, before)
    assert left is signal.default_int_handler


def unharmed(*args, **options):
    """A run from which no interruption comes out: it would end pytest."""
    try:
        return run(*args, **options)
    except KeyboardInterrupt:
        pytest.fail("the result is lost")


def test_an_interruption_returns_what_was_learned(press):
    with pytest.warns(ebm.InterruptedWarning, match="after 20 of 1000 rounds") as caught:
        fit = unharmed(1_000, callback=lambda step, *_: press() if step == 20 else None, every=10)
    np.testing.assert_array_equal(fit.losses, run(20).losses)
    (told,) = (x.message for x in caught if isinstance(x.message, ebm.InterruptedWarning))
    assert told.result is fit


LOOK = SimpleNamespace(call=lambda *told: None)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    "where, rounds",
    [
        ((CompiledRounds, "chunk"), 0),
        ((LOOK, "call"), 10),
        ((ebm.Checkpoint, "write"), 10),
        ((ebm.Checkpoint, "finish"), 20),
        ((ebm.DenoisingScoreMatching, "review_state"), 20),
    ],
    ids=["chunk", "callback", "write", "finish", "review"],
)
def test_a_second_interruption_ends_a_run(where, rounds, times, press, tmp_path, monkeypatch):
    """The first one leaves learned and written what was; after both the same call goes on."""
    pytest.importorskip("orbax.checkpoint")
    works, presses, reached = getattr(*where), iter([press] * times), []

    def pressed(*args, **kwargs):
        try:
            next(presses, int)()
        finally:  # of a user who cleans up, or the next line where the first one is kept
            next(presses, int)()
        reached.append(None)
        return works(*args, **kwargs)

    options = {"checkpoint": ebm.Checkpoint(tmp_path, every=10)}
    with monkeypatch.context() as patch:
        patch.setattr(*where, pressed)
        options |= {"callback": lambda *told: LOOK.call(*told), "every": 10}
        if times == 2:
            with pytest.raises(KeyboardInterrupt):
                run(20, **options)
            assert not reached
        else:
            with pytest.warns(ebm.InterruptedWarning, match=f"interrupted after {rounds} of 20"):
                fit = unharmed(20, **options)
            assert len(fit.losses) == rounds
            assert sorted(int(x.name) for x in tmp_path.iterdir()) == [10, 20][: rounds // 10]
    assert next(presses, None) is None
    np.testing.assert_array_equal(run(20, **options).losses, run(20).losses)


def test_an_interruption_that_something_swallows_is_heard(press):
    """As those in callbacks of the garbage collector are; others' handlers stay as they are."""

    def swallowing(step, *_):
        with suppress(KeyboardInterrupt):
            press()

    with pytest.warns(ebm.InterruptedWarning, match="after 5 of 20"):
        unharmed(20, callback=swallowing, every=5)
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(None))
    assert len(unharmed(20, callback=swallowing, every=5).losses) == 20
    signal.signal(signal.SIGINT, before)
    assert len(heard) == 4


def test_an_interruption_before_the_first_round(monkeypatch):
    one = svi()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(one._compiled, "chunk", interrupted)
    with pytest.warns(ebm.InterruptedWarning, match="after 0 of 30"):
        fit = one.run(jax.random.key(1), 30, DATA, progress_bar=False)
    assert len(fit.losses) == 0 and fit.params["mean"] == 0.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"callback": print}, "both of `callback` and `every`"),
        ({"every": 3}, "both of `callback` and `every`"),
        ({"callback": print, "every": 0}, "every"),
        ({"callback": print, "every": 2.5}, "every"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ebm.ModelError, match=message):
        run(10, **options)
