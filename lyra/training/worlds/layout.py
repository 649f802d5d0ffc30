"""How is a scene laid out in memory for the ray caster?

This file names the columns of the flat arrays that the numba kernels read, and the tuple that carries them. It does
not know how scenes are made (see ``builder``) or how they are traced and shaded (see ``kernels_trace``,
``kernels_shade``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Every primitive is a unit solid seen through an affine map, so one intersection routine serves all sizes and poses.
BOX, BALL, CONE, GABLE, PYRAMID, ARCH = range(6)

# Columns of the per-primitive material row.
M_TEX, M_METRES, M_R, M_G, M_B, M_SPEC, M_EMIT, M_REFLECT = range(8)
M_CUT, M_CUT_LEVEL, M_CUT_FREQ, M_BUMP, M_BEVEL, M_STRETCH, M_SHAPE_A, M_SHAPE_B = range(8, 16)
M_HX, M_HY, M_HZ, M_SEED = range(16, 20)
MATERIAL_COLUMNS = 20

CUT_NONE, CUT_NOISE, CUT_BARS, CUT_GRID = range(4)

# Columns of the ground row.
G_MODE, G_LEVEL, G_CELL, G_TOP, G_TEX_A, G_TEX_B, G_METRES_A, G_METRES_B = range(8)
G_RA, G_GA, G_BA, G_RB, G_GB, G_BB, G_MIX, G_REFLECT, G_BUMP, G_SEED = range(8, 18)
GROUND_COLUMNS = 18
GROUND_NONE, GROUND_FLAT, GROUND_FIELD = range(3)

# Columns of the light and air row; directions point from the scene towards the sun, colours are linear.
S_SUN_X, S_SUN_Y, S_SUN_Z, S_SUN_R, S_SUN_G, S_SUN_B, S_SUN_SOFT = range(7)
S_UP_R, S_UP_G, S_UP_B, S_DOWN_R, S_DOWN_G, S_DOWN_B = range(7, 13)
S_ZENITH_R, S_ZENITH_G, S_ZENITH_B, S_HORIZON_R, S_HORIZON_G, S_HORIZON_B = range(13, 19)
S_CLOUD, S_CLOUD_R, S_CLOUD_G, S_CLOUD_B, S_CLOUD_FREQ, S_FOG, S_AO, S_AO_RANGE, S_EXPOSURE, S_STARS, S_SEED = range(
    19, 30
)
SKY_COLUMNS = 30

# Columns of a point light: position, linear colour at one metre, radius of the bulb in metres.
LIGHT_COLUMNS = 7

TEXTURE_SIZE = 128
MIP_LEVELS = 6  # 128, 64, 32, 16, 8, 4
MIP_OFFSETS = tuple(int(sum((TEXTURE_SIZE >> k) ** 2 for k in range(level))) for level in range(MIP_LEVELS))
TEXELS = int(sum((TEXTURE_SIZE >> k) ** 2 for k in range(MIP_LEVELS)))

GROUND_ID = -1
NOTHING_ID = -2
MAX_DEPTH = 200.0
SKY_DEPTH = 1000.0


class SceneArrays(NamedTuple):
    """All arrays of one scene; primitives are stored in the order of the leaves of the hierarchy."""

    kind: np.ndarray  # (n,) int32
    to_local: np.ndarray  # (n, 12) float64, rows of the 3x4 map from the world to the unit solid
    material: np.ndarray  # (n, MATERIAL_COLUMNS) float64
    node_box: np.ndarray  # (m, 6) float64, lower then upper corner
    node_first: np.ndarray  # (m,) int32, first primitive of a leaf or first of two adjacent children
    node_count: np.ndarray  # (m,) int32, number of primitives, 0 for inner nodes
    ground: np.ndarray  # (GROUND_COLUMNS,) float64
    height: np.ndarray  # (a, a) float32, metres upwards on a square grid centred on the origin
    blend: np.ndarray  # (a, a) float32, share of the second ground texture
    lights: np.ndarray  # (l, LIGHT_COLUMNS) float64
    sky: np.ndarray  # (SKY_COLUMNS,) float64
    texels: np.ndarray  # (t, TEXELS, 3) uint8, all mip levels of a texture one after the other
