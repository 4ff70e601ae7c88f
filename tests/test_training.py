"""Training: bit-exact resume after a kill, schedules, accumulation, broken checkpoints, what is refused."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.language import experiment as lm
from experiments.language import text
from experiments.run import checkpoints, devices, log, training
from experiments.run import folder as run_folder
from experiments.translation import experiment as translation
from experiments.translation import presets as translation_presets
from fwt_jax.models import DecoderLM, ModelConfig

pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = ModelConfig(vocab_size=64, num_layers=1, d_model=16, d_ff=32, num_heads=2, head_size=8, positions=None)
CONFIG = training.TrainConfig(
    steps=12, learning_rate=1e-2, schedule="constant", warmup=3, save_every=4, eval_every=6, log_every=5, seed=3
)


def make_model(config=TINY):
    return DecoderLM(config, rngs=nnx.Rngs(0))


def loss(model, batch, memory, rngs):
    if memory is not None:
        memory = jax.tree.map(lambda x: jnp.where(batch["start"], jnp.zeros_like(x), x), memory)
    losses, after = model.losses(batch["tokens"], batch["targets"], memory, rngs=rngs)
    return jnp.sum(losses), jnp.asarray(losses.size), None if memory is None else after


def batches():
    return text.Segments(np.random.default_rng(0).integers(0, 64, 8 * 61), 8, 16)  # four a epoch, the last of 12 tokens


def evaluate(model):
    tokens = jnp.arange(20)[None]
    return {"loss": float(jnp.mean(model.losses(tokens[:, :-1], tokens[:, 1:])[0]))}


def run(out, config=CONFIG, loss=loss, **options):
    options = {"memory": make_model().init_memory(8), "evaluate": evaluate} | options
    return training.train(make_model, loss, batches(), config, out, **options)


def losses_of(out):
    skip = ("seconds", "tokens_per_second")
    lines = log.read_metrics(out / "metrics.jsonl")
    return [{name: x for name, x in line.items() if name not in skip} for line in lines]


def saved_steps(out):
    """Of complete checkpoints."""
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    return out, nnx.state(run(out))


# --- interruption ----------------------------------------------------------------------------------------------------

PROGRAM = """
import os, pathlib, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests import test_training
from experiments.language import text
kind, at, out = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
batches = test_training.batches()
following = batches.__class__.__next__
def count(self):
    if self.step == at:
        os.kill(os.getpid(), getattr(signal, kind))
    return following(self)
text.Segments.__next__ = count
test_training.run(out)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at"), [("SIGKILL", 4), pytest.param("SIGTERM", 9, marks=pytest.mark.exhaustive)])
def test_a_run_that_was_killed_goes_on_bit_for_bit(kind, at, whole, tmp_path):
    command = [sys.executable, "-c", PROGRAM, kind, str(at), str(tmp_path)]
    ended = subprocess.run(command, cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True)
    assert ended.returncode != 0, ended.stderr
    steps = saved_steps(tmp_path)
    if kind == "SIGTERM":
        assert steps[-1] == 10 and "stopped after step 10, which is saved" in ended.stderr
    else:
        assert all(step <= at for step in steps)
    chex.assert_trees_all_equal(nnx.state(run(tmp_path)), whole[1])
    assert losses_of(tmp_path) == losses_of(whole[0])
    assert saved_steps(tmp_path) == saved_steps(whole[0])  # so that their mean is that of another run, too


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_a_signal_during_the_last_evaluation_stops_after_it(number, whole, tmp_path, capfd):
    evaluations = itertools.count(1)

    def interrupted(model):
        if next(evaluations) == 2:
            signal.raise_signal(number)
        return evaluate(model)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 12, which is saved; the same command goes on"):
        run(tmp_path, evaluate=interrupted)
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err.count("stopping after this step; a second Ctrl-C stops sooner") == 1
    assert saved_steps(tmp_path)[-1] == 12 and losses_of(tmp_path) == losses_of(whole[0])


def test_a_signal_during_an_evaluation_stops_before_the_next_step(tmp_path):
    def interrupted(model):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(model)

    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 6, which is saved"):
        run(tmp_path, evaluate=interrupted)
    assert saved_steps(tmp_path)[-1] == 6


def test_a_signal_before_the_first_step(whole, tmp_path):
    def train(out):
        calls = itertools.count(1)

        def interrupted():
            if next(calls) == 1:
                signal.raise_signal(signal.SIGTERM)
            return make_model()

        options = {"memory": make_model().init_memory(8), "evaluate": evaluate}
        training.train(interrupted, loss, batches(), CONFIG, out, **options)

    with pytest.raises(KeyboardInterrupt, match=r"^stopped before the first step; the same command goes on from there"):
        train(tmp_path / "new")
    shutil.copytree(whole[0], tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "12")
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 8, which is saved"):
        train(tmp_path / "old")


def test_the_checkpoint_of_an_interruption_stays_until_the_next(tmp_path):
    saves = {5, 10, 15}.__contains__
    with checkpoints.manager(tmp_path, 2, saves) as manager:
        for step, stay in ((5, [5]), (8, [5, 8]), (10, [5, 10]), (12, [5, 10, 12]), (15, [5, 10, 15])):
            loss = 1.0 if step == 5 else math.inf  # the best one stays, and must not be that of an interruption here
            checkpoints.save(manager, training.State(jnp.asarray(step), *[{"x": jnp.ones(1)}] * 3, None), {}, loss)
            checkpoints.finish(manager)
            assert saved_steps(tmp_path) == stay


def test_a_finished_run_is_not_repeated(whole):
    before = losses_of(whole[0])
    chex.assert_trees_all_equal(nnx.state(run(whole[0])), whole[1])
    assert losses_of(whole[0]) == before


@pytest.mark.exhaustive
def test_the_last_two_checkpoints_and_the_best_stay(tmp_path):
    measured = iter([3.0, 1.0, 2.0, 4.0])
    config = dataclasses.replace(CONFIG, steps=24)
    run(tmp_path, config, evaluate=lambda model: {"loss": next(measured)})
    assert saved_steps(tmp_path) == [12, 20, 24]
    assert training.load(tmp_path, make_model)[1] == 12
    assert training.load(tmp_path, make_model, best=False)[1] == 24


@pytest.mark.exhaustive
def test_a_loss_that_is_nan_is_as_one_that_was_not_measured(tmp_path):
    measured = iter([3.0, 1.0, 2.0, math.nan, 2.5, 2.2])
    config = dataclasses.replace(CONFIG, steps=24, eval_every=4, save_every=4)
    run(tmp_path, config, evaluate=lambda model: {"loss": next(measured)})
    assert saved_steps(tmp_path) == [8, 20, 24]
    assert training.load(tmp_path, make_model)[1] == 8


def test_a_bucket_is_no_folder():
    with pytest.raises(ValueError, match="must be on a file system, got gs:/bucket/run; mount the bucket"):
        run(pathlib.Path("gs://bucket/run"))


def test_a_folder_that_other_processes_do_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices, "wait_for_all", lambda name: None)
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(run_folder.time, "monotonic", itertools.count(0, 30).__next__)
    with pytest.raises(ValueError, match=r"process 0 does not see .*run.json, which the first one wrote"):
        run_folder.check_that_all_see(tmp_path / "run.json")
    (tmp_path / "run.json").touch()
    run_folder.check_that_all_see(tmp_path / "run.json")


@pytest.mark.exhaustive
def test_load_gives_the_last_model_where_nothing_was_evaluated(tmp_path):
    model = run(tmp_path, dataclasses.replace(CONFIG, steps=5), evaluate=None)
    loaded, step = training.load(tmp_path, make_model)
    assert step == 5
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))
    with pytest.raises(ValueError, match="nowhere has no checkpoints; train first"):
        training.load(tmp_path / "nowhere", make_model)


@pytest.mark.slow
def test_the_mean_of_the_last_checkpoints(tmp_path):
    run(tmp_path, dataclasses.replace(CONFIG, keep=3, eval_every=12), evaluate=None)
    assert saved_steps(tmp_path) == [4, 8, 12]
    mean, step = training.load(tmp_path, make_model, average=[8, 12])
    last, _ = training.load(tmp_path, make_model, best=False)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    before, _ = training.load(tmp_path, make_model, best=False)
    assert step == 12
    halves = (jax.tree.map(lambda x: x / 2, nnx.state(model, nnx.Param)) for model in (last, before))
    chex.assert_trees_all_close(nnx.state(mean, nnx.Param), jax.tree.map(jnp.add, *halves), rtol=1e-6)


DAMAGES = ("truncate model", "delete model", "truncate rest", "delete rest", "truncate host", "delete host")


def harm(checkpoint, damage):
    how, part = damage.split()
    for path in [path for path in (checkpoint / part).rglob("*") if path.is_file() and path.stat().st_size > 0]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if how == "truncate" else path.unlink()


def restored(out):
    state = jax.eval_shape(functools.partial(training.initial_state, make_model, CONFIG, make_model().init_memory(8)))
    with checkpoints.manager(out, CONFIG.keep, CONFIG.saves) as manager:
        return checkpoints.restore(manager, training.State(**devices.abstract(state._asdict(), None)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_moved_aside_for_the_one_before(damage, whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    harm(tmp_path / "checkpoints" / "12", damage)
    state, host = restored(tmp_path)
    assert int(state.step) == host["batches"]["step"] == 8
    assert "checkpoint 12 of" in (printed := capsys.readouterr().out) and "cannot be read; it is now" in printed
    assert list(tmp_path.glob("broken-checkpoint-12-*")) and 12 not in saved_steps(tmp_path)


def numbers_of(restored):
    state, host = restored
    return jax.tree.leaves(state), {name: x for name, x in host.items() if name != "seconds"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("turn", range(8))
def test_no_damage_to_any_file_of_a_checkpoint_goes_unnoticed(turn, whole, tmp_path, capsys):
    """Emptied, deleted, zeroed, or with one bit turned over in one of five places: each file in its turn."""
    states = {}
    for step in (12, 8):
        out = tmp_path / f"whole-{step}"
        shutil.copytree(whole[0], out)
        if step == 8:
            shutil.rmtree(out / "checkpoints" / "12")
        states[step] = numbers_of(restored(out))
    files = sorted(path for path in (whole[0] / "checkpoints" / "12").rglob("*") if path.is_file())
    assert len(files) > 20
    for i, file in enumerate(files):
        out = tmp_path / str(i)
        shutil.copytree(whole[0], out)
        path, how, data = out / file.relative_to(whole[0]), (i + turn) % 8, bytearray(file.read_bytes())
        if how == 0:
            data = b""
        elif how == 1:
            data = bytes(len(data))
        elif how > 2:
            data[(how - 3) * (len(data) - 1) // 4] ^= 1 << how
        path.unlink() if how == 2 else path.write_bytes(data)
        got = numbers_of(restored(out))
        fell_back = f"checkpoint 12 of {out}" in capsys.readouterr().out
        chex.assert_trees_all_equal(got, states[8 if fell_back else 12])
        assert fell_back or path.relative_to(out).parts[2] not in ("model", "rest", "host")
        training.load(out, make_model)


def test_checkpoints_of_older_versions_have_no_digests(whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("checkpoints/*/digests.json"):
        path.unlink()
    assert int(restored(tmp_path)[0].step) == 12

    def read(step):
        if step == 12:
            raise Exception("as tensorstore has it")
        return step

    with checkpoints.reader(tmp_path) as manager:
        assert checkpoints.read_first(manager, [12, 8], read, 1) == {8: 8}
    assert "checkpoint 12 (Exception: as tensorstore has it) of" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_damaged_checkpoint_of_an_older_version_is_told_in_one_line(whole, tmp_path):
    """In a process of its own: orbax, which fails, leaves coroutines behind that complain when they are deleted."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("checkpoints/*/digests.json"):
        path.unlink()
    largest = max((tmp_path / "checkpoints/12/rest/ocdbt.process_0/d").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"")
    command = [sys.executable, "-c", FULL, str(tmp_path), str(10**9)]
    ended = subprocess.run(command, cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert "checkpoint 12 of" in ended.stdout and saved_steps(tmp_path)[-1] == 12
    assert losses_of(tmp_path) == losses_of(whole[0])


FULL = """
import pathlib, resource, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from experiments.run import command_line
from tests import test_training
longest = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))  # no file may be longer, as if the disk were full
with command_line.one_line():
    test_training.run(pathlib.Path(sys.argv[1]))
"""


@pytest.mark.exhaustive
def test_a_disk_that_takes_no_more_is_told_in_one_line_and_nothing_is_lost(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    command = [sys.executable, "-c", FULL, str(tmp_path), "12000"]
    # Of the cache of programs, JAX would warn that it cannot be written.
    no_cache = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    root = pathlib.Path(__file__).parent.parent
    ended = subprocess.run(command, cwd=root, env=no_cache, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    *progress, line = [line for line in re.split(r"[\r\n]+", ended.stderr) if line.strip()]
    words = (
        rf"error: a checkpoint cannot be written to {tmp_path}/checkpoints: .*make space, and the same command goes on"
    )
    assert re.match(words, line), line
    assert all("/12 [" in line for line in progress), ended.stderr
    chex.assert_trees_all_equal(nnx.state(run(tmp_path)), whole[1])
    assert losses_of(tmp_path) == losses_of(whole[0])


@pytest.mark.exhaustive
def test_a_run_goes_on_from_before_a_broken_checkpoint(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    harm(tmp_path / "checkpoints" / "12", "truncate model")
    chex.assert_trees_all_equal(nnx.state(run(tmp_path)), whole[1])
    assert losses_of(tmp_path) == losses_of(whole[0])


@pytest.mark.parametrize("damage", ["truncate metrics", "delete metrics"])
def test_a_checkpoint_whose_loss_is_broken_is_as_good_as_any(damage, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    harm(tmp_path / "checkpoints" / "12", damage)
    chex.assert_trees_all_equal(nnx.state(training.load(tmp_path, make_model, best=False)[0]), whole[1])
    assert training.load(tmp_path, make_model)[1] in saved_steps(tmp_path)
    chex.assert_trees_all_equal(nnx.state(run(tmp_path)), whole[1])


def test_load_takes_the_next_best_for_a_broken_one_and_names_it(whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    best = training.load(tmp_path, make_model)[1]
    others = [step for step in saved_steps(tmp_path) if step != best]
    harm(tmp_path / "checkpoints" / str(best), "truncate model")
    assert training.load(tmp_path, make_model)[1] in others
    assert training.load(tmp_path, make_model, average=others)[1] == max(others)
    asked = [*others, best, 99]
    with pytest.raises(ValueError, match=rf"{re.escape(str(asked))}, which are .* has {re.escape(str(others))};"):
        training.load(tmp_path, make_model, average=asked)
    with pytest.raises(ValueError, match=r"\[99\], which are to be averaged, .* has \[\];"):
        training.load(tmp_path, make_model, average=[99])
    assert capsys.readouterr().out.count(f"checkpoint {best} (") == 2
    for step in others:
        harm(tmp_path / "checkpoints" / str(step), "delete model")
    with pytest.raises(ValueError, match=rf"no checkpoint of .* can be read: {best} \(.*Put back a copy"):
        training.load(tmp_path, make_model)
    assert saved_steps(tmp_path) == sorted([best, *others])


def test_load_leaves_alone_what_a_run_is_writing(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    under_way = tmp_path / "checkpoints" / "16.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "12", under_way)
    (under_way / "metrics" / "metrics").write_text("")
    training.load(tmp_path, make_model)
    assert (under_way / "metrics" / "metrics").read_text() == ""


def test_a_run_whose_checkpoints_are_all_broken_is_not_begun_anew(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = saved_steps(tmp_path)
    for step in before:
        harm(tmp_path / "checkpoints" / str(step), "truncate model")
    words = rf"no checkpoint of .* can be read: 12 \(.*; {before[0]} \(.*delete the folder"
    with pytest.raises(ValueError, match=words):
        restored(tmp_path)
    assert saved_steps(tmp_path) == before and not list(tmp_path.glob("broken-*"))


def test_a_metrics_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert log.read_metrics(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', "line 2 of .*metrics.jsonl is not a line of metrics"),
        (b'{"step": 1}\n\xff\xfe\n', "line 2 of .*UnicodeDecodeError.*; mend or delete that line"),
        (b"[1]\n", "line 1 of .*"),
        (b'{"step": "x"}\n', "line 1 of .*must be an object of numbers, with a step"),
        (b'{"loss": 1}\n', "line 1 of .*KeyError: 'step'"),
        (b'{"step": 1, "loss": null}\n', "line 1 of .*"),
    ],
)
def test_metrics_that_are_broken_name_their_file_and_line(content, words, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        log.read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"a": "\xff"}', b"null", b"12"])
def test_settings_that_cannot_be_read_name_their_file(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"run.json (is not whole JSON: |must hold a JSON object, got ).*put back a copy"
    ):
        run(tmp_path)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(tmp_path):
    def explodes(model, batch, memory, rngs):
        total, count, memory = loss(model, batch, memory, rngs)
        return jnp.where(jnp.any(batch["tokens"] == 64), jnp.nan, 1.0) * total, count, memory

    tokens = np.random.default_rng(0).integers(0, 64, 8 * 200)
    tokens[6 * 16 + 3] = 64  # in step 7
    with pytest.raises(FloatingPointError, match=r"loss is nan in step 7; the last checkpoint in .* is from before it"):
        training.train(make_model, explodes, text.Segments(tokens, 8, 16), CONFIG, tmp_path)
    assert training.load(tmp_path, make_model)[1] == 6


# --- what a step does ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accumulated_parts_make_the_same_step():
    states = []
    for accumulate in (1, 4):
        config = dataclasses.replace(CONFIG, accumulate=accumulate, eps=1e-3)
        model = dataclasses.replace(TINY, dropout=0.0)
        make = functools.partial(make_model, model)
        state = training.initial_state(make, config, make().init_memory(8))
        step, data = jax.jit(training.make_step(training.graph_of(make), loss, config)), batches()
        for _ in range(2):
            state, metrics = step(state, devices.place(next(data), None))
        states.append((state, metrics))
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_carried_memory_is_that_of_the_text_read_so_far():
    """Three segments one after another leave the memory of their concatenation, with a learning rate of 0."""
    config = dataclasses.replace(CONFIG, learning_rate=0.0)

    def make():
        return DecoderLM(dataclasses.replace(TINY, dropout=0.0), rngs=nnx.Rngs(0))

    state = training.initial_state(make, config, make().init_memory(8))
    step, data = jax.jit(training.make_step(training.graph_of(make), loss, config)), batches()
    read = [next(data) for _ in range(3)]
    for batch in read:
        state, _ = step(state, devices.place(batch, None))
    memory_after = nnx.jit(lambda model, tokens: model(tokens)[1])
    want = memory_after(make(), jnp.concatenate([batch["tokens"] for batch in read], axis=1))
    chex.assert_trees_all_close(state.memory, want, rtol=1e-4, atol=1e-5)
    next(data)
    state, _ = step(state, devices.place(next(data), None))  # the first of the next epoch
    want = memory_after(make(), jnp.asarray(read[0]["tokens"]))
    chex.assert_trees_all_close(state.memory, want, rtol=1e-4, atol=1e-5)


def test_the_authors_schedule():
    rate = training.learning_rate(training.TrainConfig(steps=1000, learning_rate=2.0, warmup=100))
    got = [float(rate(t)) for t in (0, 1, 50, 99, 100, 500, 1000)]
    want = [2.0, 0.02, 1.0, 1.98, *(1 + np.cos(np.pi * np.array([0.1, 0.5, 1.0])))]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("cosine", [0.1, 0.2, 1, (1 + np.cos(np.pi / 31)) / 2, (1 - np.cos(np.pi / 31)) / 2]),
        ("inverse_sqrt", [0.1, 0.2, 1, (10 / 11) ** 0.5, 0.5]),
        ("constant", [0.1, 0.2, 1, 1, 1]),
    ],
)
def test_other_schedules_waste_no_update(schedule, want):
    config = training.TrainConfig(steps=40, learning_rate=1.0, warmup=10, schedule=schedule)
    rate = training.learning_rate(config)
    np.testing.assert_allclose([float(rate(t)) for t in (0, 1, 9, 10, 39)], want, atol=1e-6)
    for warmup in (0, 1, 2, 60):
        rate = training.learning_rate(dataclasses.replace(config, warmup=warmup))
        np.testing.assert_allclose(float(rate(0)), 1 / max(warmup, 1), rtol=1e-6)
        assert all(float(rate(t)) > 0 for t in range(40))


def test_weight_decay_is_of_matrices_alone():
    decayed, plain = (
        training.optimizer(dataclasses.replace(CONFIG, weight_decay=x, clip=0.0, warmup=0)) for x in (0.5, 0.0)
    )
    state = training.initial_state(make_model, CONFIG)
    params = jax.tree.map(jnp.ones_like, state.params)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates = [t.update(gradients, t.init(params), params)[0] for t in (decayed, plain)]
    changed = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (path[-1].key in ("kernel", "embedding")) == bool(jnp.any(a != b)), *updates
    )
    assert all(jax.tree.leaves(changed))


def test_the_gradient_is_clipped():
    config = dataclasses.replace(CONFIG, clip=1e-3)
    gradients = {"kernel": jnp.full(4, 7.0)}
    clipped = training.optimizer(config)
    small, _ = clipped.update(gradients, clipped.init(gradients), gradients)
    plain = training.optimizer(dataclasses.replace(config, clip=0.0))
    same, _ = plain.update({"kernel": jnp.full(4, 5e-4)}, plain.init(gradients), gradients)
    chex.assert_trees_all_close(small, same, rtol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_another_run_in_the_folder_is_refused_with_every_difference(whole):
    out, _ = whole
    with pytest.raises(ValueError, match=r"holds another run: clip was 0.25 and is 1.0; seed was 3 and is 4. Name"):
        run(out, dataclasses.replace(CONFIG, clip=1.0, seed=4))
    with pytest.raises(ValueError, match=r"holds another run: --size was None and is 9. Name another folder"):
        run(out, identity={"vocabulary": {"size": 9}}, words={"vocabulary.size": "--size"})
    with pytest.raises(ValueError, match=r"holds another run: --rate was 0.01 and is 0.02. Name another folder"):
        run(out, dataclasses.replace(CONFIG, learning_rate=0.02), words={"training.learning_rate": "--rate"})


@pytest.mark.exhaustive
def test_what_changes_no_number_may_change_when_a_run_goes_on(whole, tmp_path):
    """The first half logs, evaluates and saves at other steps; then it goes on to more of them."""
    half = dataclasses.replace(CONFIG, steps=7, save_every=3, eval_every=5, keep=1)
    run(tmp_path, half)
    chex.assert_trees_all_equal(nnx.state(run(tmp_path)), whole[1])
    assert losses_of(tmp_path)[-3:] == losses_of(whole[0])[-3:]
    for options in ({"log_every": 1}, {"save_every": 5}, {"eval_every": 7}, {"keep": 9}):
        chex.assert_trees_all_equal(nnx.state(run(tmp_path, dataclasses.replace(CONFIG, **options))), whole[1])
    with pytest.raises(ValueError, match=r"has made 12 steps already, more than the 11 asked for; ask for at least as"):
        run(tmp_path, dataclasses.replace(CONFIG, steps=11))


@pytest.mark.slow
def test_more_steps_are_another_run_where_the_schedule_depends_on_them(tmp_path):
    config = dataclasses.replace(CONFIG, steps=2, schedule="cosine")
    run(tmp_path, config)
    words = r"steps \(on which the schedule 'cosine' depends\) was 2 and is 3. Name another folder"
    with pytest.raises(ValueError, match=words):
        run(tmp_path, dataclasses.replace(config, steps=3))


def test_settings_that_differ_from_themselves_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the settings of a run must be finite numbers: model.eps is nan$"):
        run(tmp_path, identity={"model": {"eps": math.nan, "d_model": 8}})
    assert not (tmp_path / "run.json").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    import filelock

    with filelock.FileLock(tmp_path / "lock"), pytest.raises(ValueError, match="another run trains in"):
        run(tmp_path)


FLOATS = [field.name for field in dataclasses.fields(CONFIG) if isinstance(field.default, float)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number that is not negative, got -1.0"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number that is not negative, got inf"),
        *(({name: math.nan}, f"{name} must be .*, got nan") for name in FLOATS),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
        ({"schedule": "linear"}, "schedule must be one of authors, cosine, inverse_sqrt, constant, got 'linear'"),
    ],
)
def test_settings_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **options)


def test_parts_that_do_not_divide_the_batch(tmp_path):
    with pytest.raises(ValueError, match="accumulate must divide the batch of 8 rows, got 3"):
        run(tmp_path, dataclasses.replace(CONFIG, accumulate=3))


# --- several processes -----------------------------------------------------------------------------------------------

LONGER = dataclasses.replace(CONFIG, steps=40, save_every=30)
PROCESS = """
import os, pathlib, signal, sys, time
number, port, end, out = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4])
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
from fwt_jax import sharding
from tests import test_training as t
following = t.text.Segments.__next__
def count(self):
    if self.step == end and number == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # one machine of a pod is told to go
    if self.step >= end > 0:
        time.sleep(0.5)  # as long as a step of a real model, for the word goes round in the background
    return following(self)
t.text.Segments.__next__ = count
assert t.devices.of_first_process(b"seven\\0\\0" if number == 0 else b"") == b"seven\\0\\0"
t.run(out, t.LONGER, mesh=sharding.make_mesh(fsdp=4), evaluate=None)
t.whole_experiment(out.parent, "lm two", sequence=8)
t.whole_translation(out.parent, "translation two")
"""


def whole_experiment(folder, name, **axes):
    """A memory that is carried, evaluation, a sample and results, by the command's own function."""
    short = dataclasses.replace(CONFIG, steps=4, eval_every=2, accumulate=2)
    preset = lm.Preset(TINY, short, 16, 16, "demo", "character", "carried", carry=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lm.PRESETS, "tiny", preset)
        return lm.run(lm.Config("tiny", (folder / "book.txt",), out=folder / name, sample=5, **axes))


def whole_translation(folder, name):
    """Subwords, batches, beam search and scores, by the command's own function."""
    demo = translation_presets.SIZES["demo"]
    model = dataclasses.replace(demo.model, encoder_layers=1, decoder_layers=1, d_model=32, d_ff=32, num_heads=2)
    files = (folder / "numbers.en", folder / "numbers.de")
    with pytest.MonkeyPatch.context() as patch:
        fast = dataclasses.replace(demo.training, warmup=10, learning_rate=1e-2)
        patch.setitem(translation_presets.SIZES, "demo", dataclasses.replace(demo, model=model, training=fast))
        config = translation.Config("demo", files, out=folder / name, steps=60, tokens=256, vocabulary=300, fsdp=2)
        return translation.run(config)


@pytest.mark.exhaustive
def test_two_processes_train_checkpoint_and_go_on_together(tmp_path):
    """Four devices each. SIGTERM to one stops both, after a checkpoint, from which they go on to the end."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def both(end):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(number), str(port), str(end), str(tmp_path / "two")],
                cwd=pathlib.Path(__file__).parent.parent,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        return [(process.communicate()[1], process.returncode) for process in processes]

    words = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
    rows = [" ".join(row) for row in np.random.default_rng(0).choice(list(words), (400, 4))]
    (tmp_path / "numbers.en").write_text("".join(f"{row}\n" for row in rows))
    german = [" ".join(words[word] for word in row.split()) for row in rows]
    (tmp_path / "numbers.de").write_text("".join(f"{row}\n" for row in german), encoding="utf-8")
    (tmp_path / "book.txt").write_text("".join(f"the {i} cats sat on mat {i * 7 % 10}\n" for i in range(300)))
    stopped = both(3)
    (step,) = saved_steps(tmp_path / "two")
    assert 3 <= step < LONGER.save_every
    assert all(code and f"stopped after step {step}, which is saved" in printed for printed, code in stopped), stopped
    ended = both(-1)
    assert not any(code for _, code in ended), ended
    model = run(tmp_path / "one", LONGER, evaluate=None)
    loaded, step = training.load(tmp_path / "two", make_model)
    assert step == LONGER.steps
    chex.assert_trees_all_close(nnx.state(loaded), nnx.state(model), rtol=1e-3, atol=1e-4)
    got = json.loads((tmp_path / "lm two" / "results.json").read_text())
    want = whole_experiment(tmp_path, "lm one", fsdp=2)
    np.testing.assert_allclose(got["test"]["nats"], want["test"]["nats"], rtol=1e-4)
    assert got["step"] == want["step"] and (tmp_path / "lm two" / "samples.txt").exists()
    want = whole_translation(tmp_path, "translation one")
    got = json.loads((tmp_path / "translation two" / "results.json").read_text())
    assert {**got["test"], "sentences_per_second": 0} == {**want["test"], "sentences_per_second": 0}
    one, two = (log.read_metrics(tmp_path / f"translation {x}" / "metrics.jsonl")[-1] for x in ("one", "two"))
    np.testing.assert_allclose(two["validation_loss"], one["validation_loss"], rtol=1e-4)
    one, two = ((tmp_path / f"translation {x}" / "translations.test.txt").read_text() for x in ("one", "two"))
    assert one == two and len(set(one.splitlines())) > 5


def test_one_device_has_no_mesh_and_is_not_split(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "devices", lambda: [None])
    assert devices.make_mesh(1, 1) is None
    with pytest.raises(ValueError, match="must be the number of devices, 1, got 1 · 2 · 1"):
        devices.make_mesh(2, 1)


def test_a_perplexity_is_a_number():
    assert training.perplexity(2.0) == pytest.approx(7.389056)
    assert 1e300 < training.perplexity(1e6) < math.inf
