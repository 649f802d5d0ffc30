"""The layers of the library, checked on its source."""

import ast
import json
import subprocess
import sys

from tests.conftest import ROOT

LAYERS = [
    {"errors", "progress", "config"},
    {"types", "geometry"},
    {"depth", "trajectory", "models", "diffusion", "photo"},
    {"memory"},
    {"export", "metrics"},
    {"generation"},
    {"reconstruction"},
    {"device", "licences", "hub", "hub_files", "placement", "offload", "loading", "convert", "world", "doctor"},
    {"lifting", "exporting", "reconstructors", "record"},
    {"pipeline"},
    {"serving"},
    {"cli", "ui"},
]
"""What a module may import: its own layer and those before it."""


def imports_of(path) -> set[str]:
    """Top-level parts of lyra that a file imports outside functions."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lyra."):
            found.add(node.module.split(".")[1])
    return found


def test_imports_point_one_way():
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    wrong = []
    for path in sorted((ROOT / "lyra").rglob("*.py")):
        part = path.relative_to(ROOT / "lyra").parts[0].removesuffix(".py")
        if part not in level:
            continue
        wrong += [f"{path.name} imports {name}" for name in imports_of(path) if level.get(name, 99) > level[part]]
    assert not wrong


def test_only_the_user_interface_knows_gradio_and_nothing_imports_training():
    for path in (ROOT / "lyra").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        part = path.relative_to(ROOT / "lyra").parts[0]
        assert part == "ui" or "import gradio" not in text, path
        assert part == "training" or "lyra.training" not in text, path


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, lyra, json; print(json.dumps([m for m in ('torch', 'diffusers', 'gradio') if m in sys.modules]))"
    )
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) == []


def test_no_shipped_file_is_too_large_for_a_space():
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT).decode().split("\0")
    large = [name for name in tracked if name and (ROOT / name).exists() and (ROOT / name).stat().st_size > 9.5e6]
    assert not large
