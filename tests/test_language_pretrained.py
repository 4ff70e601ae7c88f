"""Public checkpoints at the command line: they continue prompts, and go on training on a text of one's own."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import tyro
from flax import nnx

from experiments.language import experiment as lm
from experiments.language import generate, pretrained
from experiments.language.presets import PRESETS
from experiments.run.log import read_metrics
from fwt_jax import convert

pytestmark = pytest.mark.usefixtures("compiled_once")

GOLDEN = pathlib.Path(__file__).parent / "golden" / "public_models" / "gated_deltanet_no_gate"
MAKE_MESH = lm.devices.make_mesh
TEXT = "the cats sat on a mat\n" * 400  # validation and test have equal shapes, so that less is compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer of bytes and some pairs of them, whose prompts begin with token 1."""
    folder = tmp_path_factory.mktemp("public") / "tiny"
    shutil.copytree(GOLDEN, folder, copy_function=shutil.copyfile)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(8)  # as some published ones have it
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def small_finetune():
    """Both presets, shrunk to seconds, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("finetune", "finetune-accelerator"):
            preset = PRESETS[name]
            training = dataclasses.replace(preset.training, steps=4, warmup=1, eval_every=2, save_every=2, log_every=1)
            training = dataclasses.replace(training, learning_rate=1e-3)
            changed = dataclasses.replace(preset, training=training, batch_size=8, length=16)
            patch.setitem(PRESETS, name, changed)
        patch.setattr(lm.devices, "make_mesh", lambda *sizes: None)
        yield


@pytest.fixture(scope="module")
def run(folder, book, small_finetune, tmp_path_factory):
    """The options of a run that has ended, its results, and what it printed."""
    config = lm.Config(from_=str(folder), text=(book,), out=tmp_path_factory.mktemp("run") / "run", sample=5)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        results = lm.run(config)
    return config, results, said.getvalue()


def printed(capsys, folder, *prompts, **options):
    generate.main(generate.Config(str(folder), prompts, **options))
    return capsys.readouterr().out.removesuffix("\n")


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prompts_of_other_lengths_go_on_as_each_does_alone(folder, capsys):
    """The longer one is compared with the likeliest tokens of one call, which reads it with its continuation."""
    prompts, options = ("the cats sat on a mat\nthe mat", "mat\n"), {"tokens": 9, "temperature": 0}
    longer, shorter = printed(capsys, folder, *prompts, **options).split("\n---\n")
    assert shorter == printed(capsys, folder, prompts[1], **options) and shorter.startswith(prompts[1])
    model, tokenizer = pretrained.load(folder)
    rows = [generate.encode(tokenizer, prompt) for prompt in prompts]
    assert rows[0][0] == 1 and len(rows[0]) > 8  # neither without the first token, nor cut off
    more, _ = generate._continuations(generate.Config("", **options), model, rows)
    whole = np.array([*rows[0], *more])
    logits, _ = nnx.jit(lambda model, tokens: model(tokens))(model, whole[None])
    np.testing.assert_array_equal(np.argmax(logits[0, len(rows[0]) - 1 : -1], axis=-1), more)
    assert longer == tokenizer.decode(whole)


def test_options_of_generate(folder):
    options = tyro.cli(generate.Config, args=[str(folder), "--prompt", "a", "--prompt", "b", "--dtype", "bfloat16"])
    assert options.prompt == ("a", "b")
    assert pretrained.load(folder)[0].embedding.dtype == np.float32
    assert pretrained.load(folder, options.dtype)[0].embedding.dtype == jax.numpy.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": "id"},
        {"eos_token_id": ["other", "id"]},
        {"eos_token_id": None, "text_config": {"eos_token_id": "id"}},
        {"eos_token_id": None, "text_config": None},
        {},
    ],
)
def test_a_text_ends_at_the_tokens_that_config_json_names(options, monkeypatch):
    numbers = json.loads(json.dumps(options).replace('"id"', "7").replace('"other"', "0"))

    @dataclasses.dataclass
    class Config:
        options: str = json.dumps(numbers)
        vocab_size: int = 9

    class Model:
        config = Config()

    monkeypatch.setattr(generate.decode, "generate", lambda *args, **options: np.array([[3, 7, 4], [5, 6, 7]]))
    want = [[3], [5, 6]] if "id" in json.dumps(options).replace("eos_token_id", "") else [[3, 7, 4], [5, 6, 7]]
    assert generate._continuations(generate.Config("x"), Model(), [[1], [1, 2]]) == want


def copy_of(folder, out, *without):
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*without))
    return out


def test_a_checkpoint_that_cannot_generate(folder, tmp_path):
    without = copy_of(folder, tmp_path / "without", "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json is not there; put the model's own there"):
        generate.load(without)
    large = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    large.add_tokens([f"<{i}>" for i in range(90)])
    large.save(str(without / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has tokens up to 1\d\d, and the model 96; take the model's own tokenizer"):
        generate.load(without)
    with pytest.raises(ValueError, match=r"holds no run: .* or name the folder of a public checkpoint"):
        generate.load(tmp_path / "nowhere")


# --- --from ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_goes_on_training_and_is_written_in_its_format(folder, run, capsys):
    config, results, said = run
    out = config.out
    assert said.startswith("tiny on book: ") and "the model of --from, computed in float32, 4 steps of 8 x 16" in said
    assert "pretrained, the model in its original format" in said and f"generate {out} --prompt" in said
    assert (results["preset"], results["data"], results["vocabulary"]) == ("tiny", "book", "tokenizer")
    assert {path.name for path in out.iterdir()} >= {"loss.png", "samples.txt", "results.json", "vocabulary.json"}
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (out / "pretrained").iterdir()) == names
    after, (best, _) = convert.from_pretrained(out / "pretrained"), lm.training.load(out, lm.prepare(config).make_model)
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(model)) for model in (after, best)))
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    tokens = pretrained.load(folder)[1].encode(TEXT[: 360 * 22])
    first = next(lm.text.Segments(tokens, 8, 16))
    model = convert.from_pretrained(folder)
    before, _, _ = nnx.jit(lm.loss)(model, first, None, None)
    np.testing.assert_allclose(losses[0], before / first["targets"].size, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    text = printed(capsys, out, "mat\n", tokens=9, temperature=0)
    assert text == printed(capsys, out / "pretrained", "mat\n", tokens=9, temperature=0)
    assert text != printed(capsys, folder, "mat\n", tokens=9, temperature=0)


@pytest.mark.slow
def test_a_run_goes_on_without_reading_the_weights_again(run, tmp_path, monkeypatch):
    config, results, _ = run
    config, segments, calls = dataclasses.replace(config, out=tmp_path / "parts"), lm.evaluation.segments, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return segments(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lm.evaluation, "segments", interrupted)
        lm.run(config)
    with pytest.raises(ValueError, match=r"the run in .* has not ended; the same command goes on"):
        generate.load(config.out)
    monkeypatch.setattr(pretrained.Base, "load", pytest.fail)
    assert lm.run(config) == results
    assert (config.out / "samples.txt").read_text() == (run[0].out / "samples.txt").read_text()


def test_the_preset_for_accelerators_computes_in_bfloat16(folder, book, small_finetune, tmp_path):
    run = lm.prepare(lm.Config("finetune-accelerator", from_=str(folder), text=(book,), out=tmp_path / "run"))
    assert (run.base.config.dtype, run.base.config.remat) == ("bfloat16", True)
    config = lm.Config("finetune-accelerator", from_=str(folder), text=(book,), out=tmp_path / "run", dtype="float32")
    assert lm.prepare(config).base.config.dtype == "float32"


@pytest.mark.exhaustive
def test_bfloat16_computes_and_float32_is_trained(folder, book, small_finetune, tmp_path):
    config = lm.Config("finetune-accelerator", from_=str(folder), text=(book,), out=tmp_path / "run", sample=0, steps=1)
    run = lm.prepare(config)
    assert (run.base.config.dtype, run.base.config.remat) == ("bfloat16", True)
    lm._train(run)
    before, after = run.base.load(None), lm.training.load(run.out, run.make_model)[0]
    assert after.hidden(np.array([[3, 4]]))[0].dtype == jax.numpy.bfloat16
    change = after.embedding[...] - before.embedding[...]
    assert change.dtype == np.float32 and 0 < np.max(np.abs(change)) < 2e-3


@pytest.mark.exhaustive
def test_devices_that_share_the_model_train_what_one_trains(folder, book, small_finetune, tmp_path, monkeypatch):
    config = lm.Config(from_=str(folder), text=(book,), sample=5)
    one = lm.run(dataclasses.replace(config, out=tmp_path / "one"))
    monkeypatch.setattr(lm.devices, "make_mesh", MAKE_MESH)
    shared = lm.run(dataclasses.replace(config, out=tmp_path / "shared", fsdp=2, tensor=2))
    for name in lm.EVALUATED:
        assert shared[name]["nats"] == pytest.approx(one[name]["nats"], rel=1e-5)
    models = [convert.from_pretrained(tmp_path / name / "pretrained") for name in ("one", "shared")]
    np.testing.assert_allclose(*(model.embedding[...] for model in models), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": "word"}, "--from does not go with --vocabulary: the checkpoint has a model and a tokenizer"),
        ({"d_model": 8, "heads": 2}, "--from does not go with --d-model, --heads"),
        ({"sequence": 2}, "--from trains in one process, without --distributed and --sequence"),
        ({"distributed": True}, "--from trains in one process, without --distributed and --sequence"),
        ({"preset": "demo"}, "--from takes --preset finetune or finetune-accelerator, got demo"),
        ({"text": ()}, "--from needs --text"),
        ({"from_": None, "preset": "finetune"}, "--preset finetune needs --from"),
        ({"from_": "nowhere"}, "nowhere is not there; name a folder with config.json"),
    ],
)
def test_a_start_that_is_refused_leaves_no_folder(options, words, folder, book, small_finetune, tmp_path):
    config = lm.Config(from_=str(folder), text=(book,), out=tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        lm.main(dataclasses.replace(config, **options))
    assert not (tmp_path / "run").exists()


def test_another_checkpoint_in_the_folder_is_refused(folder, book, small_finetune, tmp_path):
    config = lm.Config(from_=str(folder), text=(book,), out=tmp_path / "run")
    run = lm.prepare(config)
    run.out.mkdir()
    (run.out / "run.json").write_text(
        json.dumps({"training": dataclasses.asdict(run.preset.training), **run.identity()})
    )
    other = copy_of(folder, tmp_path / "other")
    options = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(options))  # without its line breaks
    with pytest.raises(ValueError, match=r"holds another run: config.json of --from \(SHA-256\) was '.*' and is '.*'"):
        lm.main(dataclasses.replace(config, from_=str(other)))
