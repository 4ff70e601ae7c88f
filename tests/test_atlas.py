"""The atlas: its tasks, what theory says of them, its networks, and its frame."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.atlas import experiment, groups, languages, model, plot, recall, regression
from experiments.atlas.model import IGNORED, Model, Recipe
from experiments.atlas.task import Point, Run
from experiments.run.sweep import sweep
from fwt_jax import fast_weight_attention
from fwt_jax.memory import Memory, delta_step

# --- theory, by construction -----------------------------------------------------------------------------------------


def read_signs(ones, beta):
    """Reads of a memory that holds a 1 under one key, after each symbol; a one writes 0 under that key."""
    length = len(ones)
    keys = np.ones((1, length, 1, 1), np.float32)
    betas = np.where(ones, beta, 0.0).astype(np.float32)[None, :, None]
    start = Memory(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1)))
    return np.asarray(fast_weight_attention(keys, keys, 0 * keys, betas, memory=start)[0])[0, :, 0, 0]


def test_beta_2_is_parity_at_any_length_and_beta_below_1_never_turns_a_sign():
    ones = np.random.default_rng(0).random(250) < 0.5
    np.testing.assert_array_equal(read_signs(ones, 2.0), 1 - 2 * (np.cumsum(ones) % 2))
    for beta in (0.1, 0.5, 0.9, 1.0):
        assert np.all(read_signs(ones, beta) > -1e-6)  # 0 but for rounding


def transpositions(permutation):
    """Pairs (i, j) whose transpositions, one after another, make the permutation: n − c of them, for c cycles."""
    pairs, now = [], list(range(len(permutation)))
    for i, target in enumerate(permutation):
        if now[i] != target:
            j = now.index(target)
            now[i], now[j] = now[j], now[i]
            pairs.append((i, j))
    return pairs


def write_permutations(permutations, writes):
    """The memory after each token, from W = 1, if each permutation is written as reflections."""
    things, length = len(permutations[0]), len(permutations)
    keys, betas = np.zeros((length, writes, things)), np.zeros((length, writes))
    for t, permutation in enumerate(permutations):
        for n, (i, j) in enumerate(transpositions(permutation)):
            keys[t, n, [i, j]], betas[t, n] = np.array([1, -1]) / np.sqrt(2), 2
    keys = jnp.asarray(keys.reshape(1, length * writes, 1, things), jnp.float32)
    betas = jnp.asarray(betas.reshape(1, -1, 1), jnp.float32)
    start = Memory(jnp.eye(things)[None, None], jnp.zeros((1, 1, things)))
    _, memories = fast_weight_attention(keys, keys, 0 * keys, betas, memory=start, memory_every=writes)
    return np.asarray(memories.fast_weights)[0, :, 0]


def test_four_writes_for_each_token_multiply_s5_at_length_250():
    rng = np.random.default_rng(0)
    words = [tuple(int(i) for i in rng.permutation(5)) for _ in range(250)]
    product, expected = np.eye(5), []
    for word in words:
        product = product[list(word)]
        expected.append(product)
    np.testing.assert_allclose(write_permutations(words, 4), expected, atol=1e-3)


def test_a_permutation_takes_as_many_writes_as_the_rank_by_which_it_changes_the_memory():
    most = {}
    for name, group in groups.GROUPS.items():
        elements, one = group.elements(), np.eye(group.things)
        ranks = [np.linalg.matrix_rank(one[list(p)] - one) for p in elements]
        assert ranks == [len(transpositions(p)) for p in elements]
        most[name] = max(ranks)
    assert most == {"S3": 2, "A4": 2, "S5": 4}
    key, memory = np.random.default_rng(0).standard_normal((2, 5, 5)).astype(np.float32)
    after = delta_step(memory, key[0], key[1], jnp.float32(2.0), None)
    assert np.linalg.matrix_rank(np.asarray(after) - memory, tol=1e-4) == 1  # so one write follows no 3-cycle


def test_one_write_for_each_token_tells_at_most_two_powers_of_a_5_cycle_apart():
    """In one layer a token that comes again writes the same key, value and β, and asks the same query."""
    rng, length = np.random.default_rng(0), 300
    betas = np.array([0.1, 0.5, 1.0, 1.5, 1.9, 2.0], np.float32)
    query, key, value = rng.standard_normal((3, 1, 1, len(betas), 5)).astype(np.float32)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    query, key, value = (np.repeat(x, length, axis=1) for x in (query, key, value))
    start = Memory(jnp.asarray(rng.standard_normal((1, len(betas), 5, 5)), jnp.float32), jnp.zeros((1, len(betas), 5)))
    reads = fast_weight_attention(query, key, value, np.broadcast_to(betas, (1, length, len(betas))), memory=start)[0]
    np.testing.assert_allclose(reads[:, 298:], reads[:, 296:298], atol=1e-3)  # two in turns, whatever is read from them
    powers = write_permutations([(1, 2, 3, 4, 0)] * length, 4)[-5:]
    assert len(np.unique(np.round(powers), axis=0)) == 5


# --- data ------------------------------------------------------------------------------------------------------------


def state_of(language, symbols):
    """The state after a word, by a loop over it."""
    depths = [0, 0]
    if language in ("parity", "modulo 3"):
        return sum(symbols) % (2 if language == "parity" else 3)
    if language == "(aa)*":
        return len(symbols) % 2
    for symbol in symbols:
        if language == "reset Dyck-1" and symbol == 2:
            depths[0] = 0
        else:
            depths[symbol // 2] += 1 - 2 * (symbol % 2)
            assert depths[symbol // 2] >= 0  # no bracket closes that is not open
    return (depths[0] > 0) + 2 * (depths[1] > 0)


@pytest.mark.parametrize("language", languages.LANGUAGES)
def test_labels_of_a_language_are_states_of_its_automaton(language):
    tokens, labels = map(np.asarray, languages.sample(language, 4, 30)(jax.random.key(0)))
    assert tokens.shape == labels.shape == (4, 31)
    assert np.all(tokens[:, 0] == languages.START) and np.all(labels[:, 0] == IGNORED)
    for word, states in zip(tokens[:, 1:].tolist(), labels[:, 1:].tolist(), strict=True):
        assert states == [state_of(language, word[: t + 1]) for t in range(30)]
    assert len(np.unique(labels[:, 1:])) == {"modulo 3": 3, "shuffle-2": 4}.get(language, 2)


@pytest.mark.parametrize("group", groups.GROUPS)
def test_labels_of_a_group_are_products(group):
    tokens, labels = map(np.asarray, groups.sample(group, 3, 20)(jax.random.key(0)))
    everything = groups.GROUPS[group].elements()
    read = groups.GROUPS[group].read or everything
    for word, products in zip(tokens[:, 1:], labels[:, 1:], strict=True):
        product = everything[0]
        for token, label in zip(word, products, strict=True):
            product = tuple(read[token][i] for i in product)
            assert everything[label] == product


def test_a_query_asks_for_the_value_behind_its_key():
    tokens, labels = map(np.asarray, recall.sample((4, 8), 6, 40)(jax.random.key(0)))
    numbers = set()
    for sequence, answers in zip(tokens, labels, strict=True):
        pairs = int(np.argmax(answers != IGNORED)) // 2
        numbers.add(pairs)
        values = dict(zip(sequence[: 2 * pairs : 2].tolist(), sequence[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(values) == pairs and max(values) < recall.KEYS <= min(values.values())
        assert [values[key] - recall.KEYS for key in sequence[2 * pairs :].tolist()] == answers[2 * pairs :].tolist()
    assert numbers == {4, 8}


def test_all_tests_of_recall_have_one_length_and_ask_as_much():
    for tokens, labels in recall.tests():
        assert tokens.shape == labels.shape == (recall.TEST_BATCH, 2 * max(recall.TEST_PAIRS) + recall.QUERIES)
        assert np.all(np.sum(labels != IGNORED, axis=1) == recall.QUERIES)


def test_scores_are_scaled_by_the_most_frequent_answer():
    labels = np.array([[0, 0, 0, 1, 1, 1, 0, 0]])
    predicted = np.array([labels, 0 * labels, 1 - labels])
    points = languages.windows(predicted, labels, 4)
    assert [(p.seed, p.x) for p in points] == list(itertools.product(range(3), (4,))) + [(s, 8) for s in range(3)]
    assert [p.score for p in points] == [1, 0, -3, 1, 0, -1]
    assert languages.solved(points) == 0 and languages.solved(points[-3:-1]) == 0.5


# --- networks and training -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_writes_n_times_and_reads_once():
    net = Model(writes=2, max_beta=2.0, num_heads=1, head_size=4, d_model=6)
    layer = model.FastWeights(net, model.nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 6))
    memory, expected = jnp.zeros((4, 4)), []
    for t in range(5):
        key, value = layer.key(x)[0, t, :, 0], layer.value(x)[0, t, :, 0]
        beta, query = 2 * jax.nn.sigmoid(layer.beta(x))[0, t, :, 0], layer.query(x)[0, t, 0]
        unit = [z / jnp.linalg.norm(z) for z in jax.nn.silu(jnp.stack([*key, query]))]
        for i in range(2):
            memory = delta_step(memory, unit[i], value[i], beta[i], None)
        expected.append(memory.T @ unit[2])
    expected = layer.out(layer.norm(jnp.stack(expected)[None, :, None]))
    np.testing.assert_allclose(layer(x), expected, atol=1e-3)  # l2_normalize has an eps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "delta β<2, 2 writes"])
def test_a_network_does_not_see_later_tokens(name):
    net = dataclasses.replace(languages.MODELS[name], conv_size=4, num_layers=2, head_size=16)  # in chunks
    parameters = model.nnx.state(model.Network(net, model.nnx.Rngs(0)), model.nnx.Param)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 5)
    logits = model.apply(net, parameters, tokens)
    np.testing.assert_allclose(model.apply(net, parameters, tokens[:, :5]), logits[:, :5], atol=1e-5)
    other = model.apply(net, parameters, tokens.at[:, 5].set((tokens[:, 5] + 1) % 5))
    assert np.all(np.abs(other - logits)[:, 5].max(-1) > 1e-4)


@pytest.mark.slow
def test_training_stops_early_and_its_seeds_differ():
    net = Model(rule="sum", vocabulary=3, classes=2, num_heads=1, head_size=4, d_model=8, hidden=0)

    def sample(key):
        tokens = jax.random.randint(key, (4, 6), 0, 2)
        return tokens, tokens

    done = []
    recipe = Recipe(rate=3e-2, steps=1000, end=50, enough=0.3)
    parameters, losses = model.train(net, sample, recipe, 2, done.append)
    assert done == sorted(done) and done[-1] == 1.0 and len(losses) == len(done) < 10
    assert losses.shape[1] == 2 and np.all(losses[-1] < 0.1) and losses[0, 0] != losses[0, 1]
    tokens = jnp.array([[0, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(model.predict(net, parameters, tokens, 1), [tokens, tokens])


@pytest.mark.slow
def test_a_model_is_compiled_once_for_all_its_languages():
    net = Model(vocabulary=5, classes=4, num_heads=1, head_size=4, d_model=8, hidden=0)
    for language in ("parity", "modulo 3"):
        parameters, _ = model.train(net, languages.sample(language, 2, 6), Recipe(steps=50, end=50), 1)
        model.predict(net, parameters, jnp.zeros((4, 9), int), 2)
    assert [program._cache_size() for program in model._programs(net)] == [1, 1]


def test_easier_batches_come_first():
    net = Model(rule="sum", vocabulary=2, classes=2, num_heads=1, head_size=4, d_model=8, hidden=0)

    def sample(key):
        tokens = jax.random.randint(key, (4, 6), 0, 2)
        return tokens, tokens

    def easier(key):
        return jnp.zeros((4, 6), int), jnp.ones((4, 6), int)

    recipe = Recipe(rate=3e-2, steps=150, end=50, enough=0.1, easy=100)
    _, losses = model.train(net, sample, recipe, 2, easier=easier)
    assert np.all(losses[1] < 0.05) and np.all(losses[2] > 0.1) and np.all(losses[-1] < losses[2])


def test_a_recipe_has_whole_calls_and_easier_sequences_for_its_easy_steps():
    for recipe in (Recipe(steps=100, end=10), Recipe(steps=110), Recipe(easy=30)):
        with pytest.raises(ValueError, match="must be multiples of 50, got"):
            model.train(Model(), languages.sample("parity", 2, 4), recipe, 1)
    with pytest.raises(ValueError, match="easy steps and easier sequences go together, got 50 steps and easier=None"):
        model.train(Model(), languages.sample("parity", 2, 4), Recipe(easy=50), 1)


def test_a_network_learns_parity_beyond_its_lengths_with_beta_to_2_and_not_with_beta_to_1():
    tokens, labels = languages.sample("parity", 64, 60)(jax.random.key(2**31))
    scores = {}
    for beta in (1.0, 2.0):
        net = Model(max_beta=beta, num_heads=2, head_size=8, d_model=16, hidden=0, vocabulary=5)
        parameters, _ = model.train(net, languages.sample("parity", 32, 12), Recipe(rate=2e-2, steps=100, end=50), 5)
        predicted = model.predict(net, parameters, tokens)[:, :, 1:]
        points = languages.windows(predicted, np.asarray(labels)[:, 1:], 12)
        scores[beta] = [point.score for point in points if point.x == 60]
    assert np.median(scores[2.0]) > 0.99 and max(scores[1.0]) < 0.1  # not each seed learns it in 150 steps


@pytest.mark.exhaustive
def test_delta_learns_s3_with_two_writes_and_only_its_sign_with_one():
    scores = {}
    for name in ("delta β<2", "delta β<2, 2 writes"):
        points = groups.TASK.execute(Run("groups", name, "S3"), lambda fraction: None)
        scores[name] = [point.score for point in points if point.x == groups.TEST_LENGTH]
    assert np.median(scores["delta β<2, 2 writes"]) > 0.8
    assert max(scores["delta β<2"]) < 0.25  # the sign leaves three products: (1/3 − 1/6) / (5/6) is 0.2


# --- the frame -------------------------------------------------------------------------------------------------------


def test_a_sweep_makes_what_is_not_finished():
    saved = {}
    sweep("test", {-1: 1.0, -2: 2.0, -3: 3.0}, {-2}, abs, lambda run, y, s: saved.update({run: (y, s >= 0)}), workers=1)
    assert saved == {-1: (1, True), -3: (3, True)}


def rows_of(task, seeds=2):
    return [
        experiment.as_row(run, Point(seed, x, 0.1 * seed + 1 / x), 12.34)
        for run in task.runs(seeds)
        for seed in range(run.seeds)
        for x in (8, 64)
    ]


def test_results_are_read_as_they_were_written(tmp_path):
    rows = rows_of(groups.TASK)
    experiment.write(tmp_path / "groups.csv", rows)
    assert experiment.load(tmp_path / "groups.csv") == rows
    assert experiment.load(tmp_path / "nothing.csv") == []
    assert experiment.seeds_of(groups.TASK.runs(2)[0], rows) == {0, 1}
    assert experiment.seeds_of(Run("groups", "other"), rows) == set()
    (tmp_path / "groups.csv").write_text("model,setting,seed,x,score,seconds\ndelta,S3,0,24,high,1.0\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        experiment.load(tmp_path / "groups.csv")


def test_runs_that_are_saved_are_not_made_again(tmp_path, capsys):
    experiment.write(tmp_path / "groups.csv", rows_of(groups.TASK))
    experiment.main(experiment.Config(tasks=("groups",), out=tmp_path, seeds=2, workers=1))
    printed = capsys.readouterr().out
    assert "runs, " not in printed and "S5       delta β<2, 4 writes  0.175 ± 0.07" in printed


@pytest.mark.slow
def test_every_task_has_a_figure_and_the_overview_shows_its_settings(tmp_path):
    results = {name: (task, rows_of(task)) for name, task in experiment.TASKS.items()}
    written = plot.draw(results, tmp_path)
    assert [path.name for path in written] == [*(f"{name}.png" for name in experiment.TASKS), "overview.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    figure = plot.new_figure()
    plot.overview(figure, results)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "groups: S5" in labels and "recall: silu, d = 32" in labels and "recall: silu, d = 128" not in labels
    assert set(recall.TASK.overview or ()) <= set(recall.SETTINGS)


def test_every_model_has_a_marker_that_no_other_has_and_a_colour_that_no_other_of_its_figure_has():
    for name, task in experiment.TASKS.items():
        looks = regression.LOOKS if name == "regression" else plot.LOOKS | plot.FIXED_DECAY
        shown = {run.model for run in task.runs(1)}
        assert shown <= looks.keys()
        assert len({marker for _, marker in looks.values()}) == len(looks)
        assert len({looks[model][0] for model in shown}) == len(shown)


def test_lines_in_one_place_are_all_seen():
    rows = [experiment.as_row(Run("recall", name, "x"), Point(0, x, 0.5), 1.0) for name in plot.LOOKS for x in (1, 2)]
    axes = plot.new_figure().subplots()
    plot.curves(axes, rows)
    widths = [line.get_linewidth() for line in axes.lines]
    assert len(widths) == len(plot.LOOKS) and all(a > b for a, b in itertools.pairwise(widths))


@pytest.mark.parametrize("name", languages.MODELS)
def test_no_parameter_is_weakly_typed(name):
    """Else the second call of a training, whose parameters come from the first, compiles the program again."""
    network = nnx.eval_shape(lambda: model.Network(languages.MODELS[name], nnx.Rngs(0)))
    assert not [x for x in jax.tree.leaves(nnx.state(network, nnx.Param)) if x.weak_type]


def test_estimates_of_seconds_are_positive_and_the_largest_network_is_the_longest():
    for task in experiment.TASKS.values():
        assert all(task.seconds(run) > 0 for run in task.runs(5))
    longest = max(recall.TASK.runs(5), key=recall.TASK.seconds)
    assert longest.setting == "silu, d = 128" and longest.seeds == recall.SEEDS
