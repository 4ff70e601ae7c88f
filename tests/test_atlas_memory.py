"""The atlas's tasks of the memory alone: in-context regression, and overwriting and forgetting."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import reference

from experiments.atlas import forgetting, regression
from experiments.atlas.regression import SETTINGS, Setting, draw_pairs, expected, posterior_variance, reads, scores
from experiments.atlas.task import Run

read_memory = jax.jit(reads, static_argnums=0)
write = jax.jit(forgetting.write, static_argnums=0)
CLOSED = {name: model for name, model in regression.MODELS.items() if model.rule in ("sum", "delta")}
ONE_GAIN = [name for name in CLOSED if name != "sum"]  # without its gain it is "sum, no gain"
SIMULATED = ("sum", "gated sum", "delta 0.25", "gated delta", "fwm", "oja")


@pytest.fixture(autouse=True)
def broadcasting():
    with jax.numpy_rank_promotion("allow"):
        yield


# --- regression ------------------------------------------------------------------------------------------------------


def given_keys(model, keys, noise):
    """The score for these keys ``[T + 1, d]``, expected over A and the noise: M = E WWᵀ/V and N = E WA/V step by step.

    W' = αPW + βk(Ak + n)ᵀ with P = I − sβkkᵀ. A has independent rows of covariance I, so that E AᵀA/V = I.
    """
    size = keys.shape[1]
    second, first = np.zeros((2, size, size))
    curve = []
    for key, query in itertools.pairwise(keys):
        outer = np.outer(key, key)
        kept = model.decay * (np.eye(size) - (model.rule == "delta") * model.beta * outer)
        cross = model.beta * kept @ first @ outer
        second = kept @ second @ kept + cross + cross.T + model.beta**2 * (1 + noise**2) * outer
        first = kept @ first + model.beta * outer
        curve.append(query @ second @ query - 2 * query @ first @ query + 1)
    return np.array(curve)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("name", ONE_GAIN)
def test_the_memory_has_the_score_of_the_recursion_for_given_keys(name, noise, x64):
    """Exactly: values of the d maps e_iᵀ and of the T noises e_t, each in a row of its own, add up to expectations."""
    model, size, length = dataclasses.replace(CLOSED[name], gain=False), 5, 24
    keys = draw_pairs(3, Setting(), size, length, heads=1).keys[:, 0]
    values = np.concatenate([keys[:-1], noise * np.eye(length)], axis=1)
    answers = np.concatenate([keys[1:], np.zeros((length, length))], axis=1)
    read = np.asarray(read_memory(model, keys[:, None], values[:, None]))[:, 0] - answers
    np.testing.assert_allclose(np.sum(np.square(read), axis=1), given_keys(model, keys, noise), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SIMULATED)
def test_the_simulated_curve_is_that_of_the_equations_in_numpy(name, x64):
    model, setting = regression.MODELS[name], Setting(noise=0.5, changes=True)
    pairs = draw_pairs(1, setting, size=4, length=20, heads=2)
    log_decay = None if model.decay == 1 else np.full(20, np.log(model.decay))
    found = [
        reference.attention(
            pairs.keys[1:, h],
            pairs.keys[:-1, h],
            pairs.values[:, h] / model.value_scale,
            np.full(20, model.beta),
            log_decay,
            rule=model.rule,
        )[0]
        for h in range(2)
    ]
    read = model.value_scale * np.stack(found, axis=1)
    if model.gain:
        read *= np.sum(read * pairs.answers, axis=(1, 2), keepdims=True) / np.sum(read**2, axis=(1, 2), keepdims=True)
    want = np.mean((read - pairs.answers) ** 2, axis=(1, 2))
    (curve,) = scores(jax.tree.map(lambda x: x[None], pairs), model)
    np.testing.assert_allclose(curve, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_closed_form_is_the_mean_of_the_simulation(setting):
    """Within 5 standard errors, over 48 seeds, after 1 to 16 pairs: 336 comparisons, wrong once in 350 draws."""
    seeds = [draw_pairs(seed, SETTINGS[setting], size=6, length=16, heads=32) for seed in range(48)]
    pairs = jax.tree.map(lambda *x: np.stack(x), *seeds)
    for name in ONE_GAIN:
        model = dataclasses.replace(CLOSED[name], gain=False)
        curves = np.asarray(scores(pairs, model), np.float64)
        error = np.std(curves, axis=0, ddof=1) / len(seeds) ** 0.5
        want = expected(model, SETTINGS[setting], size=6, length=16)
        assert np.all(np.abs(curves.mean(0) - want) < 5 * error), name


def test_delta_without_decay_is_lms_and_sum_is_hebb():
    seen, size = np.arange(1, 41), 8
    for beta in (0.25, 1.0, 1.5):
        shrinks = 1 - beta * (2 - beta) / size
        floor = beta * 0.25 / (2 - beta)
        curve = expected(regression.Model("delta", beta), Setting(noise=0.5), size, 40)
        np.testing.assert_allclose(curve, floor + (1 - floor) * shrinks**seen, rtol=1e-12)
    hebb = (1 - seen / size) ** 2 + seen / size * (1 - 1 / size + 0.25)
    np.testing.assert_allclose(expected(regression.Model("sum"), Setting(noise=0.5), size, 40), hebb, rtol=1e-12)
    best = 1 - seen / (size * 1.25 + seen - 1)
    found = expected(regression.Model("sum", gain=True), Setting(noise=0.5), size, 40)
    np.testing.assert_allclose(found, best, rtol=1e-12)


def test_nothing_beats_least_squares():
    """Which reads exactly after d clean pairs, and 1 − t/d on average before (4.5 standard errors)."""
    keys = draw_pairs(0, Setting(), size=6, length=20, heads=400).keys
    variance = posterior_variance(keys, Setting())
    error = np.std(variance, axis=1) / 20
    bound = expected(regression.MODELS["least squares"], Setting(), size=6, length=20)
    assert np.all(np.abs(variance.mean(1) - bound) < 4.5 * error + 1e-9)
    for noise in (0.0, 0.5):
        bound = posterior_variance(keys, Setting(noise=noise)).mean(1)
        for model in CLOSED.values():
            assert np.all(expected(model, Setting(noise=noise), size=6, length=20) > bound - 4.5 * error - 1e-9)


# --- forgetting ------------------------------------------------------------------------------------------------------


def written(model, keys, values, marks=None, memory=None, beta=50.0, **parameters):
    """W ``[N, K, V]`` after ids ``[N, L]``, with β = 1 and orthonormal keys."""
    marks = np.zeros(np.shape(keys), np.float32) if marks is None else marks
    parameters = {} if model.rule == "sum" else parameters | {"beta": beta}
    table = np.eye(forgetting.SIZE, dtype=np.float32)
    return write(model, parameters, table, np.array(keys), np.array(values), marks, memory)


def test_sum_never_overwrites_and_delta_does():
    """Of each of 5 seeds: pairs with replacement, and a table of everything that a key was given."""
    rng = np.random.default_rng(0)
    keys, values = rng.integers(8, size=(2, 5, 40))
    every, last = np.zeros((2, 5, forgetting.SIZE, forgetting.VALUES))
    for row, key, value in zip(np.repeat(np.arange(5), 40), keys.ravel(), values.ravel(), strict=True):
        every[row, key, value] += 1
        last[row, key] = np.arange(forgetting.VALUES) == value
    assert np.any(np.sum(every, axis=-1) > 1)
    memory = {rule: written(forgetting.Model(rule), keys, values).fast_weights[:, 0] for rule in ("sum", "delta")}
    np.testing.assert_array_equal(memory["sum"], every)  # every old value is in the read, exactly
    np.testing.assert_allclose(memory["delta"], last, atol=1e-5)


def test_a_decay_of_1_is_no_decay():
    keys, values = np.random.default_rng(1).integers(8, size=(2, 5, 40))
    without, with_one = (written(forgetting.Model("delta", decay), keys, values) for decay in (None, 1.0))
    np.testing.assert_allclose(with_one.fast_weights, without.fast_weights, atol=1e-6)
    decayed = written(forgetting.Model("delta", 0.5), keys, values)
    assert np.abs(decayed.fast_weights - without.fast_weights).max() > 0.4


def test_a_gate_forgets_where_a_context_begins_and_nowhere_else():
    model, table = forgetting.Model("delta", "gate"), np.eye(forgetting.SIZE, dtype=np.float32)
    parameters = {"beta": 50.0, "keep": 50.0, "mark": 200.0}
    keys, values, marks = np.array([[0, 1, 2, 3]]), np.array([[4, 5, 6, 7]]), np.array([[1.0, 0, 1, 0]], np.float32)
    memory = write(model, parameters, table, keys, values, marks, None).fast_weights[0, 0]
    want = np.zeros_like(memory)
    want[2, 6] = want[3, 7] = 1
    np.testing.assert_allclose(memory, want, atol=1e-6)


def test_a_carried_memory_is_that_of_the_whole_stream():
    model = forgetting.MODELS["gated delta"]
    parameters = forgetting.init_parameters(model)
    rng = np.random.default_rng(2)
    table = forgetting.draw_table(rng, forgetting.SETTINGS["hold"])
    keys, values = rng.integers(16, size=(2, 3, 24))
    marks = np.zeros(keys.shape, np.float32)

    def on(memory, part):
        return write(model, parameters, table, keys[:, part], values[:, part], marks[:, part], memory)

    whole, carried = on(None, slice(None)), on(on(None, slice(12)), slice(12, None))
    np.testing.assert_allclose(carried.fast_weights, whole.fast_weights, atol=1e-5)


@pytest.mark.parametrize("name", forgetting.SETTINGS)
def test_answers_are_what_a_key_has_now(name):
    setting = forgetting.SETTINGS[name]
    streams = forgetting.draw_streams(np.random.default_rng(3), setting, 2, pieces=2)
    for row in range(2):
        for piece in range(2):
            end = (piece + 1) * forgetting.LENGTH
            start = end - setting.context if setting.context else 0
            keys, values = (x[row].reshape(-1)[start:end].tolist() for x in (streams.keys, streams.values))
            now = dict(zip(keys, values, strict=True))
            questions, answers = (x[row, piece].tolist() for x in (streams.questions, streams.answers))
            assert answers == [now.get(key, forgetting.VALUES) for key in questions]
            assert sum(key not in now for key in questions) == (len(questions) // 2 if setting.context else 0)
    if setting.held:
        assert streams.questions.max() < setting.held <= streams.keys.reshape(2, -1)[:, setting.held :].min()


def test_numbers_that_are_learned_give_more_right_answers(monkeypatch):
    """Contexts at the trained length: without learning, the gate does not know what a mark means."""
    model, setting = forgetting.MODELS["gated sum"], forgetting.SETTINGS["contexts"]
    for name, value in {"TESTS": 16, "BATCH": 8, "PIECES": 2}.items():
        monkeypatch.setattr(forgetting, name, value)
    table, batches, tests = forgetting.draw_seeds(setting, 2, steps=50)
    first = jax.tree.map(lambda x: np.full(2, x, np.float32), forgetting.init_parameters(model))
    learned = forgetting.train(model, table, batches)
    before, after = (np.asarray(forgetting.accuracy(model, numbers, table, tests)) for numbers in (first, learned))
    assert before.shape == (2, 2) and np.all(after > before) and np.all(after > 0.9)


@pytest.mark.exhaustive
def test_a_gate_learns_a_decay_that_is_harmless_at_the_trained_length_and_not_at_16_times_that():
    table, batches, _ = forgetting.draw_seeds(forgetting.SETTINGS["hold"], 5)
    decay = jax.nn.sigmoid(forgetting.train(forgetting.MODELS["gated delta"], table, batches)["keep"])
    assert np.all(decay > 0.9990) and np.all(decay < 0.9996)
    assert np.all(decay**forgetting.LENGTH > 0.93) and np.all(decay**1000 < 0.65)


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [regression, forgetting])
def test_every_run_has_a_model_and_a_setting_and_the_figure_takes_any_rows(module):
    from matplotlib.figure import Figure

    runs = module.TASK.runs(2)
    assert len(set(runs)) == len(module.MODELS) * len(module.SETTINGS)
    assert all(module.MODELS[run.model] and module.SETTINGS[run.setting] and run.seeds == 2 for run in runs)
    cells = [(run, seed, x) for run in runs[:3] for seed in range(2) for x in module.XS]
    rows = [{"model": run.model, "setting": run.setting, "seed": seed, "x": x, "score": 0.5} for run, seed, x in cells]
    figure = Figure(layout="constrained")
    module.TASK.draw(figure, [{name: str(cell) for name, cell in row.items()} for row in rows])
    assert figure.axes and all(len(line.get_xdata()) for axes in figure.axes for line in axes.lines)


def test_a_run_has_a_point_for_each_seed_and_length(monkeypatch):
    monkeypatch.setattr(regression, "draw_pairs", lambda seed, setting: draw_pairs(seed, setting, heads=2))
    done = []
    points = regression.TASK.execute(Run("regression", "delta", "clean", seeds=2), done.append)
    assert {(point.seed, point.x) for point in points} == {(seed, x) for seed in range(2) for x in regression.XS}
    assert done[-1] == 1 and 0.9 < regression.TASK.solved(points) <= 1
    assert len({point.score for point in points}) == len(points)
