"""Folders of public checkpoints: read, written, refused. The family is a toy with all kinds of rows in its table."""

import dataclasses
import json
import os
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from fwt_jax.convert import checkpoint, from_pretrained, load_tokenizer, save_pretrained
from fwt_jax.convert.families import FAMILIES, Entry, Family
from fwt_jax.sharding import make_mesh

LAYERS = 2
CONFIG = '{\n  "model_type": "toy",\n  "vocab_size": 10, "hidden_size": 8, "dtype": "bfloat16", "note": "Δ"\n}\n'


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    d_model: int
    options: str = ""
    remat: bool = False


class Block(nnx.Module):
    def __init__(self, config, rngs):
        self.query = nnx.LinearGeneral(config.d_model, (2, 4), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(config.d_model, (2, 4), use_bias=False, rngs=rngs)
        self.experts = nnx.Param(jnp.zeros((2, config.d_model, 6)))
        self.scale = nnx.Param(jnp.ones(config.d_model))


class Model(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(LAYERS)])
        self.head = None


def read_config(options, tensors):
    if "speed" in options:
        raise ValueError("speed is not known")
    return Config(options["vocab_size"], options["hidden_size"])


def same(x):
    return (x,)


def cut(w):
    """Rows of q and k ``[2·H·K, D]`` -> two kernels ``[D, H, K]``."""
    return tuple(part.T.reshape(-1, 2, 4) for part in jnp.split(w, 2))


def joined(*kernels):
    return (jnp.concatenate([kernel.reshape(len(kernel), -1).T for kernel in kernels]),)


def stacked(*experts):
    return (jnp.stack([w.T for w in experts]),)


def apart(experts):
    return tuple(w.T for w in experts)


def entries(config, shapes):
    yield Entry(("model.embed.weight",), ("embedding",), same, same)
    for i in range(LAYERS):
        disk, model = f"model.layers.{i}", f"blocks.{i}"
        yield Entry((f"{disk}.qk.weight",), (f"{model}.query.kernel", f"{model}.key.kernel"), cut, joined)
        names = tuple(f"{disk}.experts.{e}.weight" for e in range(2))
        yield Entry(names, (f"{model}.experts",), stacked, apart)
        yield Entry((f"{disk}.norm.weight",), (f"{model}.scale",), same, same)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", Family(read_config, entries, r"mtp\..*", Model))


def toy_arrays(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = {"model.embed.weight": (10, 8)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.qk.weight": (16, 8), f"model.layers.{i}.norm.weight": (8,)}
        shapes |= {f"model.layers.{i}.experts.{e}.weight": (6, 8) for e in range(2)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    arrays["model.layers.1.norm.weight"] = rng.standard_normal(8).astype(np.float32)
    return arrays


def write(folder, arrays, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder):
    """All arrays of a folder, by the package of the format."""
    arrays = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            arrays[name] = np.frombuffer(tensor["data"], checkpoint.DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return arrays


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].tobytes() == x.tobytes(), name


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", toy_arrays())


def change(folder, **arrays):
    """Other arrays for some names, or none."""
    arrays = toy_arrays() | {name.replace("__", "."): x for name, x in arrays.items()}
    return write(folder, {name: x for name, x in arrays.items() if x is not None})


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", checkpoint.DTYPES.values(), ids=str)
@pytest.mark.parametrize("most", [5_000_000_000, 500, 1])
def test_a_folder_is_read_and_written_bit_by_bit(dtype, most, tmp_path):
    arrays = toy_arrays(dtype)
    model = from_pretrained(write(tmp_path / "model", arrays))
    assert model.embedding.dtype == dtype and model.blocks[1].scale.dtype == jnp.float32
    np.testing.assert_array_equal(model.embedding[...], arrays["model.embed.weight"])
    np.testing.assert_array_equal(model.blocks[0].key.kernel[:, 1, 2], arrays["model.layers.0.qk.weight"][8 + 4 + 2])
    np.testing.assert_array_equal(model.blocks[1].experts[1], arrays["model.layers.1.experts.1.weight"].T)
    save_pretrained(model, tmp_path / "new", max_shard_bytes=most)
    assert (tmp_path / "new/config.json").read_bytes() == CONFIG.encode()
    assert_equal(read(tmp_path / "new"), arrays)
    again = from_pretrained(tmp_path / "new")
    assert_equal(dict(jax.tree.leaves_with_path(nnx.state(again))), dict(jax.tree.leaves_with_path(nnx.state(model))))


def test_large_models_are_cut_into_files_with_an_index(folder, tmp_path):
    arrays = toy_arrays()
    save_pretrained(from_pretrained(folder), tmp_path / "new", max_shard_bytes=500)
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    assert index["weight_map"].keys() == arrays.keys()
    shards = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    for shard in shards:
        with safetensors.safe_open(tmp_path / "new" / shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == shard}


def test_every_number_lies_at_a_multiple_of_its_width(tmp_path):
    arrays = {"a": np.zeros(3, np.float16), "b": np.zeros((), np.float32), "c": np.zeros((0, 2), np.float16)}
    tensors = {"a": checkpoint.Tensor("F16", (3,), 6), "b": checkpoint.Tensor("F32", (), 4)}
    tensors["c"] = checkpoint.Tensor("F16", (0, 2), 0)
    contents = [(name, arrays[name].reshape(-1).view(np.uint8)) for name in tensors]
    checkpoint.write_tensors(tmp_path, tensors, contents, 1000)
    headers = checkpoint.read_headers(tmp_path)
    assert headers["b"].start % 8 == 0
    assert_equal({name: checkpoint.read_array(tensor) for name, tensor in headers.items()}, arrays)
    assert_equal(read(tmp_path), arrays)


def test_all_variables_are_cast_and_fields_of_the_config_changed(folder):
    model = from_pretrained(folder, dtype=jnp.float32, remat=True)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    want = toy_arrays()["model.embed.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.embedding[...], want)
    assert model.config == Config(10, 8, CONFIG, remat=True)


def test_every_variable_goes_to_its_devices(folder):
    mesh = make_mesh(fsdp=2, tensor=2)
    model = from_pretrained(folder, mesh=mesh)
    assert model.blocks[0].query.kernel.sharding.spec == jax.P("fsdp", "tensor", None)
    assert len(model.blocks[0].scale.sharding.device_set) == 8
    save_pretrained(model, folder)
    assert_equal(read(folder), toy_arrays())


def test_at_no_time_are_there_more_than_one_copy_and_one_tensor(folder, monkeypatch):
    arrays = toy_arrays()
    in_memory, read_array = [], checkpoint.read_array
    before = {id(x) for x in jax.live_arrays()}

    def spy(tensor):
        in_memory.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
        return read_array(tensor)

    monkeypatch.setattr(checkpoint, "read_array", spy)
    model = from_pretrained(folder)
    assert len(in_memory) == len(arrays) and in_memory[1] > 0
    assert max(in_memory) <= sum(x.nbytes for x in arrays.values())
    assert model.embedding.shape == (10, 8)


# --- what else a folder holds ----------------------------------------------------------------------------------------


def test_what_the_model_does_not_need_is_copied_from_the_base(tmp_path):
    spare = {"mtp.fc.weight": np.arange(6, dtype=np.float32), "mtp.ids": np.arange(3)}
    base = write(tmp_path / "base", toy_arrays() | spare)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "merges.txt"):
        (base / name).write_text(name)
    (base / "pytorch_model.bin").write_bytes(b"")
    save_pretrained(from_pretrained(base), tmp_path / "new", base=base, max_shard_bytes=700)
    arrays = {}
    for path in (tmp_path / "new").glob("*.safetensors"):
        arrays |= safetensors.deserialize(path.read_bytes())
    for name, x in spare.items():
        assert arrays[name]["shape"] == list(x.shape) and arrays[name]["data"] == x.tobytes()
    assert arrays.keys() == toy_arrays().keys() | spare.keys()
    others = sorted(path.name for path in (tmp_path / "new").iterdir() if path.suffix != ".safetensors")
    assert others == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_a_checkpoint_is_replaced_and_other_files_never(folder):
    model = from_pretrained(folder)
    model.embedding[...] = jnp.ones_like(model.embedding[...])
    save_pretrained(model, folder, max_shard_bytes=500)
    assert not (folder / "model.safetensors").exists()
    assert from_pretrained(folder).embedding[3, 3] == 1
    (folder / "tokenizer.json").touch()
    (folder / "notes").mkdir()
    before = read(folder)
    with pytest.raises(
        ValueError, match=r"holds files that would be lost: notes, tokenizer\.json; name another folder"
    ):
        save_pretrained(model, folder)
    (folder / "notes").rmdir()
    save_pretrained(model, folder, base=folder)  # which has the tokenizer
    assert (folder / "tokenizer.json").exists()
    assert_equal(read(folder), before)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    with pytest.raises(ValueError, match=r"config\.json is a file; name a folder"):
        save_pretrained(model, folder / "config.json")


@pytest.mark.parametrize("at", ["write_tensors", "rename"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(at, folder, monkeypatch):
    model, rename = from_pretrained(folder), os.rename

    def full(source, target):
        if target == folder:
            monkeypatch.setattr(os, "rename", rename)
            raise OSError("no space")
        rename(source, target)

    def full_disk(path, *_):
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError("no space")

    if at == "rename":
        monkeypatch.setattr(os, "rename", full)
    else:
        monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(model, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert_equal(read(folder), toy_arrays())


def test_models_and_bases_that_cannot_be_saved(folder, tmp_path, monkeypatch):
    model = from_pretrained(folder)
    with pytest.raises(ValueError, match=r"max_shard_bytes.*0"):
        save_pretrained(model, tmp_path / "new", max_shard_bytes=0)
    monkeypatch.setitem(FAMILIES, "other", FAMILIES["toy"])
    base = write(tmp_path / "base", toy_arrays(), CONFIG.replace("toy", "other"))
    with pytest.raises(ValueError, match=r"base must be the toy that the model came from, got other, .*base"):
        save_pretrained(model, tmp_path / "new", base=base)
    model.blocks[1].scale = nnx.Param(jnp.zeros(8, jnp.int8))
    with pytest.raises(ValueError, match=r"must be float32, bfloat16, float16, and blocks\.1\.scale is int8; cast"):
        save_pretrained(model, tmp_path / "new")
    with pytest.raises(
        ValueError, match=r"the model must have the text of a config\.json as config\.options, got none"
    ):
        save_pretrained(nnx.eval_shape(lambda: Model(Config(10, 8), rngs=nnx.Rngs(0))), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- refused ---------------------------------------------------------------------------------------------------------


def test_missing_unused_and_misshapen_tensors_are_all_named(folder):
    change(
        folder,
        model__embed__weight=None,
        model__layers__0__norm__weight=None,
        model__layers__1__qk__weight=np.zeros((15, 8), np.float32),
        model__layers__1__norm__weight=np.zeros((8, 1), np.float32),
        lm_head__weight=np.zeros((10, 8), np.float32),
        mtp__fc__weight=np.zeros(3),
    )
    words = (
        "the weights of .*model do not fit its config.json: model.embed.weight is missing; "
        r"model.layers.0.norm.weight is missing; lm_head.weight is not used; model.layers.1.norm.weight must be \[8\], "
        r"got \[8, 1\]; model.layers.1.qk.weight must be \[16, 8\], got \[15, 8\]"
    )
    with pytest.raises(ValueError, match=words):
        from_pretrained(folder)


def test_a_tensor_may_have_another_shape_if_its_variable_has_the_right_one(folder, monkeypatch):
    def flat_entries(config, shapes):
        for entry in entries(config, shapes):
            yield entry._replace(to_model=lambda x: (x.reshape(-1),)) if "norm" in entry.disk[0] else entry

    monkeypatch.setitem(FAMILIES, "toy", Family(read_config, flat_entries, "", Model))
    change(folder, model__layers__1__norm__weight=np.ones((1, 8, 1), np.float32))
    assert from_pretrained(folder).blocks[1].scale.shape == (8,)


def test_weights_that_are_not_finite_are_named(folder):
    arrays = toy_arrays()
    arrays["model.layers.0.experts.1.weight"][2, 3] = np.nan
    arrays["model.layers.1.norm.weight"][1] = -np.inf
    write(folder, arrays)
    words = r"NaN or infinite numbers: model\.layers\.0\.experts\.1\.weight, model\.layers\.1\.norm\.weight$"
    with pytest.raises(ValueError, match=words):
        from_pretrained(folder)
    change(folder, model__layers__1__norm__weight=np.full(8, 1e6, np.float32))
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in float16: model\.layers\.1\.norm\.weight$"):
        from_pretrained(folder, dtype=jnp.float16)


def test_a_dtype_of_integers_is_refused(folder):
    with pytest.raises(ValueError, match="dtype must be floating point, as bfloat16, or None, got 'int8'"):
        from_pretrained(folder, dtype="int8")


def test_integers_and_float8_are_refused_by_name(folder):
    change(folder, model__embed__weight=np.zeros((10, 8), np.int8), model__layers__1__norm__weight=np.zeros(8))
    words = r"must be F32, BF16, F16, and model\.embed\.weight is I8; model\.layers\.1\.norm\.weight is F64; take the"
    with pytest.raises(ValueError, match=words):
        from_pretrained(folder)
    data = (folder / "model.safetensors").read_bytes().replace(b'"dtype":"I8"', b'"dtype":"F8_E4M3"')
    data = (int.from_bytes(data[:8], "little") + 5).to_bytes(8, "little") + data[8:]
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.embed\.weight is F8_E4M3"):
        from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1, 1])
def test_a_file_that_was_cut_off_or_has_more(size, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size] if size != 1 else path.read_bytes() + b"0")
    with pytest.raises(
        ValueError, match=r"model\.safetensors is not a whole \.safetensors file \(.*\); download or copy"
    ):
        from_pretrained(folder)


def test_no_damaged_byte_of_a_header_raises_anything_else(folder):
    path = folder / "model.safetensors"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for at in range(0, 600, 3):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            headers = checkpoint.read_headers(folder)
        except ValueError:
            continue
        assert sum(tensor.size for tensor in headers.values()) == sum(x.nbytes for x in toy_arrays().values())


HEADERS = {
    "[]": "must be a JSON object, got list",
    '{"a": 1': "is not whole JSON",
    '{"a": 1}': "its header is not one of tensors",
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}': "its header is not one of tensors",
    '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}': "its header is not one of tensors",
    '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}': "its header is not one of tensors",
    '{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}': "its header is not one of tensors",
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}': "do not follow one another",
    "[" * 100_000: "is not whole JSON",
}


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header[:60])
def test_headers_that_are_none(header, folder):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(ValueError, match=HEADERS[header]):
        from_pretrained(folder)


def test_indices_that_do_not_fit_their_files(folder):
    save_pretrained(from_pretrained(folder), folder, max_shard_bytes=500)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places, name = index["weight_map"], "model.layers.0.experts.1.weight"  # whose file has others, too

    def refused(changes, words):
        path.write_text(json.dumps({"weight_map": places | changes}))
        with pytest.raises(ValueError, match=rf"index\.json {words}"):
            from_pretrained(folder)

    refused({"x": "model-9.safetensors"}, r"names files that are not there: model-9\.safetensors; download or copy")
    refused({"x": "../model/config.json"}, "must have a weight_map from names of tensors to names of files beside it")
    refused({"x": 3}, "must have a weight_map")
    refused({"x": places[name]}, f"does not fit its files: x is not in {places[name]}; download")
    del places[name]
    refused({}, rf"does not fit its files: {name} of model-\d+-of-\d+\.safetensors is not in the index")
    for text, words in (("{", "is not whole JSON"), ("[1]", "got list"), ("{}", "must have a weight_map")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"index\.json .*{words}"):
            from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"model has no config\.json; put the model's own there"),
        ("", r"config\.json is not whole JSON"),
        ("\xff", r"config\.json is not whole JSON"),
        ("[1]", r"config\.json must be a JSON object, got list"),
        ("{}", r"config\.json has no model_type; it must be one of .*toy"),
        ('{"model_type": "mamba"}', r"config\.json has model_type 'mamba'; it must be one of .*toy"),
        ('{"model_type": []}', r"config\.json has model_type \[\]; it must be one of .*toy"),
        ('{"model_type": "toy", "speed": 1}', r"config\.json: speed is not known"),
    ],
)
def test_configs_that_are_none(text, words, folder):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        from_pretrained(folder)


def test_folders_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        from_pretrained(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"as pytorch_model\.bin, which only PyTorch reads.*save_pretrained of transf"):
        from_pretrained(folder)
    with pytest.raises(ValueError, match=r"is a file; name the folder with config\.json and model\.safetensors"):
        from_pretrained(folder / "config.json")
    with pytest.raises(ValueError, match=r"none is not there; name a folder with config\.json"):
        from_pretrained(folder / "none")


# --- names of the hub, and tokenizers --------------------------------------------------------------------------------

WAY_OUT = (
    r"put its config\.json, model\*\.safetensors, .*index\.json \(if it has one\) and tokenizer\.json into a folder"
)


def test_a_name_of_the_hub_is_downloaded(folder, monkeypatch):
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert from_pretrained("some-organisation/model_1.5").config.vocab_size == 10
    ((name, options),) = calls
    assert name == "some-organisation/model_1.5" and options["ignore_patterns"] == ["*/*"]
    wanted = {"config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"}
    for file in wanted:
        assert any(pathlib.PurePath(file).match(pattern) for pattern in options["allow_patterns"])
    for file in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        assert not any(pathlib.PurePath(file).match(pattern) for pattern in options["allow_patterns"])


def test_a_name_of_the_hub_without_network_or_package_says_what_to_put_where(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host\nmore")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=offline))
    with pytest.raises(ValueError, match=rf"a/b is no folder, and could not be .* \(no route to host\); {WAY_OUT}"):
        from_pretrained("a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=rf"a/b is no folder.* takes pip install -e '\.\[hub\]'; or {WAY_OUT}"):
        load_tokenizer("a/b", 10)


def write_tokenizer(folder, size):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, size - 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])  # gets the last number
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("size", [7, 10, 11])
def test_a_tokenizer_has_at_most_the_tokens_of_its_model(size, folder):
    write_tokenizer(folder, size)
    if size > 10:
        with pytest.raises(
            ValueError, match=r"tokenizer\.json has tokens up to 10, and the model 10; take the model's"
        ):
            load_tokenizer(folder, 10)
        return
    tokenizer = load_tokenizer(folder, 10)
    assert tokenizer.encode("w3 w1 <end>").ids == [3, 1, size - 1]


def test_tokenizers_that_are_none(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"tokenizer\.json is not there; put the model's own there"):
        load_tokenizer(folder, 10)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a whole tokenizer\.json \("):
        load_tokenizer(folder, 10)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizer\.json takes tokenizers: pip install -e '\.\[hub\]'"):
        load_tokenizer(folder, 10)
