"""What no module of tune/ may contain, read from its source: ways of running what a file holds."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "tune").rglob("*.py"))

NEVER_IMPORTED = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "runpy",
    "kernels",
}
NEVER_CALLED = {
    *("eval", "exec", "compile", "__import__", "execfile"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "numpy.load", "load_module"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *(
        "pandas.read_pickle",
        "os.system",
        "os.popen",
        "importlib.import_module",
        "importlib.util.spec_from_file_location",
    ),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "get_class_from_dynamic_module", "get_kernel"),
}
"""By the full name, as far as imports tell it; a name without a dot is a builtin's, or any method's."""

EXCEPTIONS = {
    ("tune/data/store.py", "numpy.load"): "the cache of encoded rows; the call refuses pickled objects",
}
"""What stands in a module all the same, and why it reads nothing of a file's; each is looked at below."""


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def names_in(tree: ast.Module) -> dict[str, str]:
    """What each name that an import binds stands for, wherever in the module the import is."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else (alias.name.partition(".")[0])
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return bound


def full_name(node: ast.expr, bound: dict[str, str]) -> str:
    """The dotted name that an expression reads, with imports resolved; what is no name becomes nothing."""
    if isinstance(node, ast.Name):
        return bound.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, bound)}.{node.attr}"
    return ""


@functools.cache
def calls_in(tree: ast.Module) -> list[tuple[ast.Call, str]]:
    """The calls of a module, each with the full name of what is called."""
    bound = names_in(tree)
    return [(node, full_name(node.func, bound)) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def forbidden_in(tree: ast.Module) -> list[str]:
    """What a module contains of the above, with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno} import {name}" for name in modules if name.partition(".")[0] in NEVER_IMPORTED]
    bound = names_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = full_name(node, bound)  # also where it is handed on, and not called
            if name in NEVER_CALLED or (name.startswith(("torch.load", "importlib.import_module"))):
                found.append(f"{node.lineno} {name}")
    for call, name in calls_in(tree):
        for keyword in call.keywords:
            wrong = keyword.arg == "shell" or (keyword.arg == "weights_only")
            if wrong or (keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) is not False):
                found.append(f"{call.lineno} {name}({keyword.arg}=)")
    return found


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import pickle",
            "from dill import loads",
            "import torch\ntorch.load('x')",
            "from torch import load\nload('x')",
        ),
        *("import numpy as np\nnp.load('x')", "import yaml\nyaml.load('x', yaml.Loader)", "eval('1')", "exec('1')"),
        *("import importlib\nimportlib.import_module(name)", "from importlib import import_module as i\ni(name)"),
        *("__import__(name)", "import subprocess\nsubprocess.run('x', shell=True)", "import os\nos.system('x')"),
        *("import numpy as np\nnp.save(path, a, allow_pickle=True)", "read = eval", "import kernels"),
    ],
)
def test_the_search_finds_each(line: str) -> None:
    assert forbidden_in(ast.parse(line))


def test_no_module_can_run_what_a_file_holds() -> None:
    assert len(MODULES) > 100
    found = []
    for path in MODULES:
        place = path.relative_to(ROOT).as_posix()
        found += [
            f"{place}:{what}"
            for what in forbidden_in(tree_of(path))
            if (place, what.partition(" ")[2]) not in EXCEPTIONS
        ]
    assert not found


def test_each_exception_is_still_there() -> None:
    for place, what in EXCEPTIONS:
        assert what in [found.partition(" ")[2] for found in forbidden_in(tree_of(ROOT / place))], (place, what)


def test_the_cache_is_read_without_pickles() -> None:
    for call, name in calls_in(tree_of(ROOT / "tune/data/store.py")):
        if name == "numpy.load":
            said = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
            assert said.get("allow_pickle") is False


def test_yaml_is_read_by_a_safe_loader() -> None:
    loaders = []
    for path in MODULES:
        for call, name in calls_in(tree_of(path)):
            if name.startswith("yaml.") and name.rpartition(".")[2] in ("compose", "compose_all", "scan", "parse"):
                loaders += [keyword.value for keyword in call.keywords if keyword.arg == "Loader"] or [None]
    assert [getattr(loader, "id", None) for loader in loaders] == ["_TextLoader"]

    from yaml import SafeLoader

    from tune.recipe.read import _TextLoader

    assert issubclass(_TextLoader, SafeLoader)


def calls_of_auto_classes() -> Iterator[tuple[str, ast.Call, str]]:
    for path in MODULES:
        for call, name in calls_in(tree_of(path)):
            owner, _, method = name.rpartition(".")
            if method in ("from_pretrained", "from_config") and owner.startswith("transformers.Auto"):
                yield f"{path.relative_to(ROOT)}:{call.lineno}", call, name


def test_transformers_is_told_each_time_whether_code_may_run() -> None:
    """Left open, it asks on the terminal; a literal True is nobody's decision."""
    found = list(calls_of_auto_classes())
    assert len(found) >= 6
    for place, call, _ in found:
        said = [keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        assert len(said) == 1, f"{place}: does not say trust_remote_code"
        assert getattr(said[0], "value", None) not in (True, None) or not isinstance(said[0], ast.Constant), place


def test_weights_are_asked_for_as_safetensors() -> None:
    for place, call, name in calls_of_auto_classes():
        if name == "transformers.AutoModelForCausalLM.from_pretrained":
            said = [keyword.value for keyword in call.keywords if keyword.arg == "use_safetensors"]
            assert [getattr(value, "value", None) for value in said] == [True], place


def test_nothing_but_a_recipe_says_that_code_may_run() -> None:
    """No variable of the environment and no file but the recipe: the key is read of its `model`, and passed on."""
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
                assert "TRUST" not in node.value, f"{path}:{node.lineno}"
        if path.name != "loading.py":  # code to copy, in a card
            for call, name in calls_in(tree_of(path)):
                for keyword in call.keywords:
                    literal = isinstance(keyword.value, ast.Constant) and keyword.value.value is not False
                    assert keyword.arg != "trust_remote_code" or not literal, f"{path}:{call.lineno} {name}"
