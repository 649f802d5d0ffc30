"""Photos: every kind of file people have becomes upright 8-bit RGB, and every other one gets one clear sentence."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lyra import photo
from lyra.errors import UserError
from lyra.photo import fit_photo, load_photo, output_size


def gradient(width: int = 120, height: int = 80) -> Image.Image:
    """Red grows to the right, green grows downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG from raw rows, for kinds that Pillow does not write and for headers that lie."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def assert_like_gradient(image: Image.Image, tolerance: int) -> None:
    assert (image.mode, image.size) == ("RGB", (120, 80))
    assert np.abs(pixels(image) - pixels(gradient())).mean() <= tolerance


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 1),
        ("JPEG", {"quality": 95}, 3),
        ("JPEG", {"quality": 95, "progressive": True}, 3),
        ("GIF", {}, 12),
    ],
)
def test_common_formats_are_read_from_bytes_and_from_files(
    tmp_path: Path, kind: str, options: dict[str, Any], tolerance: int
) -> None:
    data = encoded(gradient(), kind, **options)
    assert_like_gradient(load_photo(data), tolerance)
    # The name need not tell the format.
    (tmp_path / "photo.dat").write_bytes(data)
    assert_like_gradient(load_photo(tmp_path / "photo.dat"), tolerance)
    assert_like_gradient(load_photo(str(tmp_path / "photo.dat")), tolerance)


def test_sixteen_bit_grey_is_scaled_and_not_cut_off() -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (64, 1))
    image = load_photo(encoded(Image.fromarray(ramp)))
    assert image.mode == "RGB"
    assert np.array_equal(pixels(image)[0, :, 1], np.arange(256))


def test_a_dark_sixteen_bit_photo_stays_dark() -> None:
    assert pixels(load_photo(encoded(Image.fromarray(np.full((64, 64), 257 * 20, np.uint16))))).max() == 20


@pytest.mark.parametrize(("colour", "alpha"), [(2, b""), (6, b"\xff\xff")], ids=["RGB", "RGBA"])
def test_sixteen_bit_colour_keeps_its_brightness(colour: int, alpha: bytes) -> None:
    # 51400 is 200 / 255 of the whole range.
    row = b"\0" + (struct.pack(">H", 51400) * 3 + alpha) * 64
    image = load_photo(png(64, 64, 16, colour, row * 64))
    assert np.abs(pixels(image) - 200).max() <= 1


def test_thirty_two_bit_and_floating_point_pictures_are_scaled() -> None:
    wide = np.tile(np.linspace(0, 65535, 64).astype(np.int32), (64, 1))
    assert pixels(load_photo(encoded(Image.fromarray(wide), "TIFF"))).max() == 255
    fractions = np.tile(np.linspace(0, 1, 64).astype(np.float32), (64, 1))
    fractions[0, 0] = np.nan
    assert pixels(load_photo(encoded(Image.fromarray(fractions), "TIFF")))[1, 32, 0] == pytest.approx(130, abs=2)
    assert pixels(load_photo(encoded(Image.fromarray(fractions * 255), "TIFF")))[1, 32, 0] == pytest.approx(130, abs=2)


def test_cmyk_jpegs_keep_their_colours() -> None:
    assert_like_gradient(load_photo(encoded(gradient().convert("CMYK"), "JPEG", quality=95)), 3)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_pictures_become_rgb(mode: str) -> None:
    image = load_photo(encoded(gradient().convert("L").convert(mode)))
    assert image.mode == "RGB"
    assert np.ptp(pixels(image), axis=-1).max() == 0
    assert pixels(image).max() > 150


def test_palette_pictures_become_rgb() -> None:
    assert_like_gradient(load_photo(encoded(gradient().quantize(256))), 12)


def test_transparent_parts_take_the_mean_colour_of_the_visible_ones() -> None:
    image = np.zeros((64, 64, 4), np.uint8)
    image[:, :16] = (200, 100, 0, 255)
    image[:, 16:32] = (100, 100, 200, 255)
    # Half-visible white must count half, and what hides in the transparent part must not count at all.
    image[:, 32:48] = (0, 255, 0, 0)
    loaded = pixels(load_photo(encoded(Image.fromarray(image))))
    assert loaded[0, 40].tolist() == [150, 100, 100]
    assert loaded[0, 0].tolist() == [200, 100, 0]


def test_one_transparent_palette_colour_counts_as_transparent() -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 255, 10, 20, 30])
    image.paste(1, (0, 0, 64, 32))
    loaded = pixels(load_photo(encoded(image, transparency=0)))
    assert loaded.reshape(-1, 3).tolist() == [[10, 20, 30]] * 64 * 64


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    transposes = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = gradient().transpose(transposes[orientation]) if orientation in transposes else gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_like_gradient(load_photo(encoded(stored, "JPEG", quality=95, exif=exif)), 3)


def test_unreadable_exif_is_not_the_end_of_the_photo() -> None:
    data = encoded(gradient(), "JPEG", quality=95, exif=b"Exif\0\0" + b"\x07nonsense" * 5)
    assert_like_gradient(load_photo(data), 3)


def test_place_and_time_do_not_survive() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    image = load_photo(encoded(gradient(), "JPEG", exif=exif, comment=b"at home"))
    assert image.info == {} and len(image.getexif()) == 0
    assert b"at home" not in encoded(image, "JPEG")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_used_and_the_log_says_so(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (80, 64), colour) for colour in ("red", "green", "blue")]
    options: dict[str, Any] = {} if kind == "TIFF" else {"duration": 100}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with caplog.at_level(logging.WARNING, logger="lyra.photo"):
        image = load_photo(data)
    assert np.abs(pixels(image) - [255, 0, 0]).max() <= 2
    assert "more than one picture; only the first one is used" in caplog.text


def test_a_photo_with_an_embedded_preview_gets_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(gradient(), "MPO", save_all=True, append_images=[gradient(60, 40)], quality=95)
    with caplog.at_level(logging.WARNING, logger="lyra.photo"):
        assert_like_gradient(load_photo(data), 3)
    assert caplog.text == ""


def broken(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)), kind)
    return data[: len(data) // 2]


def half_transparent_none() -> bytes:
    return encoded(Image.new("RGBA", (64, 64), (9, 9, 9, 0)))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "The photo is not a picture in a known format; save the photo as JPEG or PNG"),
        (b"hello, this is no picture", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='100' height='100'/>", "not a picture"),
        (encoded(gradient())[:20], "is not a picture|damaged"),
        (broken("PNG"), "damaged or cut short"),
        (broken("JPEG"), "damaged or cut short"),
        (broken("WEBP"), "damaged or cut short|not a picture"),
        (broken("BMP"), "damaged or cut short"),
        (broken("TIFF"), "damaged or cut short|not a picture"),
        (encoded(Image.new("RGB", (1, 1))), "1 x 1 pixels; use a photo with at least 64"),
        (encoded(Image.new("RGB", (63, 200))), "63 x 200 pixels; use"),
        (png(9000, 9000, 8, 2, b""), "9000 x 9000 pixels; scale it down to at most 80 megapixels"),
        (png(60000, 60000, 8, 2, b""), "too many pixels; scale it down"),
        (half_transparent_none(), "wholly transparent; use a photo"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_refused_with_what_to_do(data: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_photo(data)
    text = str(caught.value)
    assert text.endswith(".") and "; " in text and "\n" not in text


def test_eighty_megapixels_are_the_limit_whatever_pillow_would_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UserError, match="60000 x 60000 pixels; scale it down"):
        load_photo(png(60000, 60000, 8, 2, b""))
    monkeypatch.setattr(photo, "MAX_PIXELS", 120 * 80)
    assert_like_gradient(load_photo(encoded(gradient())), 0)


def test_the_file_is_named_and_a_missing_one_or_a_folder_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"^notes\.txt is not a picture"):
        load_photo(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"There is no photo at .*nowhere\.jpg; check"):
        load_photo(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="is a folder; choose"):
        load_photo(tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_read_or_refused_but_never_crash(kind: str, damage: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(gradient(), kind))
    for place, value in damage:
        data[min(int(place * len(data)), len(data) - 1)] = value
    try:
        assert load_photo(bytes(data)).mode == "RGB"
    except UserError as error:
        assert str(error).endswith(".")


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (4000, 3000, (480, 832)),
        (1920, 1080, (480, 832)),
        (3000, 4000, (832, 480)),
        (1000, 1000, (640, 640)),
        (1250, 1000, (640, 640)),
        (800, 1000, (640, 640)),
        (1251, 1000, (480, 832)),
        (799, 1000, (832, 480)),
    ],
)
def test_output_is_landscape_portrait_or_square_as_the_photo_is(
    width: int, height: int, expected: tuple[int, int]
) -> None:
    assert output_size(Image.new("RGB", (width, height))) == expected


def test_fitting_a_photo_of_the_right_size_changes_no_pixel() -> None:
    fitted = fit_photo(gradient(), 80, 120)
    assert fitted.shape == (3, 80, 120) and fitted.dtype == torch.float32
    again = ((fitted + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(again, pixels(gradient()))


def test_fitting_cuts_both_sides_alike_and_keeps_circles_round() -> None:
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255
    assert (fit_photo(Image.fromarray(wide), 100, 100) == 1.0).all()
    tall = fit_photo(Image.fromarray(wide.transpose(1, 0, 2)), 50, 50)
    # The antialiasing filter looks over the edge of the cut by two pixels.
    assert (tall[:, 2:-2] > 0.99).all()


def test_shrinking_averages_fine_detail_instead_of_picking_pixels() -> None:
    checkers = (np.indices((640, 640)).sum(axis=0) % 2 * 255).astype(np.uint8)
    fitted = fit_photo(Image.fromarray(np.stack([checkers] * 3, axis=-1)), 96, 96)
    assert fitted.abs().max() < 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(64, 400), st.integers(64, 400), st.sampled_from([(480, 832), (832, 480), (64, 112), (97, 31)]))
def test_every_size_fits_every_target_in_range(width: int, height: int, target: tuple[int, int]) -> None:
    fitted = fit_photo(gradient(width, height), *target)
    assert fitted.shape == (3, *target)
    assert fitted.min() >= -1 and fitted.max() <= 1
