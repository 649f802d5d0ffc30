"""Nothing that the program does needs a package that only the tests install."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions

import torch
from packaging.requirements import Requirement

from lyra.export.video import write_video
from lyra.types import Cameras
from lyra.world import World
from tests.conftest import ROOT

OPTIONAL = {
    "bitsandbytes": "4-bit weights on CUDA",
    "gsplat": "renders splats on CUDA",
    "skimage": "photos that training pans over",
    "spaces": "ZeroGPU of a Hugging Face Space",
}
"""Packages that are used only where they are, and what for."""
PACKAGING = ("pip", "setuptools", "_distutils_hack")


def required() -> set[str]:
    """Distributions that requirements.txt installs, with all that they need themselves."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    left = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found: set[str] = set()
    while left:
        requirement = left.pop()
        name = normalized(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        left += [Requirement(text) for text in needs]
    return found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needless() -> list[str]:
    """Modules that only requirements-dev.txt brings."""
    wanted = required()
    return sorted(
        module
        for module, names in packages_distributions().items()
        if not any(normalized(name) in wanted for name in names)
        and module not in ("pip", "setuptools", "_distutils_hack")
    )


def test_every_import_is_of_a_package_that_requirements_txt_names_or_brings():
    hidden, wrong = set(needless()), []
    for path in [*(ROOT / "lyra").rglob("*.py"), ROOT / "app.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            wrong += [
                f"{path.name}: {n}" for n in names if n.split(".")[0] in hidden and n.split(".")[0] not in OPTIONAL
            ]
    assert not wrong
    assert {"pytest", "playwright", "skimage"} <= hidden


def test_stage_two_runs_where_only_requirements_txt_is_installed(tmp_path):
    world = World(tmp_path)
    frames = torch.full((9, 3, 48, 64), 128, dtype=torch.uint8)
    frames[:, :, ::4] = 60
    w2c = torch.eye(4).repeat(9, 1, 1)
    w2c[:, 0, 3] = -0.05 * torch.arange(9)
    k = torch.tensor([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]]).expand(9, 3, 3)
    write_video(world.video_path, frames)
    world.write_path(Cameras(w2c, k, 48, 64), {i: torch.full((48, 64), 3.0) for i in (0, 4, 8)})
    script = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {set(needless())!r}
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from lyra.cli import main
for words in (["reconstruct"], ["mesh"], ["export"]):
    sys.argv = ["lyra", *words, {str(tmp_path)!r}]
    sys.argv += ["--formats", "spz", "glb", "obj", "colmap"] if words == ["export"] else []
    assert main() == 0
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "numba"), "NUMBA_DISABLE_JIT": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert world.scene_path.exists() and world.mesh_path.exists() and any((tmp_path / "exports").iterdir())
