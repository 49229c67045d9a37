"""The package as an installed thing: what importing it costs, how it fails, who imports whom, and the extension's stub."""

import ast
import importlib.util
import inspect
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

import urlfast
from urlfast import _core

PACKAGE = pathlib.Path(urlfast.__file__).parent
CSRC = pathlib.Path(__file__).parents[1] / "csrc"  # of the checkout, wherever the package is
HEAVY = ["torch", "gymnasium", "ale_py", "dm_control", "mujoco", "tyro", "rich", "tensorboard", "matplotlib", "av"]


def python(code, *arguments, **kwargs):
    return subprocess.run([sys.executable, *arguments, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, **kwargs)


def test_knn_reward_on_numpy_needs_numpy_alone():
    done = python(
        f"""
        import sys, numpy as np, urlfast
        reward = urlfast.knn_reward(np.random.default_rng(0).normal(size=(64, 15)).astype(np.float32), 12)
        assert reward.shape == (64,) and reward.dtype == np.float32
        loaded = [name for name in {HEAVY} if name in sys.modules]
        environments = [name for name in sys.modules if name.startswith("urlfast.") and name not in ("urlfast.ops", "urlfast._core")]
        assert not loaded and not environments, (loaded, environments)
        """
    )
    assert done.returncode == 0, done.stderr


def copy_without_extension(folder):
    shutil.copytree(PACKAGE, folder / "urlfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def test_a_missing_extension_says_what_to_do(tmp_path):
    copy_without_extension(tmp_path)
    numpy_home = pathlib.Path(importlib.util.find_spec("numpy").origin).parent
    (tmp_path / "numpy").symlink_to(numpy_home)
    # -S: without site-packages, where an installed extension would be found
    done = python("import urlfast", "-S", cwd="/", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode != 0
    assert "urlfast's native extension could not be loaded" in done.stderr and "pip install" in done.stderr


def test_a_broken_extension_says_what_to_do(tmp_path):
    copy_without_extension(tmp_path)
    name = pathlib.Path(_core.__file__).name
    (tmp_path / "urlfast" / name).write_bytes(b"\x7fELF not really")
    done = python("import urlfast", cwd=tmp_path)
    assert done.returncode != 0
    assert "urlfast's native extension could not be loaded" in done.stderr and "pip install" in done.stderr


def test_the_python_files_of_a_checkout_find_the_installed_extension(tmp_path):
    copy_without_extension(tmp_path)
    done = python(
        "import urlfast, urlfast._core as core; print(urlfast.__file__); print(core.__file__)",
        cwd=tmp_path,
        env={"PYTHONPATH": f"{PACKAGE.parent}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    module, extension = done.stdout.splitlines()
    assert module.startswith(str(tmp_path)) and extension == _core.__file__


# Who may import what (left may import right, nothing else of ours). Modules absent here are commands or leaves.
MAY_IMPORT = {
    "ops": set(),
    "losses": set(),
    "stats": set(),
    "device": set(),
    "limits": set(),
    "augment": {"ops", "limits"},
    "intrinsic": {"nets", "augment", "ops", "device", "limits"},
    "nets": {"losses", "ops", "device", "limits"},
    "envs": {"ops"},
    "learners": {"nets", "losses", "ops", "device", "limits"},
    "methods": {"learners", "intrinsic", "augment", "nets", "losses", "ops", "device", "limits", "envs"},
    "actors": {"methods", "envs", "run"},
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "urlfast":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("urlfast."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_what_lies_below_it(part):
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else sorted((PACKAGE / part).glob("*.py"))
    assert files
    public = {name for name in urlfast.__all__}  # `from urlfast import knn_reward` is ops by its public name
    for path in files:
        foreign = {name for name in imports_of(path)} - MAY_IMPORT[part] - {part, "_core"} - public
        assert not foreign, f"{path.name} imports {foreign}"


def test_pieces_of_the_core_include_common_alone():
    files = [path for path in CSRC.rglob("*") if path.suffix in (".hpp", ".cpp", ".cu", ".cuh")]
    assert files
    for path in files:
        included = re.findall(r'#include [<"]([^">]+)[">]', path.read_text())
        if "bindings" not in path.name:
            assert not [i for i in included if i.startswith("pybind11") or i == "Python.h"], path
            piece = path.parent.name
            foreign = [
                i
                for i in included
                if "/" in i and i.split("/")[0] in ("knn", "normalizer", "replay", "latent") and i.split("/")[0] != piece
            ]
            assert not foreign, (path, foreign)


# The stub -----------------------------------------------------------------------------------------------------------


def stub_names():
    """{qualified name: parameter names, or None for what is no function} as _core.pyi declares them."""
    names = {}
    for node in ast.parse((PACKAGE / "_core.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.setdefault(node.name, parameters(node))
        elif isinstance(node, ast.ClassDef):
            names[node.name] = None
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list)
                    names.setdefault(f"{node.name}.{member.name}", None if is_property else parameters(member))
    return names


def parameters(node):
    named = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    return [a.arg for a in named if a is not None and a.arg != "self"]


def real_names():
    names = {}
    for name, value in vars(_core).items():
        if inspect.isclass(value):
            names[name] = None
            for member, attribute in vars(value).items():
                hidden = member.startswith("__") and member not in ("__init__", "__len__", "__call__", "__dlpack__", "__dlpack_device__")
                if hidden or member.startswith("_pybind11"):
                    continue
                if callable(attribute) or isinstance(attribute, staticmethod):
                    names[f"{name}.{member}"] = documented(getattr(value, member))
                elif isinstance(attribute, property):
                    names[f"{name}.{member}"] = None
        elif inspect.isroutine(value):
            names[name] = documented(value)
    return names


def documented(function):
    """Parameter names from the first line that pybind11 writes: name(self: T, x: int = 3, *, y: object) -> None"""
    signature = re.match(r"\w+\((.*)\)", (function.__doc__ or "").split("\n")[0])
    if signature is None:
        return []
    text, inner = signature[1], 1
    while inner:
        text, inner = re.subn(r"\[[^\[\]]*\]", "", text)  # tuple[str, int] holds no parameter
    return [m for m in re.findall(r"(?:^|, )\*{0,2}(\w+)(?=:|,|$)", text) if m != "self"]


def test_the_stub_is_the_module():
    stub, real = stub_names(), real_names()
    missing = {name for name in real if name not in stub and not name.endswith("__")}
    assert not missing, f"_core.pyi lacks {sorted(missing)}: write it anew with `pybind11-stubgen urlfast._core`"
    extra = {name for name in stub if name not in real and "__" not in name}
    assert not extra, f"_core.pyi declares what is not there: {sorted(extra)}"
    for name in real.keys() & stub.keys():
        assert real[name] == stub[name], name
