"""The benchmarks for a GPU and of checkpoints, at tiny sizes on CPU, and the counts of that for a TPU."""

import functools
import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import gpu, pretrained, tpu


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


SCHEDULE = """\
LB: loop body

     0   :  { %s20 = smov 0 }
   0x1   :  { %s21 = smov 0 }
   0x2 LB: > { %s30 = sphi %s20, %s31 }
   0x3   : > { %s31 = sadd.s32 1, %s30  ;;  %33 = sbr.rel (!%p9) target = $region40 }
   0x4 PF: > { %s40 = smov 0 }
   0x5 LB: >> { %s41 = sphi %s40, %s42  ;;  %s42 = sadd.s32 1, %s41 }
   0x6   : >> { %p5 = scmp.ge.s32.totalorder %s42, 7 /* loop exit test */ }
   0x7   :  {}
   0x8   : >> { %44 = sbr.rel (!%p5) target = $region149 }
   0x9   : > { %p6 = scmp.ge.s32.totalorder %s31, 514 /* loop exit test */ }
   0xa   :  { %45 = sbr.rel (!%p6) target = $region160 }
   0xb LB: > { %s51 = sphi %s50, %s52  ;;  %s52 = sadd.s32 1, %s51 }
   0xc   : > { %p7 = scmp.ge.s32.totalorder %s52, 3 /* loop exit test */ }
   0xd   :  { %55 = sbr.rel (!%p7) target = $region170 }
   0xe   :  { %vm1 = vsyncpa [#allocation9], 1 }
"""


def test_the_cycles_of_a_kernel_count_nested_loops():
    assert tpu.kernel_cycles(SCHEDULE) == 3 + 514 * (5 + 7 * 4) + 3 * 3
    for change in (("%s42, 7 /*", "%s42, %s43 /*"), ("(!%p5)", "(%p5)"), ("0x5 LB", "0x5 PF")):
        with pytest.raises(ValueError, match="loops over known numbers of steps"):
            tpu.kernel_cycles(SCHEDULE.replace(*change))


def test_the_cycles_of_a_module_count_calls_of_kernels_in_loops(tmp_path):
    module = """\
%body (x: f32[8]) -> f32[8] {
  %step.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %solve.1 = f32[8]{0} custom-call(%step.1), custom_call_target="InvertDiagBlocksLowerTriangular"
}

%condition (x: f32[8]) -> pred[] {
  %constant.1 = s32[] constant(10)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"6"}
  %while.1 = f32[8]{0} while(%copy.1), condition=%condition, body=%body
  ROOT %end.1 = f32[8]{0} custom-call(%while.1), custom_call_target="tpu_custom_call"
}
"""
    cost = functools.partial(tpu.scheduled_cycles, tmp_path)
    (tmp_path / "17-end.1-72-final_bundles.txt").write_text("   0   :  {}\n")
    with pytest.raises(RuntimeError, match="expected one schedule of step"):
        tpu.cycles(module, cost)
    (tmp_path / "17-step.1-72-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "17-step.1-71-schedule-analysis_final_bundles.txt").write_text(SCHEDULE)
    assert tpu.cycles(module) == 6
    assert tpu.cycles(module, cost) == 10 * tpu.kernel_cycles(SCHEDULE) + 1
