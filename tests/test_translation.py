"""The translation experiment: sentence pairs, subwords, batches, BLEU, resume, and what is refused."""

import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
from flax import nnx

from experiments.run import files, training
from experiments.translation import experiment as translation
from experiments.translation import pairs as parallel_text
from experiments.translation import results as runs
from experiments.translation import translate as translating
from experiments.translation.pairs import EOS, PAD, Pairs, Sentences, Subwords
from experiments.translation.presets import PAPER, SIZES, find
from fwt_jax import decode, sharding
from fwt_jax.models import EncoderDecoder, TranslationConfig

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = pathlib.Path(__file__).parent.parent
WORDS = {"one": "eins", "two": "zwei", "three": "drei", "red": "rot", "blue": "blau", "house": "Haus", "tree": "Baum"}


def pairs_of_words(count, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.choice(list(WORDS), rng.integers(1, 5)) for _ in range(count)]
    return Pairs([" ".join(row) for row in rows], [" ".join(WORDS[word] for word in row) for row in rows])


def write(folder, name, pairs):
    paths = folder / f"{name}.en", folder / f"{name}.de"
    for path, lines in zip(paths, pairs, strict=True):
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return paths


def sentences(*rows):
    flat = [token for row in rows for token in row]
    return Sentences(np.asarray(flat, np.int32), np.cumsum([0, *map(len, rows)]))


# --- text ------------------------------------------------------------------------------------------------------------


def test_pairs_come_from_two_files_or_one_with_tabs_with_their_empty_lines(tmp_path):
    pairs = Pairs(["a b", "", "c"], ["A B", "D", ""])
    assert parallel_text.read_pairs(write(tmp_path, "x", pairs)) == pairs
    (tmp_path / "x.tsv").write_text("a b\tA B\n\tD\nc\t\n", encoding="utf-8")
    assert parallel_text.read_pairs([tmp_path / "x.tsv"]) == pairs


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "1\n2\n", "b": "1\n"}, r"a has 2 and .*b 1$"),
        ({"a": "1\n", "b": "\n"}, r"b is empty"),
        ({"a": "1\n"}, r"line 1 of .*a must be a sentence, a tab and its translation: '1'"),
        ({"a": "1\n", "b": "1\n", "c": "1\n"}, r"must be in two files, or in one with tabs, got 3 files"),
        ({"a": "1\n", "b": b"\xff\n"}, r"b is not UTF-8"),
        ({"a": "1\n", "b": None}, r"b is not there"),
        ({"a": "1\n", ".": None}, r" is a folder; name a file"),
        ({"a": "1" * 999}, r"line 1 of .*: '1{100}…'$"),
    ],
)
def test_files_that_are_not_pairs(files, words, tmp_path):
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=words):
        parallel_text.read_pairs([tmp_path / name for name in files])


def test_lines_end_where_other_programs_end_them(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffone\rI\r\ntwo\u2028\n\n".encode())
    (tmp_path / "b").write_bytes(b"eins\nzwei\n\n")
    assert parallel_text.read_pairs([tmp_path / "a", tmp_path / "b"]) == (
        ["one\rI", "two\u2028", ""],
        ["eins", "zwei", ""],
    )
    (tmp_path / "c").write_text("a\tb\n\n")
    assert parallel_text.read_pairs([tmp_path / "c"]) == (["a", ""], ["b", ""])


def test_subwords_are_the_same_in_every_process_even_of_some_sentences_and_no_translation_has_two_lines(monkeypatch):
    monkeypatch.setattr(parallel_text, "MAX_SENTENCES", 300)  # of 14,000
    one = Subwords.train(parallel_text.demo_pairs()["train"], 400)
    program = """
import hashlib
from experiments.translation import pairs as p
p.MAX_SENTENCES = 300
print(hashlib.sha256(p.Subwords.train(p.demo_pairs()["train"], 400).model).hexdigest())
"""
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(one.model).hexdigest()
    line_end = one._processor().piece_to_id("<0x0A>")
    letter = int(one.encode(["a"]).row(0)[-2])
    assert one.decode([[letter, line_end, letter, EOS]]) == ["a a"]


def test_subwords_come_back_as_text_even_what_was_never_seen():
    subwords = Subwords.train(parallel_text.demo_pairs()["train"], 600)
    lines = ["Opens a dialog.", "", "Größe: ⊗ 日本"]
    encoded = subwords.encode(lines)
    assert len(subwords) == 600 and len(encoded) == 3 and encoded.row(1).tolist() == [EOS]
    rows = [[*encoded.row(i), 7, PAD] for i in range(3)]  # what follows the end of a sentence does not count
    assert subwords.decode(rows) == lines
    with pytest.raises(ValueError, match="no 100000 subwords can be made of this text"):
        Subwords.train(Pairs(["a b c"], ["d e f"]), 100_000)


def test_the_demo_holds_out_what_it_does_not_train_on():
    parts = parallel_text.demo_pairs()
    assert [len(parts[name].source) for name in ("train", "validation", "test")] == [7000, 200, 200]
    train = set(parts["train"].source)
    assert not train & {*parts["validation"].source, *parts["test"].source}
    raw = gzip.decompress((ROOT / "experiments" / "data" / "demo.en-de.tsv.gz").read_bytes())
    assert len(raw.decode("utf-8").splitlines()) == 7400


def test_wmt14_is_read_as_tfds_prepared_it_without_network(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pairs = Pairs(["a b", "ü"], ["A B", "Ü"])

    class Wmt14Translate(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="de-en"),)

        def _info(self):
            features = tfds.features.Translation(languages=("de", "en"))
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples() for name in ("train", "validation", "test")}

        def _generate_examples(self):
            for i, (en, de) in enumerate(zip(*pairs, strict=True)):
                yield i, {"en": en, "de": de}

    builder = Wmt14Translate(data_dir=tmp_path, config="de-en", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
    for pair, expected in (("en-de", pairs), ("de-en", Pairs(*reversed(pairs)))):
        parts = parallel_text.load_wmt14(pair, tmp_path)
        assert {name: Pairs(*map(list, part)) for name, part in parts.items()} == dict.fromkeys(parts, expected)
    info = tmp_path / "wmt14_translate" / "de-en" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="in the format tfrecord, which takes TensorFlow to read"):
        parallel_text.load_wmt14("en-de", tmp_path)


def test_wmt14_that_is_not_there_says_so_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"de-en/1.0.0 is not there: prepare WMT14 once, .* or name other files"):
        parallel_text.load_wmt14("en-de", tmp_path)
    with pytest.raises(ValueError, match=r"--pair must be one of WMT14's, cs-en, en-cs, de-en, .*, got 'en-it'"):
        parallel_text.load_wmt14("en-it", tmp_path)


def test_wmt14_without_tfds_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "wmt14_translate" / "de-en" / "1.0.0").mkdir(parents=True)
    (tmp_path / "wmt14_translate" / "de-en" / "1.0.0" / "dataset_info.json").touch()
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"WMT14 is read by tensorflow-datasets: pip install -e '\.\[wmt14\]'"):
        parallel_text.load_wmt14("en-de", tmp_path)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_every_sentence_is_in_one_batch_of_an_epoch_padded_to_few_sizes():
    rng = np.random.default_rng(0)
    source = sentences(*([5 + i % 90] * int(n) + [EOS] for i, n in enumerate(rng.integers(1, 60, 500))))
    target = sentences(*([5 + i % 90] * int(n) + [EOS] for i, n in enumerate(rng.integers(1, 60, 500))))
    iterator = parallel_text.batches(source, target, np.arange(500), 512, 4, seed=3)
    count = len(parallel_text.plan(np.maximum(source.lengths, target.lengths), np.arange(500), 512, 4, 3))
    epochs = [[next(iterator) for _ in range(count)] for _ in range(2)]
    for epoch in epochs:
        rows = sum(int(np.sum(np.any(batch["source"], axis=1))) for batch in epoch)
        ends = sum(int(np.sum(batch["source"] == EOS)) for batch in epoch)
        assert rows == ends == 500
        tokens = sum(int(np.sum(batch["target"] != PAD)) for batch in epoch)
        assert tokens == len(target.tokens)
        for batch in epoch:
            size = batch["source"].shape[1]
            assert batch["source"].shape == batch["target"].shape and size in parallel_text.SIZES
            assert len(batch["source"]) % 4 == 0 and (batch["source"].size <= 512 or len(batch["source"]) == 4)
            for a, b in zip(batch["source"], batch["target"], strict=True):
                assert a[0] == b[0]  # a pair stays a pair
    assert [batch["source"].shape for batch in epochs[0]] != [batch["source"].shape for batch in epochs[1]]


@pytest.mark.slow
def test_an_epoch_has_new_batches_in_an_order_that_does_not_know_their_sizes():
    rng = np.random.default_rng(0)
    data = sentences(*([5 + i % 5000] * int(n) + [EOS] for i, n in enumerate(rng.integers(1, 60, 5000))))
    count = len(parallel_text.plan(data.lengths, np.arange(5000), 256, 1, 0))
    iterator = parallel_text.batches(data, data, np.arange(5000), 256, 1, seed=1)
    epochs = [[next(iterator)["source"] for _ in range(count)] for _ in range(20)]
    members = [{frozenset(batch[:, 0].tolist()) for batch in epoch} for epoch in epochs]
    for a, b in itertools.combinations(members, 2):
        assert len(a & b) < count / 20  # what repeats is small: the rest of a size
    for epoch in epochs:  # grain's own shuffle of these batches is 6 deviations off in one of them
        sizes = np.array([batch.shape[1] for batch in epoch])
        share = np.unique(sizes, return_counts=True)[1] / count
        chance = np.sum(share**2)
        equal = np.mean(sizes[1:] == sizes[:-1])
        assert abs(equal - chance) < 5 * np.sqrt(chance * (1 - chance) / count)


def test_batches_go_on_where_they_were():
    data = sentences(*([7] * (1 + i % 20) + [EOS] for i in range(200)))
    first, second = (parallel_text.batches(data, data, np.arange(200), 128, 1, seed=0) for _ in range(2))
    for _ in range(30):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(30):
        chex.assert_trees_all_equal(next(first), next(second))


def test_what_is_longer_than_the_largest_size_is_cut_and_still_ends(monkeypatch):
    monkeypatch.setattr(parallel_text, "SIZES", (4, 8))
    data = sentences([5] * 20 + [EOS], [6, EOS])
    epoch = parallel_text.batches(data, data, np.arange(2), 64, 1, None)
    rows = {tuple(row.tolist()) for batch in epoch for row in batch["source"]}
    assert {(5,) * 7 + (EOS,), (6, EOS, PAD, PAD)} <= rows


def test_empty_and_long_pairs_are_left_out_and_counted():
    source = sentences([5, EOS], [EOS], [5] * 9 + [EOS], [6, EOS])
    target = sentences([5, EOS], [5, EOS], [5, EOS], [5] * 9 + [EOS])
    rows, words = parallel_text.usable(source, target, 8)
    assert rows.tolist() == [0]
    assert words == "4 pairs, without 1 with an empty side and 2 of more than 8 tokens"
    with pytest.raises(ValueError, match=r"all 4 pairs are left out: .* 3 of more than 1 tokens; take other text"):
        parallel_text.usable(source, target, 1)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_demo():
    demo = SIZES["demo"]
    model = dataclasses.replace(demo.model, encoder_layers=1, decoder_layers=1, d_model=64, d_ff=64, num_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "demo", dataclasses.replace(demo, model=model))
        yield


@pytest.fixture(scope="module")
def trained(small_demo, tmp_path_factory):
    """A copying model of seven words, by the command's own function."""
    folder = tmp_path_factory.mktemp("translation")
    train, held_out = pairs_of_words(400), pairs_of_words(20, seed=1)
    held_out = Pairs(["", *held_out.source], ["", *held_out.target])
    config = translation.Config(
        preset="demo-delta",
        parallel=write(folder, "train", train),
        validation=write(folder, "val", held_out),
        test=write(folder, "test", held_out),
        out=folder / "run",
        steps=60,
        tokens=256,
        vocabulary=320,
        beam_size=2,
    )
    return config, translation.run(config)


def test_a_run_learns_writes_what_it_says_and_scores_as_sacrebleus_own_command(trained, capsys):
    config, results = trained
    lines = (config.out / "translations.test.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 21 and lines[0] == ""  # empty lines stay, in their places
    assert json.loads((config.out / "results.json").read_text()) == results
    assert (config.out / "loss.png").stat().st_size > 5000
    command = [sys.executable, "-m", "sacrebleu", str(config.test[1]), "-i", str(config.out / "translations.test.txt")]
    printed = subprocess.run([*command, "-m", "bleu", "chrf", "-w", "6"], capture_output=True, text=True, check=True)
    theirs = {row["name"].lower().removesuffix("2"): row for row in json.loads(printed.stdout)}
    for metric in ("bleu", "chrf"):
        np.testing.assert_allclose(theirs[metric]["score"], results["test"][metric], atol=1e-5)
        assert theirs[metric]["signature"] == results["test"][f"{metric}_signature"]
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    first, *_, last = (line for line in lines if '"loss"' in line)
    evaluations = [line for line in lines if "validation_loss" in line]
    assert json.loads(last)["loss"] < 0.7 * json.loads(first)["loss"]
    assert results["nats"] == min(json.loads(line)["validation_loss"] for line in evaluations)
    statistics = runs.read_statistics(config.out / runs.STATISTICS)
    np.testing.assert_allclose(runs.bleu_of(statistics.sum(axis=0)), results["test"]["bleu"], rtol=1e-12)
    assert "demo-delta" in runs.table({config.out: results})
    assert "mean of 3, to 60" in runs.table({config.out: results | {"average": 3}})
    row = results | {"preset": "big-elu"}
    tables = [runs.table({config.out: row | data}) for data in ({}, {"data": "wmt14 en-de"})]
    assert ["25.5" in table for table in tables] == [False, True]


def test_a_trained_run_translates_standard_input_line_by_line(trained, monkeypatch, capsys):
    config, _ = trained
    source, lines = config.test[0], (config.out / "translations.test.txt").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    translating.main(translating.Config(config.out, beam_size=2))
    assert capsys.readouterr().out == lines  # the first is empty
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match=r"standard input is empty; give sentences, one a line, .*"):
        translating.main(translating.Config(config.out))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, r"holds no run: .*run\.json is not there; train one"),
        ({"model": {}, "vocabulary": {}}, r"holds no translation model: .*run\.json has no subwords"),
        ({"model": {}, "subwords": {}}, r"the model of .*run\.json is not one of this version: 'encoder'"),
    ],
)
def test_a_folder_that_cannot_translate(settings, words, tmp_path):
    if settings is not None:
        (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words):
        translating.main(translating.Config(tmp_path))


def test_the_same_command_again_trains_no_further_and_gives_the_same(trained):
    config, results = trained
    again = translation.run(config)
    for part in ("validation", "test"):
        assert {**again[part], "sentences_per_second": 0} == {**results[part], "sentences_per_second": 0}


def test_the_loss_of_validation_leaves_out_what_is_empty(trained):
    config, _ = trained
    subwords = Subwords((config.out / "subwords.model").read_bytes())
    pairs = parallel_text.read_pairs(config.validation)  # the first is empty
    options = dataclasses.replace(find(config.preset)[1], vocab_size=len(subwords))
    model, step = training.load(config.out, lambda: EncoderDecoder(options, rngs=nnx.Rngs(0)))
    expected = translation.nats(model, *map(subwords.encode, pairs), np.arange(1, len(pairs.source)), 8)
    lines = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    (loss,) = {line["validation_loss"] for line in lines if line["step"] == step and "validation_loss" in line}
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_a_run_is_not_mixed_with_another(trained, tmp_path):
    config, _ = trained
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"subwords\.model is not there; put back a copy, or name"):
        translation.run(dataclasses.replace(config, out=tmp_path))
    (tmp_path / "subwords.model").write_bytes(b"pieces")
    with pytest.raises(ValueError, match=r"subwords\.model is damaged \(.*; put back a copy"):
        translation.run(dataclasses.replace(config, out=tmp_path))
    with pytest.raises(ValueError, match=r"must be .*, and .*run\.json is a file"):
        translation.run(dataclasses.replace(config, out=tmp_path / "run.json"))
    with pytest.raises(ValueError, match=r"--vocabulary was 320 and is 330"):
        translation.run(dataclasses.replace(config, vocabulary=330))
    with pytest.raises(
        ValueError, match=r"the text of validation \(SHA-256\) was '.*' and is"
    ):  # the best is the best of one text
        translation.run(dataclasses.replace(config, validation=config.parallel))


@pytest.mark.exhaustive
def test_translating_keeps_the_order_and_cuts_what_is_too_long(trained, monkeypatch, tmp_path, capsys):
    config, _ = trained
    subwords = Subwords((config.out / "subwords.model").read_bytes())
    options = TranslationConfig(len(subwords), 1, 1, d_model=16, d_ff=16, num_heads=2)
    model = EncoderDecoder(options, rngs=nnx.Rngs(0))
    lines = ["one", "", "two red house tree", "blue", " ", "one"]
    options = {"beam_size": 2, "label": None}
    together, cut, _ = translating.translate(model, subwords, lines, **options)
    assert cut == 0 and together[1] == together[4] == "" and together[0] == together[5]
    for line, expected in zip(lines, together, strict=True):
        assert translating.translate(model, subwords, [line], **options)[0] == [expected]
    with monkeypatch.context() as patch:
        assert translating._bytes_of_memory(model, 64, 2) > 4 * translating._bytes_of_memory(model, 8, 2)
        search, batches = decode.beam_search, []
        patch.setattr(decode, "beam_search", lambda *args, **kw: batches.append(len(args[1])) or search(*args, **kw))
        patch.setattr(translating, "MEMORY_BYTES", 2 * translating._bytes_of_memory(model, 8, 2))
        assert translating.translate(model, subwords, lines, **options)[0] == together
        assert set(batches) == {2}  # sentences at once
        mesh = sharding.make_mesh()
        assert translating.translate(model, subwords, lines, multiple=8, mesh=mesh, **options)[0] == together
        assert batches[-1] == 16  # two on each device
    monkeypatch.setattr(parallel_text, "SIZES", (8,))
    text = dict.fromkeys(("validation", "test"), Pairs(["one " * 30, "two"], ["eins", "zwei"]))
    task = translation.prepare(config)
    task = dataclasses.replace(task, text=text, out=tmp_path)
    results = translation._translate_and_score(config, task, model)
    assert results["test"]["cut"] == 1 and "1 of 2 sentences were cut to 8 tokens" in capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.parametrize(("preset", "accumulate"), [("base-softmax", 1), ("tiny-delta-dpfp-2", 2)])
def test_a_step_on_eight_devices_is_that_of_one(preset, accumulate, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_text, "SIZES", (16,))
    subwords = Subwords((trained[0].out / "subwords.model").read_bytes())
    train = pairs_of_words(200, seed=2)
    data = subwords.encode(train.source), subwords.encode(train.target)
    settings = training.TrainConfig(
        steps=3, learning_rate=1e-3, schedule="constant", warmup=0, save_every=3, eps=1e-3, accumulate=accumulate
    )
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "d_ff": 16, "num_heads": 4}
    options = dataclasses.replace(find(preset)[1], vocab_size=len(subwords), dropout=0.1, **sizes)

    def make_model():
        return EncoderDecoder(options, rngs=nnx.Rngs(0))

    def run(out, mesh):
        batches = parallel_text.batches(*data, np.arange(200), 256, 8 * accumulate, 0)
        loss = functools.partial(translation.loss, 0.1)
        model = training.train(make_model, loss, batches, settings, tmp_path / out, mesh=mesh)
        return nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))

    spread = run("spread", sharding.make_mesh(fsdp=2, tensor=2))
    chex.assert_trees_all_close(spread, run("one", None), atol=3e-5)


def test_the_loss_of_validation_counts_tokens_and_no_padding(trained):
    subwords = Subwords((trained[0].out / "subwords.model").read_bytes())
    pairs = pairs_of_words(9, seed=3)
    data = subwords.encode(pairs.source), subwords.encode(pairs.target)
    options = TranslationConfig(len(subwords), 1, 1, d_model=16, d_ff=16, num_heads=2)
    model = EncoderDecoder(options, rngs=nnx.Rngs(0))
    rows = [[jnp.asarray(x.row(i))[None] for x in data] for i in range(9)]
    loss = nnx.jit(lambda model, source, target: model.losses(source, target)[0])
    losses = np.concatenate([np.asarray(loss(model, *row)) for row in rows])
    all_rows = np.arange(9)
    np.testing.assert_allclose(translation.nats(model, *data, all_rows, 4), np.mean(losses), rtol=1e-5)
    mesh = sharding.make_mesh()
    np.testing.assert_allclose(translation.nats(model, *data, all_rows, 8, mesh), np.mean(losses), rtol=1e-5)


def test_a_target_that_is_ignored_is_not_counted():
    model = EncoderDecoder(TranslationConfig(20, 1, 1, d_model=16, d_ff=16, num_heads=2), rngs=nnx.Rngs(0))
    target = jnp.asarray([[4, -1, 5, EOS, PAD], [6, EOS, PAD, -100, PAD]])
    _, count, _ = translation.loss(0.1, model, {"source": jnp.maximum(target, 1), "target": target}, None, None)
    assert count == 5


# --- settings --------------------------------------------------------------------------------------------------------


def test_presets_are_the_papers():
    for name in PAPER:
        size, model = find(name)
        assert (model.encoder_layers, model.d_model, model.num_heads, model.head_size) == (6, 1024, 16, 64)
        assert size.tokens == 172_032 and size.label_smoothing == 0.1
    for name, features in (("big-performer-256", 512), ("big-dpfp-4", 512), ("big-dpfp-2", 256), ("big-elu", 64)):
        _, model = find(name)
        layer = nnx.eval_shape(lambda model=model: model.make_attention("decoder", nnx.Rngs(0)))
        assert layer.num_features == features
    _, delta = find("tiny-delta-dpfp-2")
    assert (delta.decoder.rule, delta.encoder.rule, delta.decoder.feature_size) == ("delta", "sum", 2)
    assert not delta.decoder.decay
    _, gated = find("tiny-gated-delta")
    assert gated == dataclasses.replace(gated, decoder=dataclasses.replace(find("tiny-delta")[1].decoder, decay=True))
    assert find("tiny-gated-delta-dpfp-2")[1].decoder == dataclasses.replace(delta.decoder, decay=True)
    assert set(SIZES) == {"big", "base", "tiny", "demo"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"preset": "huge-elu"},
            "--preset must be one of .*, or the preset demo; SIZE is one of big, base, tiny, demo; got",
        ),
        ({"preset": "tiny-dpfp"}, "got 'tiny-dpfp'"),
        ({"preset": "tiny-elu", "average": 0}, "--average must be at least 1, got 0"),
        ({"steps": 100, "average": 2}, "--average must be at most 1, the checkpoints of 100 steps, got 2"),
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"beam_size": 0}, "--beam-size must be at least 1, got 0"),
        ({"length_penalty": -0.5}, "--length-penalty must be at least 0, got -0.5"),
        ({"length_penalty": math.nan}, "--length-penalty must be at least 0, got nan"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"max_length": 1}, "--max-length must be at least 2, got 1"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"learning_rate": math.inf}, "--learning-rate must be at least 0, got inf"),
        ({"dropout": 1.0}, "--dropout must be in"),
        ({"preset": "demo-dpfp-64"}, "dpfp of vectors of size 32 takes nu from 1 to 63, got nu=64"),
        ({"fsdp": 3}, "must be the number of devices, 8"),
        ({"pair": "de-en"}, "--pair and --data-dir are of WMT14"),
        ({"preset": "tiny-elu", "test": (pathlib.Path("x"),)}, "--validation and --test belong to --parallel"),
    ],
)
def test_settings_that_are_none(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        translation.run(translation.Config(out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_the_checkpoints_that_are_averaged_are_kept_and_are_the_last_of_the_run(trained, monkeypatch):
    for average, keep in ((1, 2), (7, 7)):
        assert translation.settings(translation.Config("tiny-elu", average=average)).training.keep == keep
    monkeypatch.setattr(training, "train", lambda *args, **options: None)
    monkeypatch.setattr(training, "load", lambda *args, average, **options: pytest.fail(str(average)))
    config = dataclasses.replace(trained[0], steps=800, average=3)  # it saves after 375, 750 and 800
    with pytest.raises(pytest.fail.Exception, match=r"\[375, 750, 800\]"):
        translation.run(config)


def test_what_the_command_line_changes():
    options = {"learning_rate": 1e-2, "dropout": 0.5, "max_length": 9, "seed": 4}
    size = translation.settings(translation.Config("tiny-elu", **options))
    assert (size.training.learning_rate, size.model.dropout, size.max_length, size.training.seed) == (1e-2, 0.5, 9, 4)
    for steps, warmup in ((None, 900), (9000, 900), (500, 50), (50_000, 900)):  # else a short run would only warm up
        assert translation.settings(translation.Config("tiny-elu", steps=steps)).training.warmup == warmup
    assert translation.settings(translation.Config("tiny-elu", steps=500, warmup=7)).training.warmup == 7


def test_the_table_has_the_runs_of_this_experiment(trained, tmp_path, capsys):
    results = trained[1]
    (tmp_path / "results.json").write_text(json.dumps({"preset": "small-delta", "test": {}}))
    translation.main(translation.Config(table=True, out=tmp_path))
    assert "has no results of translation" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    translation.main(translation.Config(table=True, out=tmp_path))
    assert capsys.readouterr().out == runs.table({tmp_path / "run": results}) + "\n"


def write_run(folder, preset, seed, nats, translations, references):
    """Results as a run writes them."""
    folder.mkdir(parents=True)
    scores = runs.score(translations, references) | {"sentences_per_second": 0}
    results = {"preset": preset, "seed": seed, "data": "parallel", "references": "a", "nats": nats, "step": 10 * seed}
    results |= {"average": 1, "beam_size": 4, "length_penalty": 0.6, "validation": scores, "test": scores}
    results |= {"settings": preset, "validation_tokens": "b"}
    files.write(folder / "results.json", json.dumps(results))
    runs.write_statistics(translations, references, folder / runs.STATISTICS)
    return results


def test_the_table_has_the_mean_of_the_seeds_and_says_which_models_they_tell_apart(tmp_path, capsys):
    """good and same differ in a few sentences, and in the order of their nats; bad has a wrong word everywhere."""
    draw = np.random.default_rng(0)
    references = [" ".join(draw.choice(list("abcdefghij"), 8)) for _ in range(60)]
    for seed in (1, 2, 3):
        good = [line if draw.random() < 0.8 else line[2:] for line in references]
        same = [line if draw.random() < 0.8 else line[2:] for line in references]
        bad = [line[:6] + "?" + line[7:] for line in good]
        write_run(tmp_path / f"tiny-elu-{seed}", "tiny-elu", seed, 1.0 + seed / 10, good, references)
        write_run(tmp_path / f"tiny-delta-{seed}", "tiny-delta", seed, 1.2 + (seed == 1) / 2, same, references)
        write_run(tmp_path / f"tiny-dpfp-1-{seed}", "tiny-dpfp-1", seed, 2.0 + seed / 10, bad, references)
    translation.main(translation.Config(table=True, out=tmp_path))
    table, bleu, nats = capsys.readouterr().out.split("\n\n")
    assert "1 2 3  1.200 ± 0.100" in table and "10–30" in table and len(table.splitlines()) == 4

    def pairs(report):
        apart, not_apart = report.split("not told apart")
        return [
            {frozenset(re.findall(r"tiny-\S+", line)) for line in x.splitlines() if "−" in line}
            for x in (apart, not_apart)
        ]

    similar = {frozenset(("tiny-elu", "tiny-delta"))}
    different = {frozenset((name, "tiny-dpfp-1")) for name in ("tiny-elu", "tiny-delta")}
    assert pairs(bleu) == [different, similar]
    assert pairs(nats) == [
        {frozenset(("tiny-elu", "tiny-dpfp-1"))},
        {*similar, frozenset(("tiny-delta", "tiny-dpfp-1"))},
    ]


def test_only_what_is_comparable_is_compared(tmp_path):
    references = ["a b c d e f"] * 5
    compared = {}
    for seed in (1, 2):
        for preset, line in (("tiny-elu", "a b c d e f"), ("tiny-delta", "a b c d e g")):
            path = tmp_path / f"{preset}-{seed}"
            compared[path] = write_run(path, preset, seed, 1.0, [line] * 5, references)
    assert ["BLEU of test" in line or "nats" in line for line in runs.verdict(compared).split("\n\n")] == [True, True]
    for change, left in ({"references": "b"}, "nats"), ({"beam_size": 1}, "nats"), ({"validation_tokens": "c"}, "BLEU"):
        changed = {path: row | change if "delta" in path.name else row for path, row in compared.items()}
        found = runs.verdict(changed)
        assert found.startswith(left) and "\n\n" not in found
    older = {path: {k: v for k, v in row.items() if k != "validation_tokens"} for path, row in compared.items()}
    assert "nats" not in runs.verdict(older)
    last = tmp_path / "tiny-delta-2"
    assert runs.verdict(compared | {last: compared[last] | {"seed": 3}}) == ""  # one seed in common
    (last / runs.STATISTICS).write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"bleu.test.csv does not have the columns correct_1, .*run its command again"):
        runs.verdict(compared)


def test_runs_with_other_settings_or_the_same_seed_are_not_seeds_of_one_model(tmp_path):
    first = write_run(tmp_path / "a", "tiny-elu", 1, 1.0, ["a b c d e"], ["a b c d e"])
    others = [first | {"settings": "another", "seed": 2}, first, {k: v for k, v in first.items() if k != "seed"}]
    for other in others:
        lines = runs.table({tmp_path / "a": first, tmp_path / "b": other}).splitlines()
        assert sorted(line.split(" parallel")[0].rstrip() for line in lines[1:]) == [
            f"tiny-elu in {tmp_path / x}" for x in "ab"
        ]


def test_a_seed_that_is_not_the_presets_has_its_own_folder_and_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = write(tmp_path, "text", pairs_of_words(400))
    changes = ({}, {"seed": 1}, {"seed": 2}, {"dropout": 0.3})
    configs = [translation.Config("tiny-elu", parallel=paths, vocabulary=300, **change) for change in changes]
    tasks = [translation.prepare(config) for config in configs]
    settings = [translation._digest_but_seed(task.size.training, task.identity()) for task in tasks]
    assert settings[0] == settings[1] == settings[2] != settings[3]
    names = [task.out.name for task in tasks[:3]]
    assert names == ["tiny-elu", "tiny-elu", "tiny-elu-seed-2"]


def test_too_few_pairs_to_hold_some_out(tmp_path):
    paths = write(tmp_path, "few", pairs_of_words(250))
    with pytest.raises(ValueError, match="250 pairs are too few to hold some out; name files with --validation"):
        translation.read_data(translation.Config(parallel=paths))
    paths = write(tmp_path, "more", pairs_of_words(400))
    parts = translation.read_data(translation.Config(parallel=paths))
    assert [len(parts[name].source) for name in ("train", "validation", "test")] == [200, 100, 100]


def test_signatures_say_how_the_score_was_made():
    scores = translation.score(["the house is red"], ["the house is red"])
    np.testing.assert_allclose([scores["bleu"], scores["chrf"]], 100.0)
    assert scores["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
