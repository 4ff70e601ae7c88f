"""Files of weights: the toolkit's and ours, there and back, and what is refused."""

import contextlib
import dataclasses
import json
import pathlib
import re
import sys
import warnings

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some
from flax import nnx

from fwt_jax import RULES, convert
from fwt_jax.convert import files
from fwt_jax.convert.__main__ import main
from fwt_jax.models import DecoderLM, ModelConfig

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden" / "lmtool").glob("*.npz"))
TYPE24 = next(path for path in GOLDEN if path.stem == "type24")
TINY = ModelConfig(vocab_size=20, num_layers=2, d_model=8, d_ff=8, num_heads=2, head_size=4)
FAVOR = dataclasses.replace(TINY, feature_map="favor_plus", feature_size=3, cutoffs=(5, 9))


def equal(model, other):
    assert model.config == other.config
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(other))


@pytest.mark.parametrize("path", some(4, GOLDEN), ids=lambda path: path.stem)
def test_the_command_converts_the_toolkits_weights_there_and_back(path, tmp_path, capsys):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.npz"
    main([str(path), str(ours)])
    main([str(ours), str(back)])
    assert "parameters, of fwt_jax" in (printed := capsys.readouterr().out) and "parameters, of the toolkit" in printed
    golden, got = np.load(path), np.load(back)
    names = [name for name in got.files if name != "config" and not name.startswith("projection/")]
    assert {f"state/{name}" for name in names} == {
        name for name in golden.files if name.startswith("state/") and "inv_freq" not in name
    }
    for name in names:
        np.testing.assert_array_equal(got[name], golden[f"state/{name}"])
    model = convert.load(path)
    equal(convert.load(ours), model)
    equal(convert.load(back), model)  # with the projections of FAVOR+


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("config", [TINY, FAVOR], ids=["elu", "favor_plus"])
def test_ours_are_saved_whole_with_their_random_projections(config, suffix, tmp_path):
    model = DecoderLM(config, rngs=nnx.Rngs(7))
    convert.save(model, tmp_path / f"model.{suffix}")
    equal(convert.load(tmp_path / f"model.{suffix}"), model)
    assert [path.name for path in tmp_path.iterdir()] == [f"model.{suffix}"]


def toolkit_arrays():
    golden = np.load(TYPE24)
    arrays = {name[6:]: golden[name] for name in golden.files if name.startswith("state/")}
    return arrays, json.loads(str(golden["config"]))


def test_arguments_may_come_from_a_file_of_their_own(tmp_path):
    arrays, arguments = toolkit_arrays()
    source, config = tmp_path / "state.npz", tmp_path / "config.json"
    np.savez(source, **{f"module.{name}": x for name, x in arrays.items()})  # as DataParallel names them
    config.write_text(json.dumps(arguments))
    main([str(source), str(tmp_path / "ours.npz"), "--config", str(config)])
    equal(convert.load(tmp_path / "ours.npz"), convert.load(TYPE24))
    with pytest.raises(ValueError, match=r"state.npz has no arguments of the toolkit; give them as JSON with --config"):
        convert.load(source)


def test_arguments_that_are_none(tmp_path):
    arrays, arguments = toolkit_arrays()
    np.savez(tmp_path / "state.npz", **arrays)
    del arguments["attn_type"]
    with pytest.raises(ValueError, match="arguments lack attn_type"):
        convert.load(tmp_path / "state.npz", arguments)
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        convert.load(tmp_path / "state.npz", [1])
    for attn_type, name, default in ((25, "performer_proj_dim", 16), (26, "dpfp_n_roll", 2)):
        given = {key: x for key, x in arguments.items() if key != name} | {"attn_type": attn_type}
        assert convert.config_from_toolkit(given).feature_size == default


@pytest.mark.parametrize("attn_type", sorted(convert.ATTENTION))
@pytest.mark.parametrize("skip", [False, True])
def test_every_model_of_the_toolkit_has_its_arguments(attn_type, skip):
    arguments = toolkit_arrays()[1] | {"attn_type": attn_type, "skip_attn_normalization": skip, "dpfp_n_roll": 3}
    config = convert.config_from_toolkit(arguments)
    assert convert.config_from_toolkit(convert.arguments_of(config)) == config


@pytest.mark.parametrize("options", [{"rule": "fwm"}, {"feature_normalization": "l2"}, {"output_scale": 2.0}])
def test_models_that_the_toolkit_does_not_have(options, tmp_path):
    model = DecoderLM(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(0))
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"the toolkit has no such model: .*{name}={value!r}"):
        convert.save(model, tmp_path / "x.npz", toolkit=True)


def test_a_rule_without_a_name_cannot_be_saved(tmp_path):
    model = DecoderLM(dataclasses.replace(TINY, rule=RULES["sum"]), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"the rule of a saved model must be a name; add the Rule to fwt_jax\.RULES"):
        convert.save(model, tmp_path / "model.npz")
    assert not list(tmp_path.iterdir())


def test_names_and_shapes_that_do_not_fit_are_all_named(tmp_path):
    path = tmp_path / "model.npz"
    convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), path)
    arrays = dict(np.load(path))
    arrays["more"] = arrays.pop("embedding")
    arrays["output_bias"] = np.zeros(3, np.float32)
    np.savez(path, **arrays)
    words = r"embedding is missing; more is not used; output_bias must be \[20\], got \[3\]"
    with pytest.raises(ValueError, match=words):
        convert.load(path)


def test_a_config_of_another_version_and_projections_of_another_size_are_named(tmp_path):
    convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), tmp_path / "new.npz")
    arrays = dict(np.load(tmp_path / "new.npz"))
    config = json.loads(str(arrays["config"])) | {"speed": 2}
    np.savez(tmp_path / "new.npz", **arrays | {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=r"new.npz is no ModelConfig of this version: .*'speed'"):
        convert.load(tmp_path / "new.npz")
    golden = next(path for path in GOLDEN if path.stem == "type25")
    arrays = dict(np.load(golden))
    config = json.loads(str(arrays["config"]))
    m = config.pop("performer_proj_dim")
    np.savez(tmp_path / "old.npz", **arrays | {"config": json.dumps(config)})
    words = rf"a projection must be \[.*, 16\] for performer_proj_dim=16, got \[.*, {m}\]"
    with pytest.raises(ValueError, match=words):
        convert.load(tmp_path / "old.npz")


BAD_ARRAYS = {
    "complex": (lambda x: x + 1j, "must be real floating-point numbers, got complex"),
    "large": (lambda x: np.where(x == x.flat[3], 1e300, x.astype(np.float64)), r"that float32 has, got 1e\+300"),
    "integers": (lambda x: x.astype(np.int8), "must be real floating-point numbers, got int8"),
    "text": (lambda x: x.astype(str), "must be real floating-point numbers, got <U"),
    "bfloat16": (
        lambda x: x.astype(jnp.bfloat16),
        r"got bytes without a type \(.V2\), as .npz keeps bfloat16; save it",
    ),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_weights_that_float32_cannot_stand_for_are_refused(kind, tmp_path):
    change, words = BAD_ARRAYS[kind]
    path = tmp_path / "ours.npz"
    convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), path)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"embedding": change(arrays["embedding"])})
    with pytest.raises(ValueError, match=rf"ours.npz: embedding .*{words}"):
        convert.load(path)
    arrays, arguments = toolkit_arrays()
    name = "layers.1.pos_ff.CoreNet.0.weight"
    arrays[name] = change(arrays[name])
    np.savez(tmp_path / "theirs.npz", **arrays)
    with pytest.raises(ValueError, match=rf"theirs.npz: {name} .*{words}"):
        convert.load(tmp_path / "theirs.npz", arguments)


def test_wide_numbers_that_float32_has_are_taken_and_narrow_ones_too(tmp_path):
    model = DecoderLM(TINY, rngs=nnx.Rngs(0))
    convert.save(model, tmp_path / "ours.npz")
    for dtype in (np.float64, np.float16):
        arrays = dict(np.load(tmp_path / "ours.npz"))
        np.savez(tmp_path / "other.npz", **arrays | {"embedding": arrays["embedding"].astype(dtype)})
        want = np.asarray(arrays["embedding"].astype(dtype), np.float32)
        np.testing.assert_array_equal(convert.load(tmp_path / "other.npz").embedding[...], want)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not whole JSON: "),
        ("[1]", "must be a JSON object, got list"),
        ('{"dropout": NaN}', "is not whole JSON: NaN is no number of JSON"),
        ('{"eps": -Infinity}', "is not whole JSON: -Infinity is no number of JSON"),
        ('{"d_model": 8.0}', "d_model must be int, got 8.0"),
        ('{"d_model": "x"}', "d_model must be int, got 'x'"),
        ('{"d_model": true}', "d_model must be int, got True"),
        ('{"d_model": null}', "d_model must be int, got None"),
        ('{"dropout": "x"}', "dropout must be float, got 'x'"),
        ('{"output_scale": [1]}', r"output_scale must be float . None, got \[1\]"),
        ('{"scan": 1}', "scan must be bool, got 1"),
        ('{"rule": {}}', r"rule must be str .*, got {}"),
        ('{"feature_map": []}', r"feature_map must be str, got \[\]"),
        ('{"cutoffs": 5}', r"cutoffs must be tuple\[int, ...\], got 5"),
        ('{"cutoffs": [1.5]}', r"cutoffs must be tuple\[int, ...\], got \[1.5\]"),
        ('{"vocab_size": 20, "dropout": 2}', "is no ModelConfig of this version: dropout must be in"),
    ],
)
def test_a_config_that_is_broken_names_its_file_and_what_is_wrong(text, words, tmp_path, capsys):
    path = tmp_path / "model.npz"
    convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), path)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"config": text})
    with pytest.raises(ValueError, match=rf"the config of .*model.npz:? .*{words}"):
        convert.load(path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main([str(path), str(tmp_path / "other.npz"), "--config", str(tmp_path / "config.json")])
    printed = capsys.readouterr().err
    assert ("config.json" in printed or "no ModelConfig" in printed) and not (tmp_path / "other.npz").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("attn_type", [24]), ("n_layer", 2.0), ("d_head", "x"), ("mem_len", None), ("cutoffs", "5")]
)
def test_arguments_of_other_types_are_named(name, value):
    arrays, arguments = toolkit_arrays()
    with pytest.raises(
        ValueError, match=rf"the arguments of the toolkit: {name} must be .*, got {re.escape(repr(value))}"
    ):
        convert.from_toolkit(arrays, arguments | {name: value})


def test_a_file_is_not_overwritten_with_itself(tmp_path, capsys):
    path = tmp_path / "m.npz"
    convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), path)
    before = path.read_bytes()
    (tmp_path / "link.npz").symlink_to(path)
    for other in (path, tmp_path / "link.npz", tmp_path / "." / "m.npz"):
        with pytest.raises(SystemExit, match="2"):
            main([str(path), str(other)])
        assert "would be overwritten with itself; name another destination" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_no_damaged_byte_raises_anything_else(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    small = ModelConfig(vocab_size=5, num_layers=1, d_model=2, d_ff=2, num_heads=1, head_size=2)
    convert.save(DecoderLM(small, rngs=nnx.Rngs(0)), path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    heads = range(len(data) - 1700, len(data)) if suffix == ".npz" else range(300)  # where it says what there is
    for at in heads:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError), warnings.catch_warnings(action="ignore"):
            files.read_file(path)


def test_an_array_by_itself_is_no_model(tmp_path):
    with (tmp_path / "model.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"model.npz is not a whole .npz file of arrays \(it holds one array, as .npy"):
        convert.load(tmp_path / "model.npz")


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "weights.bin").write_bytes(b"")
    for path, words in (("nothing.npz", "is not there"), ("weights.bin", "must end in .pt, .npz or .safetensors")):
        with pytest.raises(ValueError, match=words):
            convert.load(tmp_path / path)
    with pytest.raises(ValueError, match=r"model.pt must end in .npz or .safetensors; .pt and .pth can only be read"):
        convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), tmp_path / "model.pt")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "nothing.npz"), str(tmp_path / "x.npz")])
    assert re.fullmatch("error: .*nothing.npz is not there\n", capsys.readouterr().err)


def test_folders_in_the_place_of_files(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; name a file in \.pt, \.npz or \.safetensors"):
        convert.load(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"is a public checkpoint; load it with fwt_jax\.convert\.from_pretrained\('"):
        convert.load(tmp_path)
    (tmp_path / "run.json").touch()
    with pytest.raises(ValueError, match=r"is the folder of a run; .*experiments\.language\.generate"):
        convert.load(tmp_path)
    with pytest.raises(ValueError, match=r"x\.npz cannot be written: the folder .*none is not there; make it first"):
        convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), tmp_path / "none" / "x.npz")


def test_projections_without_favor_plus_are_refused():
    arrays, arguments = toolkit_arrays()
    with pytest.raises(ValueError, match=r"must have a projection for each layer with FAVOR\+, 0, got 1"):
        convert.from_toolkit(arrays, arguments, [np.zeros((4, 4))])


def test_a_file_of_pytorch_without_pytorch_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"takes PyTorch to read: pip install -e '\.\[convert\]'"):
        convert.load(tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match=r"takes safetensors: pip install -e '\.\[convert\]'"):
        convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), tmp_path / "model.safetensors")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_of_pytorch(wrapped, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install torch")
    arrays, arguments = toolkit_arrays()
    state = {name: torch.tensor(x) for name, x in arrays.items()}
    torch.save({"state_dict": state, "config": arguments} if wrapped else state, tmp_path / "model.pt")
    equal(convert.load(tmp_path / "model.pt", None if wrapped else arguments), convert.load(TYPE24))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(
        ValueError, match=r"is not a whole state_dict. The toolkit saves the whole module: in its folder"
    ):
        convert.load(tmp_path / "module.pt")
    cut_off(tmp_path / "model.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "junk.pt").write_bytes(b"everything but weights")
    for name in ("list.pt", "junk.pt"):
        with pytest.raises(ValueError, match=rf"{name} is not a whole state_dict"):
            convert.load(tmp_path / name, arguments)


def cut_off(path):
    """Keeps half of a file, and then none of it."""
    for size in (path.stat().st_size // 2, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="is not a whole"):
            convert.load(path, {})


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_was_cut_off(suffix, tmp_path):
    convert.save(DecoderLM(TINY, rngs=nnx.Rngs(0)), tmp_path / f"model{suffix}")
    cut_off(tmp_path / f"model{suffix}")
