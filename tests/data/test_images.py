# SPDX-License-Identifier: Apache-2.0
"""Every kind of image file compared with the pixels written to it, and every kind of corrupt file."""

import contextlib
import io
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sola_vision.data import CorruptImage, read_image

# Pillow warns about damaged metadata, which many files here have
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

# asymmetric in both directions and in every channel
COLOURS = np.array(
    [[[250, 10, 20], [30, 240, 60], [0, 0, 0]], [[255, 255, 255], [70, 80, 200], [9, 100, 40]]], np.uint8
)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_read_image_rgb_png_is_exact_from_path_text_and_stream(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(COLOURS).save(file)
    assert np.array_equal(pixels(file), COLOURS)
    assert np.array_equal(np.asarray(read_image(str(file))), COLOURS)
    assert np.array_equal(np.asarray(read_image(io.BytesIO(file.read_bytes()))), COLOURS)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tif", "webp", "pgm"])
def test_read_image_greyscale_repeats_the_channel(tmp_path, suffix):
    grey = np.full((16, 16), 77, np.uint8)
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).save(file)
    assert np.abs(pixels(file).astype(int) - 77).max() <= 1


def test_read_image_one_bit_is_black_and_white(tmp_path):
    bits = np.array([[True, False, True], [False, False, True]])
    file = tmp_path / "a.png"
    Image.fromarray(bits).save(file, bits=1)
    assert Image.open(file).mode == "1"
    assert np.array_equal(pixels(file), np.repeat(bits[..., None], 3, 2) * np.uint8(255))


def palette_image() -> Image.Image:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3), "P")
    image.putpalette(COLOURS.reshape(-1).tolist())
    return image


def test_read_image_palette_gives_its_colours_not_its_indices(tmp_path):
    file = tmp_path / "a.png"
    palette_image().save(file)
    assert Image.open(file).mode == "P"
    assert np.array_equal(pixels(file), COLOURS)


def test_read_image_palette_transparency_shows_white(tmp_path):
    file = tmp_path / "a.png"
    # entry 2 (black) half transparent, entry 4 fully
    palette_image().save(file, transparency=bytes([255, 255, 127, 255, 0, 255]))
    expected = COLOURS.astype(int)
    expected[0, 2], expected[1, 1] = 128, 255
    assert np.abs(pixels(file).astype(int) - expected).max() <= 1


def test_read_image_gif_transparent_entry_shows_white(tmp_path):
    file = tmp_path / "a.gif"
    palette_image().save(file, transparency=4)
    assert tuple(pixels(file)[1, 1]) == (255, 255, 255)
    assert tuple(pixels(file)[0, 0]) == tuple(COLOURS[0, 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_read_image_alpha_is_laid_on_white(tmp_path, mode):
    file = tmp_path / "a.png"
    colour = (100, 50, 0) if mode == "RGBA" else (100,)
    data = np.array([[[*colour, 255], [*colour, 0], [*colour, 51]]], np.uint8)
    Image.fromarray(data, mode).save(file)
    got = pixels(file)[0].astype(int)
    seen = np.array(colour if mode == "RGBA" else colour * 3)
    for pixel, alpha in zip(got, (1, 0, 0.2), strict=True):
        assert np.abs(pixel - (seen * alpha + 255 * (1 - alpha))).max() <= 1


def test_read_image_rgb_png_with_a_transparent_colour_shows_white_there(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(COLOURS).save(file, transparency=(70, 80, 200))
    assert tuple(pixels(file)[1, 1]) == (255, 255, 255)
    assert tuple(pixels(file)[1, 2]) == (9, 100, 40)


CMYK = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
CMYK_AS_RGB = np.array([[[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]])


def test_read_image_cmyk_tiff(tmp_path):
    file = tmp_path / "a.tif"
    Image.fromarray(CMYK, "CMYK").save(file)
    assert np.array_equal(pixels(file), CMYK_AS_RGB)


def cmyk_jpeg(file: Path) -> np.ndarray:
    """Write Adobe's inverted CMYK; return the expected colours."""
    Image.fromarray(np.repeat(np.repeat(CMYK, 16, 0), 16, 1), "CMYK").save(file, quality=100)
    assert b"Adobe" in file.read_bytes()
    return np.repeat(np.repeat(CMYK_AS_RGB, 16, 0), 16, 1)


def test_read_image_cmyk_jpeg_with_adobe_inversion(tmp_path):
    file = tmp_path / "a.jpg"
    expected = cmyk_jpeg(file)
    assert np.abs(pixels(file).astype(int) - expected).max() <= 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_read_image_cmyk_jpeg_agrees_with_another_decoder(tmp_path):
    decode_jpeg = getattr(pytest.importorskip("torchvision.io"), "decode_jpeg", None)
    if decode_jpeg is None:
        pytest.skip("this torchvision decodes no JPEG any more")
    file = tmp_path / "a.jpg"
    cmyk_jpeg(file)
    other = decode_jpeg(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8), mode="RGB")
    assert np.abs(pixels(file).astype(int) - other.permute(1, 2, 0).numpy().astype(int)).max() <= 6


DEEP = np.array([[0, 128, 257, 32768], [65535, 1000, 40000, 65280]], np.uint16)


def png16(values: np.ndarray) -> bytes:
    """A 16-bit greyscale PNG written by hand, so that the test does not depend on the library under test."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_file(values.shape[1], values.shape[0], depth=16, colour=0, data=zlib.compress(rows))


def png_file(width: int, height: int, depth: int, colour: int, data: bytes, transparent: int | None = None) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    extra = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "pgm"])
def test_read_image_sixteen_bits_are_scaled_not_clipped(tmp_path, kind):
    file = tmp_path / f"a.{kind[-3:]}"
    if kind == "png":
        file.write_bytes(png16(DEEP))
    elif kind == "pgm":
        file.write_bytes(b"P5\n4 2\n65535\n" + DEEP.astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP if kind == "tif" else DEEP.astype(">u2")).save(file)
    expected = np.rint(DEEP / 257).astype(int)
    assert np.array_equal(pixels(file), np.repeat(expected[..., None], 3, 2))


def test_read_image_sixteen_bits_with_a_transparent_level_shows_white_there_alone(tmp_path):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.array([[32768, 32769, 0]], np.uint16))
    (tmp_path / "a.png").write_bytes(png_file(3, 1, 16, 0, zlib.compress(rows), transparent=32768))
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize(
    ("values", "reason"), [(np.float32([[0.5, 2]]), "floating"), (np.int32([[-5, 9]]), "0..65535")]
)
def test_read_image_refuses_pixels_without_an_agreed_range(tmp_path, values, reason):
    file = tmp_path / "a.tif"
    Image.fromarray(values).save(file)
    with pytest.raises(CorruptImage, match=reason) as caught:
        read_image(file)
    assert str(file) in str(caught.value)


# EXIF 2.32, tag 0x0112: the side of the image at which the file's first row and column are
SIDES = {
    **{1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left")},
    **{5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")},
}


def as_stored(picture: np.ndarray, orientation: int) -> np.ndarray:
    row, column = SIDES[orientation]
    stored = picture if row in ("top", "bottom") else picture.swapaxes(0, 1)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    return np.ascontiguousarray(stored[:, ::-1] if column in ("bottom", "right") else stored)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
@pytest.mark.parametrize("orientation", SIDES)
def test_read_image_turns_exif_orientations_upright(tmp_path, orientation, suffix):
    picture = np.repeat(np.repeat(COLOURS, 16, 0), 16, 1)
    file = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(as_stored(picture, orientation)).save(file, exif=exif, **lossless)
    image = read_image(file)
    assert np.abs(np.asarray(image).astype(int) - picture).max() <= (12 if suffix == "jpg" else 0)
    # and reading the tag again does not rotate the image twice
    assert image.getexif().get(0x0112) is None


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12", b"Exif\0\0"])
def test_read_image_with_broken_exif_is_read_as_it_lies(tmp_path, exif):
    file = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8), (200, 100, 50)).save(file, exif=exif)
    assert read_image(file).size == (8, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_read_image_truncated_file_is_named_with_the_reason(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"half a picture.{suffix}"
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    for part in (0.03, 0.5, 0.9):
        file.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(CorruptImage) as caught:
            read_image(file)
        check_line(caught.value, file)


def check_line(error: CorruptImage, file: Path) -> None:
    text = str(error)
    assert text.startswith(f"{file}: ")
    assert "\n" not in text
    assert len(text) > len(str(file)) + 10


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am a text\n" * 50, "not an image"),
        (b"\xff\xd8\xff\xe0", "cannot be read|not an image"),
    ],
)
def test_read_image_of_something_else_is_named_with_the_reason(tmp_path, content, reason):
    file = tmp_path / "text.jpg"
    file.write_bytes(content)
    with pytest.raises(CorruptImage, match=reason) as caught:
        read_image(file)
    check_line(caught.value, file)
    with pytest.raises(CorruptImage, match=r"^shard\.tar:cat/1\.jpg: "):
        read_image(io.BytesIO(content), name="shard.tar:cat/1.jpg")


def test_read_image_survives_random_damage_with_no_other_error(tmp_path):
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "gif", "tif", "webp", "bmp", "jp2"):
        file = tmp_path / f"a.{suffix}"
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise).save(file, **({} if suffix in ("gif", "bmp", "jp2") else {"exif": exif}))
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            where = rng.integers(0, min(len(whole), 300), 6)
            damaged[where] = rng.integers(0, 256, 6)
            with contextlib.suppress(CorruptImage):
                assert read_image(io.BytesIO(damaged.tobytes())).mode == "RGB"


def test_read_image_refuses_a_bomb_by_its_header(tmp_path):
    file = tmp_path / "bomb.png"
    file.write_bytes(png_file(100_000, 100_000, depth=8, colour=2, data=zlib.compress(bytes(1000))))
    tracemalloc.start()
    with pytest.raises(CorruptImage, match="10000000000 pixels") as caught:
        read_image(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    check_line(caught.value, file)
    assert peak < 5e6


def test_read_image_missing_file_is_missing_not_corrupt(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.jpg")


def test_read_image_leaves_postscript_closed(tmp_path):
    file = tmp_path / "a.eps"
    Image.new("RGB", (4, 4)).save(file)
    with pytest.raises(CorruptImage, match="known type"):
        read_image(file)


def test_corrupt_image_crosses_processes():
    error = CorruptImage("a.jpg: broken")
    assert str(pickle.loads(pickle.dumps(error))) == "a.jpg: broken"
