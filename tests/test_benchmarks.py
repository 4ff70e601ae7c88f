"""The benchmarks for a GPU and of checkpoints, at tiny sizes on CPU."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import gpu, pretrained


@pytest.mark.exhaustive
def test_the_table_has_numbers_and_reasons_and_goes_on(tmp_path, monkeypatch, capsys):
    config = gpu.Config(
        rows=("xla", "cudnn", "fla"),
        rules=("delta", "softmax"),
        shapes=("s1",),
        presets=("small-delta",),
        dtypes=("bfloat16",),
        rounds=2,
        out=tmp_path,
        tiny=True,
    )
    gpu.main(config)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    ours, model = rows["s1 delta xla bfloat16"], rows["small-delta bfloat16"]["step"]
    for cell in (ours["forward"], ours["both"], model):
        assert 0 < cell["min"] <= cell["ms"] <= cell["max"] and cell["compile_s"] > 0
    assert 0 < ours["errors"]["reads"] < 3e-3 and 0 < ours["errors"]["gradient"] < 3e-3
    assert np.isclose(model["words_per_s"], 2 * 16 / model["ms"] * 1e3)
    assert all("refused" in cell for cell in rows["s1 softmax cudnn bfloat16"].values())  # a CPU has neither
    assert all("refused" in cell for cell in rows["s1 delta fla bfloat16"].values())
    printed = capsys.readouterr().out
    assert f"{ours['errors']['reads']:.1e}" in printed and f"{model['words_per_s']:,.0f}" in printed

    tried = []
    monkeypatch.setattr(gpu, "rounds", lambda *_: tried.append(1))  # of rows that would be measured again
    gpu.main(config)
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == rows and not tried
    with pytest.raises(ValueError, match="sizes was 'tiny' and is None"):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        gpu.main(gpu.Config(out=tmp_path))


def test_without_a_gpu_the_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JAX has a CPU only; --tiny tries the program on a CPU"):
        gpu.main(gpu.Config(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_errors_are_those_of_the_worst_gradient():
    operation, shape = gpu.OPERATIONS["gated-delta"], gpu.TINY
    right = dict(gpu.exact(operation, "float32", shape))
    reads = 1.01 * right.pop("reads")
    error = gpu.errors(operation, "float32", shape, reads, right | {"value": 0.9 * right["value"]})
    assert np.isclose(error["reads"], 0.01) and np.isclose(error["gradient"], 0.1) and error["worst"] == "value"
    error = gpu.errors(operation, "float32", shape, reads, right | {"beta": np.nan * right["beta"]})
    assert np.isnan(error["gradient"]) and error["worst"] == "beta"


def test_rounds_are_of_calls_in_a_row():
    counts = []

    def run(count):
        counts.append(count)
        return 0.01 * count

    times = gpu.rounds(run, 3)
    assert counts == [2, 1, 4, 4, 4] and times == {"ms": 10.0, "min": 10.0, "max": 10.0}


@pytest.mark.exhaustive
def test_a_checkpoint_is_made_loaded_and_continued(capsys):
    pretrained.main(pretrained.Config(dtypes=("float32",), prompt=5, tokens=2, rounds=1, tiny=True))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("float32")]
    _, name, seconds, loaded, peak, first_round, *_ = row.split()
    assert name == "ours" and 0 < float(seconds) < float(first_round) and 0 < float(loaded) < float(peak)
    assert row.endswith("3 of 3")


def test_the_time_of_a_token_is_that_beyond_the_prompt():
    load = {"seconds": 1.0, "peak": 150, "before": 50}
    pairs = [
        [{"seconds": a, "processor": a, "peak": 250, "tokens": [7] * n} for a, n in ((p, 1), (t, 5))]
        for p, t in ((90, 99), (2, 9), (3, 4))
    ]
    row = pretrained._row("ours", "float32", load, pairs[0], pairs[1:], 100, [7, 7, 8, 7, 7], 4)
    assert row.split() == "float32 ours 1.0 1.00 2.00 189.0 2.00 ( 2.00) 500 ( 500) 4 of 5".split()
