"""Lyra: one photo in, a world you can walk through out (Lyra 2.0, arXiv 2604.13036).

Public names are loaded when they are first used, so that `import lyra` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "LyraPipeline": "lyra.pipeline",
    "GenerateJob": "lyra.config",
    "ReconstructJob": "lyra.config",
    "MeshJob": "lyra.config",
    "World": "lyra.world",
    "Cameras": "lyra.types",
    "DepthMap": "lyra.types",
    "GaussianScene": "lyra.types",
    "TriangleMesh": "lyra.types",
    "UserError": "lyra.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lyra' has no attribute '{name}'")
