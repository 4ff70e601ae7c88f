"""Every Python snippet of the README runs as it stands, by itself.

The one that loads a run is in test_language_modeling.py, which has a run.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_has_snippets():
    assert len(SNIPPETS) >= 6


def name(snippet):
    return snippet.strip().splitlines()[-1][:40]


@pytest.mark.slow
@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if "runs/" not in snippet], ids=name)
def test_a_snippet_runs_as_it_stands(snippet, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)  # where it may write
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
