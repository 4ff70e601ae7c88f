"""The order of the files: imports go one way."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "fwt_jax").rglob("*.py"))
ORDER = [
    ("arguments", "triangular", "decays", "precision", "segments"),
    ("feature_maps", "memory", "sharding"),
    ("heads", "clipped"),
    ("recurrent",),
    ("rules",),
    ("chunkwise", "attention_weights"),
    ("pieces",),
    ("normalization", "attention_arguments"),
    ("kernels",),
    ("attention", "cross_attention"),
    ("layers",),
    ("models",),
    ("decode", "convert"),
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imported_modules(path):
    """Dotted names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relative to itself; write fwt_jax.{node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_rank(path):
    name = path.relative_to(ROOT / "fwt_jax").parts[0].removesuffix(".py")
    return len(ORDER) if name == "__init__" else RANK[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_imports_only_from_files_before_it(path):
    for module in imported_modules(path):
        package, *names = module.split(".")
        assert package not in ("experiments", "tests"), f"{path.name} imports {module}"
        if package == "fwt_jax":
            assert names, f"{path.name} imports the package as a whole"
            same_folder = names[0] in path.relative_to(ROOT / "fwt_jax").parts[:-1]  # kernels and layers
            assert same_folder or RANK[names[0]] < file_rank(path), f"{path.name} imports {module}"


def test_the_package_itself_is_nothing_but_the_public_names():
    tree = ast.parse((ROOT / "fwt_jax" / "__init__.py").read_text(encoding="utf-8"))
    docstring, *body = tree.body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in body)
    names = [alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assigned = {node.targets[0].id: ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign)}
    public = assigned.pop("__all__")
    assert list(assigned) == ["__version__"]
    assert sorted(public) == sorted(names)
