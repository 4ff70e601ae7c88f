"""The language-model experiments: evaluation, presets of the paper, the command line from a text to its results."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tyro
from cases import some
from flax import nnx

from experiments.language import comparison, evaluation, generate, text
from experiments.language import experiment as lm
from experiments.language.presets import PRESETS, Preset
from experiments.run import folder, log
from fwt_jax import convert, sharding
from fwt_jax.models import DecoderLM, ModelConfig
from tests.test_readme import SNIPPETS

pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = ModelConfig(vocab_size=30, cutoffs=(10,), num_layers=2, d_model=16, d_ff=32, num_heads=2, head_size=8)


def tokens_of(count):
    return np.random.default_rng(0).integers(0, 30, count).astype(np.int32)


# --- evaluation ------------------------------------------------------------------------------------------------------


def tiny_model(**options):
    model = DecoderLM(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(0))
    model.embedding[...] = 20 * model.embedding[...]
    for block in model.blocks:  # so that the memory matters
        for layer in (block.attention.key, block.attention.value, block.attention.out):
            layer.kernel[...] = 30 * layer.kernel[...]
    return model


@nnx.jit
def losses_of(model, rows):
    """Of all tokens but the first of each row."""
    return model.losses(rows[:, :-1], rows[:, 1:])[0]


def one_by_one(model, tokens, length):
    """The authors' evaluation, a window at a time."""
    losses = []
    for start in range(len(tokens) - length):
        loss = losses_of(model, jnp.asarray(tokens[None, start : start + length + 1]))
        losses += [*np.asarray(loss[0])] if start == 0 else [float(loss[0, -1])]
    assert len(losses) == len(tokens) - 1
    return np.mean(losses)


@pytest.mark.parametrize("rule", some(2, ["delta", "softmax"]))
@pytest.mark.parametrize("batch_size", [3, 64])
def test_sliding_windows_in_batches_are_the_authors_one_by_one(rule, batch_size):
    model, tokens = tiny_model(rule=rule), tokens_of(40)
    got = evaluation.sliding_window(model, tokens, 8, batch_size)
    np.testing.assert_allclose(got, one_by_one(model, tokens, 8), rtol=1e-5)


@pytest.mark.slow
def test_a_memory_that_is_carried_reads_the_text_as_one_sequence():
    model, tokens = tiny_model(positions=None), tokens_of(60)
    losses = losses_of(model, jnp.asarray(tokens[None]))
    np.testing.assert_allclose(evaluation.carried(model, tokens, 7), np.mean(losses), rtol=1e-5)
    assert abs(evaluation.segments(model, tokens, 7, 1) - np.mean(losses)) > 1e-3


def test_a_target_that_is_ignored_is_not_counted():
    model, tokens = tiny_model(), jnp.asarray(tokens_of(20).reshape(2, 10))
    batch = {"tokens": tokens, "targets": tokens.at[0, 3].set(-1).at[1, 4].set(-100)}
    total, count, _ = lm.loss(model, batch, None, None)
    np.testing.assert_allclose(total, jnp.sum(model.losses(**batch)[0]), rtol=1e-5)
    assert count == 18


def test_segments_are_summed_in_float64():
    """A word that costs 1e9 nats, before 40 segments whose losses are less than float32 tells in such a sum."""
    model, tokens = DecoderLM(dataclasses.replace(TINY, cutoffs=()), rngs=nnx.Rngs(0)), 1 + tokens_of(42) % 29
    model.output_bias[...] = model.output_bias[...].at[0].set(-1e9)
    tokens[1] = 0
    losses = [losses_of(model, jnp.asarray([pair]))[0, 0] for pair in itertools.pairwise(tokens)]
    rest = float(np.sum(np.asarray(losses[1:], np.float64)))
    assert rest > 60
    np.testing.assert_allclose(evaluation.segments(model, tokens, 1, 1) * 41 - float(losses[0]), rest, atol=1e-3)


@pytest.mark.slow
def test_segments_are_read_by_themselves():
    model, tokens = tiny_model(), tokens_of(47)
    rows = tokens[:46].reshape(2, 23)
    want = []
    for start, end in ((0, 8), (8, 16), (16, 22)):
        losses = losses_of(model, jnp.asarray(rows[:, start : end + 1]))
        want += [*np.asarray(losses).ravel()]
    np.testing.assert_allclose(evaluation.segments(model, tokens, 8, 2), np.mean(want), rtol=1e-5)


# --- the paper's rows ------------------------------------------------------------------------------------------------


def test_the_presets_are_the_rows_of_the_paper():
    """Of the sizes whose parameters test_models.py counts, and of the toolkit's attention types."""
    words = ModelConfig(vocab_size=267_735, cutoffs=(20_000, 40_000, 200_000), scan=True)
    sizes = {"small": words, "medium": dataclasses.replace(words, d_model=256, head_size=32)}
    free = ("rule", "feature_map", "feature_size", "feature_normalization", "normalize", "positions", "memory_length")
    for name, preset in PRESETS.items():
        if preset.table:
            small = name.startswith("small")
            assert (preset.batch_size, preset.length) == ((96, 256) if small else (56, 384)), name
            steps = 200_000 if name == "medium-xl" else 500_000 if small else 400_000
            assert preset.training.steps == steps, name
            choices = {field: getattr(preset.model, field) for field in (*free, "output_scale", "eps")}
            assert preset.model == dataclasses.replace(sizes[name.split("-")[0]], **choices), name
            assert convert.arguments_of(preset.model)["attn_type"] == attn_type(name), name
    assert [sum(p.table == table for p in PRESETS.values()) for table in (2, 3, 4, 5)] == [10, 3, 3, 4]


def attn_type(name):
    """The toolkit's, which trained that row of the paper."""
    if "normalized" in name:
        return 44
    if name.endswith("xl") or "softmax" in name:
        return 0 if name.endswith("xl") else 2
    kind = 1 if "performer" in name else 2 if "dpfp" in name else 0
    return 24 + kind if "delta" in name else (34, 35, 6)[kind]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "softmax"}, 'softmax has one with positions="relative" only'),
        ({"feature_map": "favor_plus"}, "carry cannot be with favor_plus"),
    ],
)
def test_memories_that_cannot_be_carried(options, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PRESETS["demo"], carry=True, model=dataclasses.replace(TINY, **options))


def test_an_unknown_preset_names_all():
    with pytest.raises(ValueError, match=r"--preset must be one of demo, small-softmax, .*, got 'small'"):
        lm.main(lm.Config(preset="small"))


# --- from a text to its results --------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(monkeypatch):
    """The demo, shrunk to seconds."""
    demo = PRESETS["demo"]
    training = dataclasses.replace(demo.training, steps=6, warmup=2, eval_every=3, save_every=3, log_every=2)
    model = dataclasses.replace(demo.model, num_layers=1, d_model=16, d_ff=32, num_heads=2, head_size=8)
    monkeypatch.setitem(PRESETS, "demo", Preset(model, training, 8, 16, "demo", "character", "sliding_window"))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"the {i} cats sat on mat {i * 7 % 10}\n" for i in range(400)))
    return path


@pytest.mark.slow
def test_a_run_from_a_text_to_results_plot_sample_and_prompts(small_demo, book, tmp_path, capsys, monkeypatch):
    config = lm.Config(text=(book,), vocabulary="sentencepiece", vocabulary_size=300, out=tmp_path / "run", sample=20)
    lm.main(config)
    out, printed = tmp_path / "run", capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert printed.startswith("delta-1x16 on book: ") and "rule delta, 1 layers, d_model 16, 2 heads of 8" in printed
    assert "learning rate 0.004, warmup 2" in printed and "(sentencepiece)" in printed and "demo" not in printed
    assert (results["preset"], results["data"]) == ("delta-1x16", "book")
    assert "word_perplexity" in results["test"] and results["step"] in (3, 6)
    parts = text.split(book.read_text())
    data = lm.read_data(config, lm.settings(config), out)
    assert results["test"]["tokens"] == len(data.vocabulary.encode(parts["test"])) - 1
    words = text.count_words(parts["test"])
    nats = results["test"]["nats"] * results["test"]["tokens"]
    assert results["test"]["word_perplexity"] == pytest.approx(math.exp(min(700, nats / words)), rel=1e-6)
    prompt, sample = (out / "samples.txt").read_text().split("|")
    assert len(prompt) and len(sample)
    assert matplotlib.image.imread(out / "loss.png").std() > 0.01
    before = (out / "metrics.jsonl").read_text()
    monkeypatch.setattr(text.Vocabulary, "sentencepiece", None)  # nor are pieces made anew
    lm.main(config)  # nothing is trained again
    assert (out / "metrics.jsonl").read_text() == before
    capsys.readouterr()
    generate.main(generate.Config(str(out), ("the 7 cats",), tokens=9, top_p=0.9))
    assert capsys.readouterr().out.startswith("the 7 cats")
    (tmp_path / "runs" / "language").mkdir(parents=True)
    out.rename(tmp_path / "runs" / "language" / "demo")
    monkeypatch.chdir(tmp_path)
    (snippet,) = (snippet for snippet in SNIPPETS if "runs/language/demo" in snippet)
    exec(snippet, {})
    assert capsys.readouterr().out.strip()


@pytest.mark.exhaustive
def test_a_run_with_split_tokens_has_the_losses_of_the_plain_run(small_demo, book, tmp_path, monkeypatch):
    demo = PRESETS["demo"]
    training = dataclasses.replace(demo.training, steps=8, accumulate=2, log_every=1)
    # Ten tokens do not fill four devices. The seventh and last segment of an epoch has nine.
    options = {"training": training, "length": 10, "batch_size": 8, "carry": True, "evaluation": "carried"}
    monkeypatch.setitem(PRESETS, "demo", dataclasses.replace(demo, **options))
    book.write_text(book.read_text()[:600])
    config = lm.Config(text=(book,), sample=5)
    plain = lm.run(dataclasses.replace(config, out=tmp_path / "plain"))
    split = dataclasses.replace(config, out=tmp_path / "split", sequence=4)
    for results in (lm.run(split), lm.run(dataclasses.replace(split, sequence=1))):  # other devices go on with the run
        assert results["step"] == plain["step"]
        for name in lm.EVALUATED:
            assert results[name]["nats"] == pytest.approx(plain[name]["nats"], rel=1e-5)
    got, want = (log.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("split", "plain"))
    losses = [[line.get("loss", line.get("validation_loss")) for line in lines] for lines in (got, want)]
    assert len(losses[0]) > 8 and None not in losses[0]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert (tmp_path / "split" / "samples.txt").read_text() == (tmp_path / "plain" / "samples.txt").read_text()


@pytest.mark.exhaustive
def test_a_run_with_another_vocabulary_is_refused(small_demo, book, tmp_path):
    config = lm.Config(text=(book,), out=tmp_path / "run", sample=0)
    lm.main(config)
    book.write_text("zebra?\n" * 100 + book.read_text())
    with pytest.raises(ValueError, match=r"holds a run of another text; name another folder with --out"):
        lm.main(config)


def test_a_run_is_called_by_its_preset_and_by_the_users_own_text(small_demo, book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lm.prepare(lm.Config(text=(book,))).out == tmp_path / "runs" / "language" / "book"
    assert lm.prepare(lm.Config("small-delta", text=(book,))).out.name == "small-delta-book"


def saved_run(config):
    """The folder of a run, with its settings only."""
    run = lm.prepare(config)
    run.out.mkdir()
    settings = {"training": dataclasses.asdict(run.preset.training), **run.identity()}
    (run.out / "run.json").write_text(json.dumps(settings))


def test_another_preset_in_the_folder_is_refused_in_the_words_of_the_command_line(small_demo, book, tmp_path):
    config = lm.Config(text=(book,), out=tmp_path / "run")
    saved_run(config)
    words = r"--batch-size was 8 and is 16; d_ff of --preset was 32 and is 64; --steps \(on .* depends\) was 6 and is 9"
    demo = PRESETS["demo"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=words):
        patch.setitem(PRESETS, "demo", dataclasses.replace(demo, model=dataclasses.replace(demo.model, d_ff=64)))
        lm.main(dataclasses.replace(config, batch_size=16, steps=9))


def test_a_run_that_lacks_a_later_option_has_its_default(small_demo, book, tmp_path):
    """As a run of before ``sequence_axis``. An option that this version does not have is refused."""
    config = lm.Config(text=(book,), out=tmp_path / "run")
    saved_run(config)
    run, path = lm.prepare(config), tmp_path / "run" / "run.json"
    settings, saved = json.loads(path.read_text()), {"training": dataclasses.asdict(run.preset.training)}
    later = [settings["model"].pop(name) for name in ("sequence_axis", "num_value_heads", "conv_size")]
    assert later == [None] * 3
    path.write_text(json.dumps(settings))
    folder.check_identity(path, saved | lm.prepare(config).identity())
    run.data.vocabulary.save(tmp_path / "run" / "vocabulary.json")
    with pytest.raises(ValueError, match="has no checkpoints"):  # The configuration is read, and only the weights lack.
        generate.load(tmp_path / "run")
    path.write_text(json.dumps(settings | {"model": settings["model"] | {"warp": 9}}))
    with pytest.raises(ValueError, match=r"holds another run: model.warp was 9 and is None"):
        folder.check_identity(path, saved | run.identity())
    with pytest.raises(ValueError, match=r"is not one of this version: .*warp"):
        generate.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"steps": 9},
            r"has --steps 6, .* A run of 9 steps has other learning rates .*: name another folder with --out",
        ),
        ({"vocabulary": "word"}, "holds a run with --vocabulary character"),
        ({"vocabulary_size": 7}, "holds a run with --vocabulary-size 8000"),
        ({"text": "other"}, "holds a run of another text; name another folder with --out, or delete this one"),
    ],
)
def test_a_folder_of_another_run_says_what_differs(options, words, small_demo, book, tmp_path):
    config = lm.Config(text=(book,), out=tmp_path / "run")
    saved_run(config)
    lm.prepare(config)
    if "text" in options:
        other = tmp_path / "other.txt"
        other.write_text("zebra?\n" * 100)
        options = {"text": (other,)}
    with pytest.raises(ValueError, match=words):
        lm.prepare(dataclasses.replace(config, **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 6}, "--batch-size: the batch has 6 rows, which the mesh of data=8"),
        ({"batch_size": 10**6}, "--batch-size: a batch of 1000000 rows needs"),
        ({"fsdp": 3}, "--fsdp, --tensor and --sequence: .* must be the number of devices"),
        ({"accumulate": 3}, r"--accumulate must divide the 8 rows of a batch \(--batch-size\), got 3"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"learning_rate": math.inf}, "--learning-rate: .* must be a finite number"),
        ({"vocabulary_size": -1}, "--vocabulary-size must be at least 0, got -1"),
        ({"sample": -1}, "--sample must be at least 0, got -1"),
        ({"heads": 3}, "--d-model must be even and a multiple of --heads, got 16 and 3"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, got 1.0"),
        ({"wikitext": "x"}, "--wikitext needs a --preset of the paper's tables, and no --text"),
    ],
)
def test_a_refused_start_names_the_option_and_leaves_no_folder(options, words, small_demo, book, tmp_path):
    with pytest.raises(ValueError, match=words):
        lm.main(lm.Config(text=(book,), out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_text_that_the_steps_read_too_often_is_warned_of(small_demo, book, tmp_path, capsys):
    lm._describe(lm.prepare(lm.Config(text=(book,), out=tmp_path / "run", steps=10_000)))
    assert "note: these steps read the 9," in capsys.readouterr().err


def test_a_folder_that_holds_no_run_cannot_generate(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: .*run.json is not there; train one with"):
        generate.main(generate.Config(str(tmp_path), ("The",)))
    (tmp_path / "run.json").write_text('{"model": {}, "subwords": {}}')
    with pytest.raises(ValueError, match=r"is not a run of python -m experiments.language; it has no vocabulary.json"):
        generate.load(tmp_path)
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        generate.encode(text.Vocabulary.words("a b"), "")


@pytest.mark.exhaustive
def test_each_text_has_a_folder_and_a_vocabulary_of_its_own(small_demo, book, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "RUNS", tmp_path)
    lm.run(lm.Config(preset="demo", text=(book,), out=tmp_path / "x", sample=0))
    vocabulary = json.loads((tmp_path / "x" / "run.json").read_text())["vocabulary"]
    assert text.Vocabulary.load(tmp_path / "x" / "vocabulary.json").digest() == vocabulary["sha256"]
    config = lm.Config(preset="demo", text=(book,), vocabulary="word", vocabulary_size=0)
    words = lm.read_data(config, lm.settings(config), tmp_path).vocabulary
    assert len(words) > 5 and text.UNKNOWN in words.pieces
    lm.run(lm.Config(preset="demo", text=(book,), sample=0))
    assert (tmp_path / book.stem / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rows", some(2, [3, 6]))
def test_windows_fill_any_mesh_and_short_texts_any_batch(rows):
    model = DecoderLM(ModelConfig(vocab_size=20, num_layers=1, d_model=8, d_ff=8, num_heads=1), rngs=nnx.Rngs(0))
    tokens = np.arange(15) % 20
    mesh = sharding.make_mesh(devices=jax.devices()[:rows])
    want = evaluation.sliding_window(model, tokens, 4)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(evaluation.sliding_window(model, tokens, 4, mesh=mesh), want, rtol=1e-5)
    assert evaluation.segments(model, tokens, 4) > 0


def test_data_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"WikiText-103 is not in .*: put wiki.train.tokens"):
        lm.main(lm.Config(preset="small-delta", wikitext=tmp_path, out=tmp_path / "run"))
    with pytest.raises(ValueError, match=r"no.txt is not there"):
        lm.main(lm.Config(text=(tmp_path / "no.txt",), out=tmp_path / "run"))


def test_the_command_line_changes_the_preset():
    arguments = ["--preset", "medium-delta", "--steps", "7", "--batch-size", "16", "--dtype", "bfloat16", "--seed", "5"]
    preset = lm.settings(tyro.cli(lm.Config, args=arguments))
    assert (preset.training.steps, preset.training.seed, preset.batch_size, preset.length) == (7, 5, 16, 384)
    assert preset.model == dataclasses.replace(PRESETS["medium-delta"].model, dtype="bfloat16")
    assert lm.model_config(preset, 30_000).cutoffs == (20_000,)
    arguments = ["--layers", "2", "--d-model", "64", "--heads", "4", "--dropout", "0.2", "--learning-rate", "1e-3"]
    preset = lm.settings(tyro.cli(lm.Config, args=[*arguments, "--warmup", "9"]))
    model = dataclasses.replace(PRESETS["demo"].model, num_layers=2, d_model=64, head_size=16, d_ff=256, dropout=0.2)
    assert preset.model == model and (preset.training.learning_rate, preset.training.warmup) == (1e-3, 9)


def test_the_table_has_the_papers_numbers_beside_ours():
    numbers = {"nats": 3.5, "perplexity": 33.25, "word_perplexity": 33.25, "tokens": 9}
    row = {"preset": "small-delta", "vocabulary": "word", "evaluation": "sliding_window", "step": 4}
    row |= {"validation": numbers, "test": numbers}
    heads, line, other = lm.table([row | {"data": "wikitext-103"}, row | {"data": "book"}]).splitlines()
    ours = ["word", "sliding_window", "33.25", "33.25", "4"]
    assert line.split() == ["small-delta", "wikitext-103", *ours, "2", "34.1", "35.5"]
    assert other.split() == ["small-delta", "book", *ours]
    assert "paper" in heads and "paper" not in lm.table([row | {"data": "book"}])


def test_the_table_is_of_a_folder(tmp_path, capsys):
    numbers = {"perplexity": 3.5}
    row = {"preset": "demo", "data": "demo", "vocabulary": "character", "evaluation": "segments", "step": 4}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(row | {"validation": numbers, "test": numbers}))
    lm.main(lm.Config(table=True, out=tmp_path))
    assert "3.50" in capsys.readouterr().out
    lm.main(lm.Config(table=True, out=tmp_path / "none"))
    assert "none/ has no results of language models; train first, or name --out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "results.json is not whole JSON"), ('{"evaluation": 1}', r"results.json is not whole \(KeyError: ")],
)
def test_results_that_are_broken_name_their_file(content, words, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        lm.main(lm.Config(table=True, out=tmp_path))


# --- the comparison --------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_comparison_trains_every_model_and_goes_on(tmp_path, monkeypatch):
    model = dataclasses.replace(comparison.BASE, num_layers=1, d_model=16, d_ff=16, num_heads=2, head_size=4)
    monkeypatch.setattr(comparison, "BASE", model)
    monkeypatch.setattr(comparison, "LENGTH", 8)
    monkeypatch.setattr(comparison, "CUTOFFS", (5, 12))
    paths = [tmp_path / f"{name}.txt" for name in ("train", "valid", "test")]
    for path in paths:
        path.write_text("".join(f"The cat @-@ no. {i % 10} <unk> , sat on its mat .\n" for i in range(60)))
    config = comparison.Config(paths[0], paths[1], (paths[2],), tmp_path / "out", steps=2)
    results = [comparison.run(config, name, 1) for name in itertools.islice(comparison.MODELS, 2)]
    assert comparison.run(config, "softmax", 1) == results[0]
    paths[2].write_text("Another test text .\n" * 60)
    assert comparison.run(config, "softmax", 1)["test"] != results[0]["test"]
    with pytest.raises(ValueError, match=r"holds another run: --steps \(on which .* depends\) was 2 and is 3"):
        comparison.run(dataclasses.replace(config, steps=3), "softmax", 1)
    twice = dataclasses.replace(config, test=(paths[2], tmp_path / "other" / "test.txt"))
    with pytest.raises(ValueError, match=r"the names of the texts must differ, .* got valid, test, test"):
        comparison.main(twice)
    assert all(1 < row["test"]["sliding_window"] < 100 and row["tokens"] == 2 * 8 * 8 for row in results)
    lines = comparison.table(results, ["valid", "test"]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| softmax |") and lines[2].endswith("| 1 | 34.1 |")
    comparison.draw(results, ["test"], tmp_path / "plot.png")
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0.01


def test_the_comparison_says_which_models_several_seeds_tell_apart():
    perplexities = {"softmax": (20.0, 22.0, 21.0), "delta, ELU+1": (10.0, 11.1, 10.4), "sum, ELU+1": (21.0, 20.5, 22.0)}
    results = [
        {"model": model, "seed": seed, "parameters": 1, "test": {"segments": value, "sliding_window": value}}
        for model, values in perplexities.items()
        for seed, value in enumerate(values)
    ]
    assert "| sum, ELU+1 | 1 | 21.2 ± 0.8 | 21.2 ± 0.8 | 3 | 38.3 |" in comparison.table(results, ["test"])
    apart, not_apart = comparison.verdict(results, ["test"]).split("not told apart")
    assert apart.startswith("nats of a word of test: mean difference")
    assert "delta, ELU+1 − softmax       -0.693 (-0.7" in apart and "delta, ELU+1 − sum, ELU+1" in apart
    assert "softmax" in not_apart and "sum, ELU+1" in not_apart and "delta" not in not_apart
    assert comparison.verdict([row for row in results if row["seed"] == 0], ["test"]) == ""


def test_words_and_signs_are_taken_apart():
    content = "A well @-@ known 1 @,@ 000 m (3.5 ft) <unk> , it's.\n"
    assert comparison.separate(content) == "A well - known 1 , 000 m ( 3 . 5 ft ) <unk> , it ' s .\n"
