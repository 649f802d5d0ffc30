"""Procedural worlds: pictures with exact depth and camera poses, all from one integer seed.

Answers where training data comes from; it knows nothing about the networks that learn from it.
"""

from lyra.training.worlds.layout import MAX_DEPTH, SKY_DEPTH
from lyra.training.worlds.world import FAMILIES, HELD_OUT_FAMILIES, RenderedView, World, build_world

__all__ = ["FAMILIES", "HELD_OUT_FAMILIES", "MAX_DEPTH", "SKY_DEPTH", "RenderedView", "World", "build_world"]
