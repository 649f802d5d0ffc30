""".splat files are unpacked by hand, as browser viewers do, and read back."""

import struct
from itertools import pairwise

import pytest
import torch

from lyra.errors import UserError
from lyra.export.splat import read_splat, write_splat
from lyra.types import GaussianScene
from tests.export.test_formats import random_scene


def unpacked(data: bytes) -> list[dict[str, list[float]]]:
    """The 32 bytes of each Gaussian: position, deviations, RGBA and the quaternion wxyz."""
    result = []
    for first in range(0, len(data), 32):
        record = data[first : first + 32]
        result.append(
            {
                "mean": list(struct.unpack_from("<3f", record, 0)),
                "scale": list(struct.unpack_from("<3f", record, 12)),
                "rgba": [value / 255 for value in record[24:28]],
                "quat": [(value - 128) / 128 for value in record[28:32]],
            }
        )
    return result


def test_a_record_holds_what_viewers_expect(tmp_path):
    scene = GaussianScene(
        means=torch.tensor([[1.0, -2.0, 3.5]]),
        quats=torch.tensor([[0.5, -0.5, 0.5, 0.5]]),
        scales=torch.tensor([[0.01, 0.2, 3.0]]),
        opacities=torch.tensor([0.6]),
        sh=(torch.tensor([[[1.0, 0.5, 0.2]]]) - 0.5) / 0.28209479,
    )
    write_splat(tmp_path / "a.splat", scene)
    (record,) = unpacked((tmp_path / "a.splat").read_bytes())
    assert record["mean"] == [1.0, -2.0, 3.5]
    assert record["scale"] == pytest.approx([0.01, 0.2, 3.0])
    assert record["rgba"] == pytest.approx([1.0, 128 / 255, 0.2, 0.6])
    assert record["quat"] == [0.5, -0.5, 0.5, 0.5]


def test_important_gaussians_come_first(tmp_path):
    scene = random_scene(400)
    write_splat(tmp_path / "a.splat", scene)
    importance = [
        record["scale"][0] * record["scale"][1] * record["scale"][2] * record["rgba"][3]
        for record in unpacked((tmp_path / "a.splat").read_bytes())
    ]
    # Opacities in the file are rounded to 1/255, which may swap near equals.
    assert all(a >= b * 0.9 for a, b in pairwise(importance))
    assert importance[0] > 10 * importance[200]


def test_round_trip_loses_only_what_the_bytes_cannot_hold(tmp_path):
    scene = random_scene(300)
    write_splat(tmp_path / "a.splat", scene)
    again = read_splat(tmp_path / "a.splat")
    order = (scene.scales.prod(1) * scene.opacities).argsort(descending=True)
    assert torch.equal(again.means, scene.means[order])
    assert torch.equal(again.scales, scene.scales[order])
    assert (again.opacities - scene.opacities[order]).abs().max() <= 0.5 / 255 + 1e-6
    shown = (0.5 + 0.28209479 * scene.sh[order, 0]).clamp(0, 1)
    assert (0.5 + 0.28209479 * again.sh[:, 0] - shown).abs().max() <= 0.5 / 255 + 1e-6
    # A component of 1 has no byte of its own, hence a whole step and not half of one.
    assert (again.quats - scene.quats[order]).abs().max() < 1.2 / 128


def test_wrong_files_and_empty_scenes_are_refused(tmp_path):
    path = tmp_path / "a.splat"
    scene = random_scene(3)
    with pytest.raises(UserError, match="cannot be read"):
        read_splat(path)
    write_splat(path, scene)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="no multiple of 32"):
        read_splat(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not a whole"):
        read_splat(path)
    empty = GaussianScene(*(getattr(scene, name)[:0] for name in ("means", "quats", "scales", "opacities", "sh")))
    with pytest.raises(UserError, match="no Gaussians"):
        write_splat(path, empty)
