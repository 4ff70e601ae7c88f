"""What the programs say when they cannot go on: one line, and which code they end with."""

import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def ended(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ('raise ValueError("T must\\nbe 1")', 2, "error: T must be 1\n"),
        ('open("/nowhere/file")', 2, "error: [Errno 2] No such file or directory: '/nowhere/file'\n"),
        ('open("/dev/full", "w").write("x" * 10**5)', 2, "error: [Errno 28] No space left on device\n"),
        ('raise FloatingPointError("loss is nan")', 2, "error: loss is nan\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 1, "interrupted; the same command goes on from the last checkpoint\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", 1, "interrupted; the same command goes on from the last checkpoint\n"),
        ('raise KeyboardInterrupt("stopped after step 3")', 1, "stopped after step 3\n"),
        ("pass", 0, ""),
    ],
)
def test_a_program_ends_with_one_line(body, code, words):
    # A shell's "&" has SIGINT ignored, and what is ignored is inherited.
    program = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += f"from experiments.run import command_line\nwith command_line.one_line():\n {body}"
    process = ended("-c", program)
    assert (process.returncode, process.stderr) == (code, words)


def test_what_is_no_input_keeps_its_traceback():
    process = ended("-c", "from experiments.run import command_line\nwith command_line.one_line():\n {}['key']")
    assert process.returncode == 1 and "KeyError: 'key'" in process.stderr


PROGRAMS = {
    "atlas": ("nothing", "error: no task 'nothing'"),
    "language": ("--preset nothing", "error: --preset must be one of demo"),
    "language.comparison": ("--train no.txt --validation v.txt --test t.txt", "error: v.txt is not there"),
    "retrieval.plot": ("--results nowhere", "error: nowhere has none of quick.csv"),
    "retrieval": ("--sizes 0", "error: --sizes must be at least 1, got 0"),
    "translation": ("--preset nothing", "error: --preset must be one of"),
    "benchmarks.gpu": ("--rows nothing", "invalid choice"),
    "benchmarks.gpu_kernels": ("--cards 1", "invalid choice"),
    "benchmarks.language_models": ("--parts nothing", "invalid choice"),
    "benchmarks.ops": ("--peers nowhere", "error: no folder nowhere"),
    "benchmarks.pretrained": ("--peer nowhere", "--peer must be a Python interpreter"),
    "benchmarks.retrieval": ("--repeats 0", "must be at least 1, got 0"),
    "benchmarks.sliding_window": ("--toolkit nowhere", "error: nowhere is not a clone of"),
    "benchmarks.tpu": ("--chip v9", "chip must be one of"),
    "benchmarks.translation": ("--parts nothing", "invalid choice"),
}


def test_all_programs_are_known():
    """But for the examples of serving, which take no arguments."""
    paths = [path for path in (ROOT / "experiments").rglob("*.py") if "__main__" in path.read_text()]
    paths = [path for path in paths if path.parent.name != "serving"]
    names = [".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts) for path in paths]
    names = [name.removesuffix(".__main__") for name in names]
    assert sorted(names) == sorted(PROGRAMS)
    assert all("with command_line.one_line():" in path.read_text() for path in paths)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "retrieval" else pytest.mark.exhaustive) for name in PROGRAMS]
)
def test_every_program_refuses_bad_input_without_a_traceback(name, tmp_path):
    if name == "benchmarks.sliding_window":
        pytest.importorskip("torch", reason="pip install torch")
    arguments, words = PROGRAMS[name]
    process = ended("-m", f"experiments.{name}", *arguments.split())
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr
    assert words in process.stderr + process.stdout


@pytest.mark.exhaustive
def test_sigterm_before_training_ends_with_a_word(tmp_path):
    command = [sys.executable, "-m", "experiments.language", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "parameters" in process.stdout.readline()  # before the first step, which takes seconds to compile
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate()
    line = [line for line in printed.replace("\r", "\n").splitlines() if line.strip()][-1]
    assert process.returncode == 1 and line in (
        "interrupted; the same command goes on from the last checkpoint",
        "stopped before the first step; the same command goes on from there",
    )
