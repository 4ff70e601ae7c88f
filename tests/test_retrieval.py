"""The paper's retrieval experiment: the authors' numbers, the data's law, evaluation, the stopping rule."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some

from experiments.retrieval import experiment as retrieval
from experiments.retrieval import fwm
from experiments.retrieval import model as retrieval_model
from experiments.retrieval.experiment import Config, Run, load, save, sweep
from experiments.retrieval.model import Model, Task, batch_loss, params_from_torch
from fwt_jax import clipped
from fwt_jax.memory import delta_step

pytestmark = pytest.mark.usefixtures("compiled_once")

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden" / "retrieval").glob("*.npz"))
RULES = {"ours": "delta", "cat": "softmax"}
ALL_MODELS = sorted({*retrieval.CAPACITY_MODELS, *retrieval.UPDATE_RULE_MODELS}, key=lambda m: (m.name, m.rule))


@pytest.fixture(autouse=True)
def broadcasting():
    with jax.numpy_rank_promotion("allow"):
        yield


def small_params(model, num_keys, replace=True, seed=0):
    return retrieval_model.init_params(seed, model, Task(num_keys, replace))


# --- the authors' program --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_weights_of_the_authors_program_give_its_outputs_loss_and_gradients(path):
    data = np.load(path)
    config = json.loads(str(data["config"]))
    rule = RULES.get(config["update_rule"], config["update_rule"])
    model = Model(config["attention"], rule, config["arg"])
    params = params_from_torch({name[6:]: data[name] for name in data.files if name.startswith("state/")}, model)
    num_keys = config["n_values"]
    batch = (data["x"][:, 0], data["x"][:, 1] - num_keys, data["q"][:, 0], data["y"][:, 0] - num_keys)
    projection = data["omega"].T if "omega" in data.files else None
    derivatives = jax.jit(jax.value_and_grad(batch_loss, has_aux=True), static_argnums=3)
    (loss, predicted), grads = derivatives(params, batch, projection, model)

    def close(got, want):
        # A gradient that is zero but for rounding (the bias of softmax keys) is held against the size of the others.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 1e-3))

    close(predicted, data["y_hat"])
    np.testing.assert_allclose(loss, data["loss"], rtol=1e-5)
    close(grads["embedding"], data["grad/embeddingK.weight"][:num_keys])
    assert not data["grad/embeddingK.weight"][num_keys:].any()
    for ours, theirs in {"key": "W_k", "query": "W_q", "beta": "W_b"}.items():
        assert (ours in grads) == (f"grad/{theirs}.weight" in data.files)
        if ours in grads:
            close(grads[ours]["kernel"].T, data[f"grad/{theirs}.weight"])
            close(grads[ours]["bias"], data[f"grad/{theirs}.bias"])


def test_a_state_dict_that_lacks_weights_is_refused():
    with pytest.raises(ValueError, match=r"W_q\.weight.*missing"):
        params_from_torch(
            {"embeddingK.weight": np.zeros((4, 2)), "W_k.weight": np.zeros((2, 4))}, Model("linear", "sum")
        )


# --- data ------------------------------------------------------------------------------------------------------------


def test_setting_1_draws_uniform_permutations():
    _, values = retrieval_model.sample_pairs(jax.random.key(0), Task(5, False), (6000,), 5)
    np.testing.assert_array_equal(np.sort(values, axis=1), np.tile(np.arange(5), (6000, 1)))
    _, counts = np.unique(values, axis=0, return_counts=True)
    assert len(counts) == 120
    assert np.sum((counts - 50) ** 2 / 50) < 180  # χ² with 119 degrees of freedom: 3 in 10,000 above


def test_setting_2_asks_for_the_value_at_the_last_occurrence():
    keys, values, query, target = retrieval_model.sample_batch(jax.random.key(0), Task(6, True), 200)
    assert keys.shape == values.shape == (200, 12)
    for k, v, q, y in zip(*map(np.asarray, (keys, values, query, target)), strict=True):
        assert y == v[np.flatnonzero(k == q)[-1]]
    assert len(np.unique(query)) == 6


def test_setting_2_asks_for_a_position_so_that_repeated_keys_are_likelier():
    keys, _, query, _ = retrieval_model.sample_batch(jax.random.key(1), Task(3, True), 20_000)
    share = np.mean(np.asarray(keys) == np.asarray(query)[:, None])
    # E[Σ n_k²]/L² with n ~ Multinomial(6, 1/3): 1/3 + (1 − 1/3)/6; a uniform distinct key would give less.
    np.testing.assert_allclose(share, 1 / 3 + (2 / 3) / 6, atol=0.01)


@pytest.mark.parametrize("model", [Model("dpfp", "sum", 1), Model("softmax", "softmax")], ids=str)
def test_the_order_of_pairs_does_not_matter_where_keys_are_not_listed(model):
    """Setting 1 leaves the keys in their own order, for a sum does not see it."""
    params, order = small_params(model, 7, False), np.random.default_rng(0).permutation(7)
    values = np.random.default_rng(1).permutation(7)[None]
    listed = (order[None], values[:, order], np.array([3]), values[:, 3])
    plain = (None, values, np.array([3]), values[:, 3])
    losses = [batch_loss(params, batch, None, model)[0] for batch in (listed, plain)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


# --- model and evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", some(4, ALL_MODELS[::-1]), ids=lambda model: f"{model.name}-{model.rule}")
def test_one_query_is_read_as_many_are(model):
    """One query takes the cheapest path (the transposed recurrence for delta), several go through the memory."""
    params = small_params(model, 9)
    keys, values = np.random.default_rng(0).integers(0, 9, (2, 14))
    projection = retrieval_model.draw_projection(jax.random.key(0), model)
    queries = np.arange(9)
    key, beta, query = retrieval_model.project(params, keys, values, queries)

    def predict(query):
        return retrieval_model.predict(model, 9, key, beta, values, query, projection)

    one_by_one = jnp.concatenate([predict(query[i : i + 1]) for i in range(9)])
    np.testing.assert_allclose(predict(query), one_by_one, rtol=0, atol=2e-5 * jnp.abs(one_by_one).max())


@pytest.mark.slow
@pytest.mark.parametrize("model", some(5, ALL_MODELS[::-1]), ids=lambda model: f"{model.name}-{model.rule}")
def test_accelerators_take_all_sequences_at_once_with_the_same_gradient(model, monkeypatch):
    params, task = small_params(model, 6), Task(6, True)
    batch = retrieval_model.sample_batch(jax.random.key(1), task, 5)
    projection = retrieval_model.draw_projection(jax.random.key(2), model)

    def derivatives():
        return jax.value_and_grad(batch_loss, has_aux=True)(params, batch, projection, model)

    monkeypatch.setattr(fwm, "CHUNK_SIZE", 5)
    expected = derivatives()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chex.assert_trees_all_close(derivatives(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1.0, 3.0])
@pytest.mark.parametrize("model", [Model("favor", "sum", 5), *(Model("dpfp", "sum", nu) for nu in (1, 2, 7))], ids=str)
def test_weights_without_features_are_those_of_features_with_all_digits(model, length):
    key, query = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((0, (7, 8)), (1, (8,))))
    projection = retrieval_model.draw_projection(jax.random.key(2), model, (), 8)

    def by_features(key, query):
        return retrieval_model._features(model, key, projection) @ retrieval_model._features(model, query, projection)

    def without_features(key, query):
        return retrieval_model._weights(model, key, query[None], projection)[0]

    for function in (lambda f: f, lambda f: jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1))):
        weights = function(without_features)(length * key, query)
        chex.assert_trees_all_close(weights, function(by_features)(length * key, query), rtol=1e-5, atol=1e-6)
    both = jax.value_and_grad(lambda *x: jnp.sum(without_features(*x)), argnums=(0, 1))
    assert "DEFAULT" not in jax.jit(both).lower(key, query).as_text()


@pytest.mark.parametrize("model", [Model("favor", "sum", 5), Model("dpfp", "sum", 2)], ids=str)
def test_weights_without_features_keep_float32(model, x64):
    key, query = jnp.ones((3, 8), jnp.float32), jnp.ones((1, 8), jnp.float32)
    projection = None if model.feature_map == "dpfp" else jnp.ones((5, 8), jnp.float32)

    def weigh(key, query):
        return jnp.sum(retrieval_model._weights(model, key, query, projection))

    value, gradients = jax.value_and_grad(weigh, argnums=(0, 1))(key, query)
    assert {x.dtype for x in (value, *gradients)} == {np.dtype("float32")}


def write_by_steps(num_values, key, beta, values):
    """W_1 = β_1 k_1 v_1ᵀ whatever its norm, then the steps of fwm: the memory, and ‖W̃_t‖ of each write."""

    def step(fast_weights, token):
        key, beta, value = token
        return clipped.step(fast_weights, key, value, beta), jnp.linalg.norm(delta_step(fast_weights, key, value, beta))

    value = jax.nn.one_hot(values, num_values, dtype=key.dtype)
    first = beta[0] * jnp.outer(key[0], value[0])
    return jax.lax.scan(step, first, (key[1:], beta[1:], value[1:]))


def read_by_steps(num_values, key, beta, values, query):
    return query @ write_by_steps(num_values, key, beta, values)[0]


def compare_with_steps(query, weights, key, beta, values):
    def loss(read, key, beta, query):
        return jnp.sum(jnp.sin(read(weights.shape[1], key, beta, values, query)) * weights)

    both = jax.jit(jax.value_and_grad(loss, (1, 2, 3)), static_argnums=0)
    want = both(read_by_steps, key, beta, query)
    # Gradients of early keys are as small as 1e-8.
    chex.assert_trees_all_close(both(fwm.read, key, beta, query), want, rtol=1e-9, atol=1e-14)
    assert "DEFAULT" not in both.lower(fwm.read, key, beta, query).as_text()


def test_a_clip_at_norm_1_has_half_of_its_gradient(x64):
    """As jnp.maximum has: a memory of norm 1, and then a write of nothing."""
    key = np.array([[1.0, 0.0], [0.6, 0.3], [0.4, 0.5]])
    query, weights = np.random.default_rng(0).normal(size=(2, 2, 3))
    compare_with_steps(query[:, :2], weights, key, np.array([1.0, 0.0, 0.5]), np.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("length", "size", "queries", "num_values"),
    [(1, 1.0, 1, 3), (5, 1.0, 2, 9), (40, 0.02, 1, 3), (60, 0.4, 2, 60), (97, 0.4, 1, 3), (130, 0.4, 2, 60)],
)
def test_the_fast_weight_memory_and_its_gradient_are_those_of_the_steps(length, size, queries, num_values, x64):
    """Figure 3's "Schlag (2021)", in one to four chunks, with writes that are clipped and writes that are not."""
    rng = np.random.default_rng(length)
    key = size * rng.normal(size=(length, 4))
    query, weights = rng.normal(size=(queries, 4)), rng.normal(size=(queries, num_values))
    beta, values = rng.uniform(size=length), rng.integers(0, num_values, length)
    if length == num_values:  # every write takes a column of its own
        values = rng.permutation(length)
    key[0] *= 10  # longer than 1 with all sizes but the smallest
    compare_with_steps(query, weights, key, beta, values)
    if length > 5:
        is_clipped = write_by_steps(num_values, key, beta, values)[1] > 1
        assert jnp.any(~is_clipped) and jnp.any(is_clipped) == (size > 0.1)


@pytest.mark.parametrize("replace", [False, True])
def test_evaluation_weighs_chunks_of_queries_as_the_authors_do(replace, monkeypatch):
    """Literally: distinct keys in sorted order, at most EVAL_QUERIES, in chunks, the mean of the chunks' means."""
    monkeypatch.setattr(retrieval_model, "EVAL_SEQUENCES", 3)
    monkeypatch.setattr(retrieval_model, "EVAL_QUERIES", 7)
    model, task, batch_size, key = Model("linear", "sum"), Task(10, replace), 4, jax.random.key(3)
    params = small_params(model, 10, replace)
    pairs_key, _ = jax.random.split(key)
    all_keys, all_values = retrieval_model.sample_pairs(pairs_key, task, (3,), 10)
    chunk_means = []
    for i in range(3):
        keys, values = np.arange(10) if all_keys is None else np.asarray(all_keys[i]), np.asarray(all_values[i])
        errors = []
        for k in np.unique(keys)[:7]:
            target = values[np.flatnonzero(keys == k)[-1]]
            batch = (keys[None], values[None], np.array([k]), np.array([target]))
            errors.append(batch_loss(params, batch, None, model)[0])
        chunk_means += [np.mean(errors[start : start + 4]) for start in range(0, len(errors), 4)]
    got = retrieval_model.eval_loss(params, key, model, task, batch_size)
    np.testing.assert_allclose(got, np.mean(chunk_means), rtol=1e-5)


def test_favor_draws_a_projection_for_each_chunk_of_an_evaluation():
    model = Model("favor", "sum", 3)
    projections = retrieval_model.draw_projection(jax.random.key(0), model, (2, 2), 4)
    chex.assert_shape(projections, (2, 2, 3, 4))
    assert len(np.unique(np.asarray(projections).round(5))) == 2 * 2 * 3 * 4
    assert retrieval_model.draw_projection(jax.random.key(0), Model("linear", "sum")) is None


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses, steps",
    [
        ([0.5, 0.2, 0.0009, 0.0001], 3),  # at most 0.001
        ([0.5] + [0.4] * 20, 13),  # eleven evaluations in a row without a new best
        ([0.5, 0.4] + [0.45] * 10 + [0.3] + [0.35] * 20, 24),  # a new best gives ten more
        ([float("nan")] * 20, 11),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.05], 6),  # max_steps
    ],
)
def test_a_run_stops_by_the_papers_rule(losses, steps, monkeypatch):
    trainer = (lambda seed: 0, lambda state: (state + 1, losses[state]))
    monkeypatch.setattr(retrieval_model, "make_trainer", lambda model, task: trainer)
    got, _ = retrieval_model.train(Model("linear", "sum"), Task(20, False), max_steps=600 if steps == 6 else 100_000)
    assert len(got) == steps


@pytest.mark.exhaustive
def test_delta_learns_to_reassign_keys_where_sum_cannot():
    """Figure 3 in small: S = 6, keys assigned anew. From seed 1 rounding decides whether it stops on a plateau."""
    task = Task(6, True)
    delta, _ = retrieval_model.train(Model("dpfp", "delta", 1), task, seed=0)
    assert delta[-1] <= 1e-3
    assert min(retrieval_model.train(Model("dpfp", "sum", 1), task, max_steps=100 * len(delta))[0]) > 0.03


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was_kept(tmp_path, monkeypatch):
    run, checkpoint = (Model("dpfp", "delta", 1), Task(6, True)), tmp_path / "run.unfinished"
    whole, _ = retrieval_model.train(*run, max_steps=400)
    monkeypatch.setattr(retrieval_model, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(time, "process_time", itertools.count().__next__)  # a second for each look at the clock
    steps = []

    def interrupt(step, loss):
        steps.append(step)
        if step == 300 and len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieval_model.train(*run, max_steps=400, report=interrupt, checkpoint=checkpoint)
    losses, seconds = retrieval_model.train(*run, max_steps=400, report=interrupt, checkpoint=checkpoint)
    assert losses == whole
    assert seconds == 2 + 3  # two of them until it was kept the second and last time
    assert steps == [100, 200, 300, 300, 400]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: b"",
        lambda data: data.replace(b"seconds", b"minutes"),
        lambda data: data[:-32],
        lambda data: bytes(len(data)),
        *(
            lambda data, at=at: bytes(x ^ (1 if i == int(at * (len(data) - 1)) else 0) for i, x in enumerate(data))
            for at in (0, 0.3, 0.6, 0.9, 1)
        ),
    ],
)
def test_an_unfinished_run_that_cannot_be_read_names_its_file(damage, tmp_path):
    run, checkpoint = (Model("linear", "sum"), Task(4, False)), tmp_path / "run.unfinished"
    state = retrieval_model.make_trainer(*run)[0](1)
    retrieval_model._save(checkpoint, state, [0.5], 1.0)
    assert retrieval_model._restore(checkpoint, state)[1:] == ([0.5], 1.0)
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match=r"run.unfinished is not an unfinished run .* delete it"):
        retrieval_model.train(*run, max_steps=100, checkpoint=checkpoint)
    path = tmp_path / "quick.csv"
    checkpoint.rename(tmp_path / "quick-linear-sum-4-0-1.unfinished")
    with pytest.raises(ValueError, match=r"quick-linear-sum-4-0-1.unfinished is not an unfinished run .* delete it"):
        sweep([Run(*run)], path, workers=1)  # before any run begins


# --- sweeps ----------------------------------------------------------------------------------------------------------


def finished(run):
    return dict(zip(retrieval.COLUMNS, (*run.id, "0.25", "100", "0.5", "200", "1.0", "0.25 0.5"), strict=True))


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="finds processes in /proc")
@pytest.mark.exhaustive
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_goes_on_behind_a_sweep_that_was_ended(end, tmp_path):
    command = [sys.executable, "-m", "experiments.retrieval", "capacity", "--sizes", "100", "--out", str(tmp_path)]
    root, log = pathlib.Path(__file__).parents[1], tmp_path / "log"
    with log.open("wb") as file:
        # A shell's "&" has the signal ignored, and what is ignored is inherited
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=root, stderr=file, start_new_session=True)
        signal.signal(signal.SIGINT, before)
    try:
        wait_until(lambda: b"step 100" in log.read_bytes(), 120)
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # a terminal sends it to all processes
        else:
            process.send_signal(end)
        process.wait(120)
        wait_until(lambda: not is_alive(process.pid), 60)
        if end != signal.SIGKILL:
            line = log.read_text().replace("\r", "\n").splitlines()[-1]
            assert process.returncode == 1 and "Traceback" not in log.read_text()
            assert line.startswith("stopped; 0 of 8 runs are finished and saved. The same command goes on")
    finally:
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_alive(group):
    """Whether a process of the group runs. One that ended and that nobody has waited for does not."""
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped_and_repeats_nothing(tmp_path):
    runs = [Run(Model("linear", "sum"), Task(4, False)), Run(Model("softmax", "softmax"), Task(4, False))]
    path = tmp_path / "capacity.csv"
    save(path, {runs[0].id: finished(runs[0])})
    rows = sweep(runs, path, workers=1, max_steps=100)
    assert rows[runs[0].id] == finished(runs[0])
    assert float(rows[runs[1].id]["last_loss"]) < 0.5
    assert load(path) == rows
    modified = path.stat().st_mtime_ns
    assert sweep(runs, path, workers=1, max_steps=100) == rows
    assert path.stat().st_mtime_ns == modified
    assert [file.name for file in tmp_path.iterdir()] == ["capacity.csv"]


def test_a_sweep_does_not_take_a_run_that_was_cut_off_for_finished(tmp_path):
    run, path = Run(Model("linear", "sum"), Task(4, False)), tmp_path / "capacity.csv"
    other = dataclasses.replace(run, seed=2)  # is not asked for, and stays
    save(path, {run.id: finished(run), other.id: finished(other)})
    rows = sweep([run], path, workers=1, max_steps=300)
    assert rows[run.id]["losses"] != "0.25 0.5"
    assert rows[other.id] == load(path)[other.id] == finished(other)


def test_what_is_kept_of_a_plateau_does_not_make_its_run_finished():
    """Ten evaluations that are each better by less than the printed digits would else be ten strikes."""
    losses = [0.5 - 1e-6 * i for i in range(20)]
    kept = retrieval.row(Run(Model("linear", "sum"), Task(4, False)), losses, 1.0)["losses"]
    assert not retrieval_model.is_finished([*map(float, kept.split())], max_steps=10_000)


@pytest.mark.slow
def test_a_failing_run_loses_no_other(tmp_path, monkeypatch):
    runs = [Run(Model("linear", "sum"), Task(size, False)) for size in (4, 5)]
    path = tmp_path / "capacity.csv"
    runs.append(dataclasses.replace(runs[0], seed="not a number"))
    with pytest.raises((TypeError, ValueError)):
        sweep(runs, path, workers=1, max_steps=100)
    assert set(load(path)) == {run.id for run in runs[:2]}


def test_two_sweeps_at_once_do_not_write_one_results_file(tmp_path):
    with filelock.FileLock(tmp_path / "quick.lock"), pytest.raises(ValueError, match=r"another sweep .* --out"):
        retrieval.main(Config(out=tmp_path))


def test_a_results_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "capacity.csv"
    path.write_text("model,loss\nlinear,0.1\n")
    with pytest.raises(ValueError, match=r"expected.*move it away"):
        load(path)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (
            lambda text: text[:-30],
            "line 3 of .*capacity.csv is not a whole run .it must have 11 fields.; delete that line",
        ),
        (lambda text: text[:-5], "line 3 of .* .200 steps have 2 losses, got 1"),
        (lambda text: text[:-2], "line 3 of .* .the last of its losses must be 0.5, got 0"),
        (lambda text: text.replace(",200,", ",many,", 1), "line 2 of .* .invalid literal for int.*'many'"),
        (lambda text: text.replace(",0,1,", ",2,1,", 1), "line 2 of .* .replace must be 0 or 1, got '2'"),
        (lambda text: text.replace("\n", ",1\n").replace("losses,1", "losses"), "line 2 of .* 11 fields"),
        (lambda text: text.replace("linear", "\xff"), ".*capacity.csv is not a results file: 'utf-8' codec"),
        (lambda text: "", ".*capacity.csv has the columns .., expected"),
    ],
)
def test_a_results_file_that_is_broken_names_its_line_before_any_run_begins(cut, words, tmp_path):
    run, path = Run(Model("linear", "sum"), Task(4, False)), tmp_path / "capacity.csv"
    other = dataclasses.replace(run, seed=2)
    save(path, {run.id: finished(run), other.id: finished(other)})
    assert len(load(path)) == 2
    broken = cut(path.read_text()).encode("latin-1")
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=words):
        sweep([Run(Model("softmax", "softmax"), Task(4, False))], path, workers=1)
    assert path.read_bytes() == broken


def test_the_experiments_have_the_papers_runs():
    assert len(Config("capacity").runs) == 240
    assert len(Config("update_rules").runs) == 80
    assert len({(run.model.name, run.model.rule) for name in retrieval.EXPERIMENTS for run in Config(name).runs}) == 15
    assert len(Config("capacity", seeds=3, sizes=(20, 40)).runs) == 8 * 2 * 3


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Model("elu", "sum"), "feature_map must be one of"),
        (lambda: Model("linear", "softmax"), 'goes with rule "softmax"'),
        (lambda: Model("dpfp", "sum"), "at least 1"),
        (lambda: Model("linear", "sum", 2), "0 for the others"),
        (lambda: Task(0, False), "at least 1, got 0"),
        (lambda: retrieval.main(Config(seeds=0)), "^--seeds must be at least 1, got 0$"),
        (lambda: retrieval.main(Config(sizes=(20, 0))), "^--sizes must be at least 1, got 0$"),
        (lambda: retrieval.main(Config(workers=0)), "^--workers must be at least 1, got 0$"),
        (lambda: retrieval.main(Config(max_steps=99)), "^--max-steps must be at least 100, got 99$"),
        (lambda: retrieval_model.train(Model("linear", "sum"), Task(4, False), max_steps=50), "at least 100"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
