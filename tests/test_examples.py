"""The programs in experiments/serving/ run, and what they check holds."""

import pathlib
import runpy

import pytest

PROGRAMS = sorted((pathlib.Path(__file__).parent.parent / "experiments" / "serving").glob("[a-z]*.py"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_runs_and_its_assertions_hold(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
