"""Every kind of file that is a photo, and every kind that is not."""

import gc
import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from captioner import images
from captioner.errors import ImageError

RED, GREEN, BLUE, WHITE = (200, 30, 40), (40, 190, 50), (30, 60, 210), (255, 255, 255)


def quarters(size=64):
    """Red and green above, blue and white below: every turn and mirror image of it looks different."""
    image = Image.new("RGB", (size, size))
    half = size // 2
    for colour, x, y in ((RED, 0, 0), (GREEN, half, 0), (BLUE, 0, half), (WHITE, half, half)):
        image.paste(colour, (x, y, x + half, y + half))
    return image


def corners(pixels):
    """The colours of the four quarters: above left, above right, below left, below right."""
    size = pixels.shape[1]
    near, far = size // 4, size - 1 - size // 4
    return [tuple(pixels[:, y, x].tolist()) for y, x in ((near, near), (near, far), (far, near), (far, far))]


def close(found, expected, tolerance):
    return np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= tolerance


def saved(image, path, **options):
    image.save(path, **options)
    return path


def only_colour(pixels):
    """The colour of a photo that has one."""
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(pixels[:, 0, 0].tolist())


def png(width, height, depth, kind, rows):
    """A PNG by hand, for what Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_16_bit_rgb(colour):
    """A TIFF of 4 x 4 pixels with 16 bits a channel by hand, for Pillow does not write it."""
    data = struct.pack("<3H", *colour) * 16
    after = 8 + 2 + 12 * 9 + 4  # header, directory
    tags = [
        (256, 3, 1, 4),  # width
        (257, 3, 1, 4),  # height
        (258, 3, 3, after),  # bits a channel
        (259, 3, 1, 1),  # no compression
        (262, 3, 1, 2),  # RGB
        (273, 4, 1, after + 6),  # where the pixels are
        (277, 3, 1, 3),  # channels
        (278, 3, 1, 4),  # rows a strip
        (279, 4, 1, len(data)),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<3H", 16, 16, 16) + data


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.jpg", {"quality": 95, "subsampling": 0}, 6),
        ("a.jpeg", {"quality": 95, "subsampling": 0, "progressive": True}, 6),
        ("a.png", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("a.webp", {"quality": 90}, 12),
        ("a.bmp", {}, 0),
        ("a.tif", {}, 0),
        ("a.tiff", {"compression": "tiff_lzw"}, 0),
        ("a.gif", {}, 0),
    ],
)
def test_formats(tmp_path, name, options, tolerance):
    pixels = images.load(saved(quarters(), tmp_path / name, **options), 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert close(corners(pixels), [RED, GREEN, BLUE, WHITE], tolerance)


def test_the_ending_of_the_name_does_not_matter(tmp_path):
    path = saved(quarters(), tmp_path / "photo.jpg", format="PNG")
    assert corners(images.load(path, 32)) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert only_colour(images.load(path, 16)) == RED


def palette_with_transparency():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([*RED, *GREEN])
    return image


@pytest.mark.parametrize(
    ("image", "name", "options", "expected"),
    [
        (Image.new("L", (20, 20), 77), "a.png", {}, (77, 77, 77)),
        (Image.new("L", (20, 20), 77), "a.jpg", {}, (77, 77, 77)),
        (Image.new("RGB", (20, 20), RED).quantize(4), "a.png", {}, RED),
        (Image.new("1", (20, 20), 1), "a.png", {}, (255, 255, 255)),
        (Image.new("1", (20, 20), 0), "a.tif", {}, (0, 0, 0)),
        # Transparent is white, half transparent is half as strong on white.
        (Image.new("RGBA", (20, 20), (*RED, 0)), "a.png", {}, WHITE),
        (Image.new("RGBA", (20, 20), (*RED, 255)), "a.png", {}, RED),
        (Image.new("RGBA", (20, 20), (0, 0, 0, 51)), "a.png", {}, (204, 204, 204)),
        (Image.new("RGBA", (20, 20), (0, 0, 0, 51)), "a.webp", {"lossless": True}, (204, 204, 204)),
        (Image.new("LA", (20, 20), (100, 0)), "a.png", {}, WHITE),
        (Image.new("LA", (20, 20), (0, 51)), "a.png", {}, (204, 204, 204)),
        (palette_with_transparency(), "a.png", {"transparency": 1}, WHITE),
        (palette_with_transparency(), "a.png", {"transparency": 0}, GREEN),
        (palette_with_transparency(), "a.png", {"transparency": bytes([255, 0])}, WHITE),
        (palette_with_transparency(), "a.gif", {"transparency": 1}, WHITE),
        (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "a.tif", {}, (255, 0, 0)),
        (Image.new("CMYK", (20, 20), (0, 0, 0, 255)), "a.jpg", {}, (0, 0, 0)),
        # 16 bits and floats: brightness is scaled, where clipping would make both white.
        (Image.fromarray(np.full((20, 20), 100 * 257, np.uint16)), "a.png", {}, (100, 100, 100)),
        (Image.fromarray(np.full((20, 20), 100 * 257, np.uint16)), "a.tif", {}, (100, 100, 100)),
        (Image.fromarray(np.full((20, 20), 65535, np.uint16)), "a.png", {}, (255, 255, 255)),
        (Image.fromarray(np.full((20, 20), 100 * 257, np.int32)), "a.tif", {}, (100, 100, 100)),
        (Image.fromarray(np.full((20, 20), 0.2, np.float32)), "a.tif", {}, (51, 51, 51)),
        (Image.fromarray(np.full((20, 20), 51.0, np.float32)), "a.tif", {}, (51, 51, 51)),
        (Image.fromarray(np.full((20, 20), np.nan, np.float32)), "a.tif", {}, (0, 0, 0)),
    ],
)
def test_modes(tmp_path, image, name, options, expected):
    path = saved(image, tmp_path / name, **options)
    found = only_colour(images.load(path, 16))
    assert close(found, expected, 2 if name.endswith("jpg") else 1)


def test_16_bits_keep_their_shades(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (256, 1))
    pixels = images.load(saved(Image.fromarray(ramp), tmp_path / "ramp.png"), 256)
    assert close(pixels[0, 0], np.arange(256), 1)
    big_endian = Image.frombytes("I;16B", (256, 256), ramp.astype(">u2").tobytes())
    assert np.array_equal(images.load(saved(big_endian, tmp_path / "ramp.tif"), 256), pixels)


def test_16_bits_a_channel(tmp_path):
    path = tmp_path / "deep.png"
    path.write_bytes(png(4, 4, 16, 2, (b"\0" + struct.pack(">3H", 51400, 25700, 0) * 4) * 4))
    assert only_colour(images.load(path, 4)) == (200, 100, 0)
    path.write_bytes(png(4, 4, 16, 6, (b"\0" + struct.pack(">4H", 51400, 25700, 0, 0) * 4) * 4))
    assert only_colour(images.load(path, 4)) == WHITE
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff_16_bit_rgb((51400, 25700, 0)))
    assert only_colour(images.load(path, 4)) == (200, 100, 0)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    # What the camera stored is turned and mirrored as EXIF defines it.
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
    ],
)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_orientation(tmp_path, orientation, expected, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"a.jpg": {"quality": 95, "subsampling": 0}, "a.webp": {"lossless": True}}.get(name, {})
    path = saved(quarters(256), tmp_path / name, exif=exif, **options)
    assert close(corners(images.load(path, 32)), expected, 6)  # 256 -> 32: a JPEG goes through draft


def test_orientation_is_applied_before_the_photo_is_squeezed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (80, 20), RED)
    wide.paste(BLUE, (40, 0, 80, 20))
    pixels = images.load(saved(wide, tmp_path / "wide.png", exif=exif), 16)
    assert corners(pixels) == [RED, RED, BLUE, BLUE]  # upright: the left half is now the upper one


def scene(width, height):
    """A smooth photo-like picture with an edge or two."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    channels = [np.sin(9 * x + 2 * y), np.cos(7 * y - 3 * x), np.sin(5 * x * y + 1)]
    picture = np.stack(channels, -1) * 90 + 128
    picture[height // 3 : height // 2, width // 4 : width // 2] = 240
    return Image.fromarray(picture.astype(np.uint8))


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path, monkeypatch):
    path = saved(scene(1600, 1200), tmp_path / "large.jpg", quality=95)
    fast = images.load(path, 224).astype(int)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda image, mode, size: None)
    whole = images.load(path, 224).astype(int)
    assert not np.array_equal(fast, whole)  # it did take the other way
    assert np.abs(fast - whole).mean() < 1.0
    assert np.quantile(np.abs(fast - whole), 0.99) <= 8


def test_a_small_photo_is_not_cut_or_padded(tmp_path):
    pixels = images.load(saved(quarters(6), tmp_path / "small.png"), 64)
    assert corners(pixels) == [RED, GREEN, BLUE, WHITE]
    pixels = images.load(saved(Image.new("RGB", (1, 5000), RED), tmp_path / "thin.png"), 16)
    assert only_colour(pixels) == RED


def test_resizing_averages_what_it_shrinks(tmp_path):
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    pixels = images.load(saved(board, tmp_path / "board.png"), 16)
    assert close(pixels, 128, 3)  # without antialiasing, squares of it would be black or white


def test_images_in_memory(tmp_path):
    image = quarters()
    path = saved(image, tmp_path / "a.png")
    assert np.array_equal(images.load(image, 32), images.load(path, 32))
    assert np.array_equal(images.load(str(path), 32), images.load(path, 32))
    transparent = Image.new("RGBA", (9, 9), (*RED, 0))
    assert only_colour(images.load(transparent, 8)) == WHITE
    assert transparent.mode == "RGBA"  # what the caller gave stays as it is
    cut = tmp_path / "cut.png"
    cut.write_bytes(path.read_bytes()[:80])
    with pytest.raises(ImageError, match=r"^image in memory: cannot be decoded"):
        images.load(Image.open(cut), 32)


def noise(path, **options):
    """A file with enough bytes that half of it is not all."""
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return saved(Image.fromarray(values), path, **options)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_truncated_files(tmp_path, name, share):
    path = noise(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=rf"^{path}: (cannot be decoded \(.+\); the file is damaged|not a photo)"):
        images.load(path, 32)


@pytest.mark.parametrize("content", [b"", b"hello", b"%PDF-1.7\n", b"\xff\xd8\xff", b"GIF89a", bytes(5000)])
def test_not_a_photo(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(
        ImageError, match=f"^{path}: not a photo; expected JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC$"
    ):
        images.load(path, 32)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: no such file; give the path of a photo$"):
        images.load(tmp_path / "none.jpg", 32)
    with pytest.raises(ImageError, match=f"^{tmp_path}: is a folder; give the path of a photo$"):
        images.load(tmp_path, 32)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.os, "open", refuse)
    with pytest.raises(ImageError, match=r"a\.jpg: may not be read; change its permissions$"):
        images.load(tmp_path / "a.jpg", 32)


@pytest.mark.parametrize("size", [(14000, 14000), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, 8, 2, bytes(99)))
    with pytest.raises(ImageError, match=r"bomb\.png: has more than 178 million pixels; make it smaller first$"):
        images.load(path, 32)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_a_photo_of_more_than_half_the_limit_is_loaded_without_a_word(tmp_path, name):
    """Pillow warns of 90 million pixels and more; phones make photos of 108 million."""
    path = saved(quarters(64), tmp_path / name)
    code = (
        "import sys; from PIL import Image; from captioner import images; Image.MAX_IMAGE_PIXELS = 64 * 64 // 2 + 1;"
        "images.load(sys.argv[1], 32)"
    )
    assert quiet_run(code, path) == ""


def quiet_run(code, *arguments):
    """What a process prints on standard error."""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return done.stderr


def test_no_width(tmp_path):
    path = tmp_path / "empty.png"
    path.write_bytes(png(0, 7, 8, 2, b""))
    with pytest.raises(ImageError, match=r"empty\.png: "):
        images.load(path, 32)


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), NotImplementedError("a"), struct.error("a"), KeyError("a")])
def test_whatever_a_decoder_raises_is_an_error_of_one_line(tmp_path, monkeypatch, error):
    path = saved(quarters(), tmp_path / "a.png")

    def fail(image, width):
        raise error

    monkeypatch.setattr(images, "_to_rgb", fail)
    with pytest.raises(ImageError, match=r"^[^\n]*cannot be decoded \('?a'?\)[^\n]*$"):
        images.load(path, 32)


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "damaged"
    kinds = [noise(tmp_path / name).read_bytes() for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif")]
    unreadable = 0
    for round_ in range(240):
        data = bytearray(kinds[round_ % len(kinds)])
        for position in random.integers(0, 120, 6):
            data[position] = random.integers(256)
        path.write_bytes(data)
        try:
            assert images.load(path, 16).shape == (3, 16, 16)
        except ImageError as error:
            unreadable += len(str(error).splitlines()) == 1
    assert unreadable > 50


# Sources that are not files


def test_bytes_file_objects_and_arrays_are_photos_too(tmp_path):
    image = quarters()
    path = saved(image, tmp_path / "a.png")
    expected = images.load(path, 32)
    content = path.read_bytes()
    with path.open("rb") as file:
        file.read(7)  # read from its beginning, as Pillow does
        sources = [content, bytearray(content), io.BytesIO(content), file, np.asarray(image), image]
        for source in sources:
            assert np.array_equal(images.load(source, 32), expected)
    assert np.array_equal(images.load(np.asarray(image)[::-1, ::-1], 32), images.load(image.rotate(180), 32))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, r"of a kind that cannot be read \(NoneType\); give a path, bytes, a binary file object, a PIL image"),
        (7, r"\(int\); give a path"),
        (["a.jpg"], r"\(list\); give a path"),
        (np.zeros((4, 4, 3)), r"\(array of float64 and shape \(4, 4, 3\)\); give"),
        (
            np.zeros((3, 4, 5), np.uint8),
            r"\(array of uint8 and shape \(3, 4, 5\)\); give .+ \(height, width, 3\) of uint8$",
        ),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        (np.zeros((0, 0, 3), np.uint8), "has no pixels; give one that has$"),
        (Image.new("RGB", (0, 0)), "has no pixels"),
        (Image.new("RGB", (0, 5)), "has no pixels"),
        (io.StringIO("text"), r"is a file object of text; open the photo with open\(path, 'rb'\)$"),
        (b"", "not a photo; expected JPEG"),
        (b"hello", "not a photo; expected JPEG"),
    ],
)
def test_sources_that_cannot_be_read(source, said):
    with pytest.raises(ImageError, match=r"^image in memory: [^\n]*" + said):
        images.load(source, 32)


# What must not harm


def test_formats_that_nobody_promised_are_not_opened(tmp_path):
    path = saved(quarters(), tmp_path / "photo.jpg", format="EPS")
    with pytest.raises(ImageError, match="not a photo"):
        images.load(path, 32)
    for kind in ("PPM", "TGA", "PCX", "ICO", "PDF", "SGI"):
        path = saved(quarters(), tmp_path / "photo.png", format=kind)
        with pytest.raises(ImageError, match="not a photo"):
            images.load(path, 32)


@pytest.mark.parametrize("name", ["pipe.jpg", "device"])
def test_pipes_and_devices_are_refused_at_once(tmp_path, name):
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    if name == "device":
        path = Path("/dev/zero")
    with pytest.raises(ImageError, match=r"is a pipe or a device; give the path of a photo$"):
        images.load(path, 32)


def test_decoders_do_not_write_on_the_terminal(tmp_path):
    """libtiff writes to standard error by itself, and Pillow warns of half the damaged files."""
    compressed = saved(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)),
        tmp_path / "a.tif",
        compression="tiff_lzw",
    ).read_bytes()
    random = np.random.default_rng(1)
    for number in range(40):
        data = bytearray(compressed)
        for position in random.integers(8, len(data), 30):
            data[position] = random.integers(256)
        (tmp_path / f"{number}.tif").write_bytes(data)
    code = (
        "import sys; from captioner import images; from captioner.errors import ImageError; failed = 0\n"
        "for path in sys.argv[1:]:\n"
        "    try: images.load(path, 32)\n"
        "    except ImageError: failed += 1\n"
        "assert failed > 20, failed"
    )
    assert quiet_run(code, *tmp_path.glob("?*.tif")) == ""


@pytest.mark.parametrize(
    "garbage", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + bytes(range(200))]
)
@pytest.mark.filterwarnings("ignore:::PIL")
def test_garbage_in_exif_does_not_refuse_a_photo(tmp_path, garbage):
    for name in ("a.jpg", "a.png", "a.webp"):
        image = quarters()
        path = saved(image, tmp_path / name, exif=garbage)
        assert close(corners(images.load(path, 32)), [RED, GREEN, BLUE, WHITE], 40)


@pytest.mark.parametrize("lacking", [1, 2, 3, 50, 0.1])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_its_last_bytes_is_read_and_said(tmp_path, caplog, lacking, progressive):
    path = noise(tmp_path / "a.jpg", quality=90, progressive=progressive)
    whole, content = images.load(path, 32), path.read_bytes()
    path.write_bytes(content[: -int(lacking * len(content) if lacking < 1 else lacking)])
    found = images.load(path, 32)
    assert np.abs(found[:, :16].astype(int) - whole[:, :16]).mean() < 30
    assert f"{path}: lacks its last bytes, and is captioned without them" in caplog.text


@pytest.mark.parametrize("size", [(400, 300), (3000, 2000)])
def test_a_large_jpeg_that_breaks_off(tmp_path, size):
    path = saved(scene(*size), tmp_path / "a.jpg", quality=90)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.9)])
    assert images.load(path, 64).shape == (3, 64, 64)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"cannot be decoded \(image file is truncated, \d\d% is lacking\)"):
        images.load(path, 64)


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    path = saved(quarters(), tmp_path / "a.png")

    def fail(image, width):
        raise MemoryError

    monkeypatch.setattr(images, "_to_rgb", fail)
    with pytest.raises(ImageError, match=r"a\.png: needs more memory than there is; make the photo smaller first$"):
        images.load(path, 32)


def test_large_photos_wait_for_each_other(tmp_path, monkeypatch):
    """However many threads decode, pixels in memory are bounded; a photo larger than the bound is decoded alone."""
    monkeypatch.setattr(images, "_FEW_PIXELS", 10)
    monkeypatch.setattr(images, "_PIXELS_AT_ONCE", 2 * 64 * 64)
    path = saved(quarters(64), tmp_path / "a.png")
    larger = saved(quarters(128), tmp_path / "b.png")
    at_once, most, lock, to_array = 0, 0, threading.Lock(), images._to_array

    def count(image, size):
        nonlocal at_once, most
        pixels = image.width * image.height
        with lock:
            at_once += pixels
            most = max(most, at_once)
        time.sleep(0.01)
        with lock:
            at_once -= pixels
        return to_array(image, size)

    monkeypatch.setattr(images, "_to_array", count)
    threads = [threading.Thread(target=images.load, args=(each, 32)) for each in [path, path, larger, path] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 128 * 128


def test_transparency_in_bands_is_as_transparency_at_once(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 256, (50, 40, 4), np.uint8)
    path = saved(Image.fromarray(values), tmp_path / "a.png")
    whole = images.load(path, 32)
    upscaled = images.load(path, 64)
    monkeypatch.setattr(images, "_FEW_PIXELS", 40 * 7)
    assert close(images.load(path, 32), whole, 1)  # Pillow rounds between rows and columns, in the order it likes
    assert close(images.load(path, 64), upscaled, 1)


def test_heic_without_its_library_names_the_command(tmp_path, monkeypatch):
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"a\.heic: is HEIC; to read it, pip install 'captioner\[heic\]'$"):
        images.load(path, 32)


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    pillow_heif.from_pillow(quarters()).save(path, quality=95)
    assert close(corners(images.load(path, 32)), [RED, GREEN, BLUE, WHITE], 20)


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(ImageError("a: b; c")))
    assert (type(error), str(error)) == (ImageError, "a: b; c")


# Folders


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_find(tmp_path, caplog):
    files = [
        tmp_path / name for name in ("b.JPG", "a/z.png", "a/b/c.webp", "c.gif", "d.bmp", "e.tif", "f.tiff", "g.jpeg")
    ]
    touch(tmp_path / "._b.JPG", tmp_path / "a/.hidden.png")
    touch(*files, tmp_path / "notes.txt", tmp_path / "a/clip.mp4", tmp_path / "jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert images.find([tmp_path]) == sorted(files)
    assert caplog.text == ""
    touch(tmp_path / "a/phone.CR2")
    assert images.find([tmp_path]) == sorted(files)
    assert f"in other formats, and left out: 1, e.g. {tmp_path}/a/phone.CR2; convert them to JPEG" in caplog.text
    # Files come in the order given, whatever their names end in; decoding will tell.
    assert images.find([tmp_path / "notes.txt", tmp_path / "a"]) == [
        tmp_path / "notes.txt",
        tmp_path / "a/b/c.webp",
        tmp_path / "a/z.png",
    ]
    assert images.find([]) == []


def test_find_says_what_is_missing(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere: no such file or folder; give the path of a photo or of a folder"):
        images.find([tmp_path / "nowhere"])
    touch(tmp_path / "texts/readme.txt")
    with pytest.raises(ImageError, match=r"texts: no photo in this folder; expected files ending in \.avif, \.bmp, "):
        images.find([tmp_path / "texts"])
    with pytest.raises(ImageError, match=r"x: cannot be looked at \(File name too long\); give a photo or a folder of"):
        images.find([tmp_path / ("x" * 300)])


def test_places_that_cannot_be_looked_at_are_named(tmp_path, caplog, monkeypatch):
    touch(tmp_path / "a.jpg", tmp_path / "closed/b.jpg", tmp_path / "elsewhere/c.jpg")
    album = tmp_path / "album"
    album.mkdir()
    (album / "1.jpg").touch()
    (album / "2").symlink_to(tmp_path / "elsewhere")
    (album / "3.jpg").symlink_to(tmp_path / "gone.jpg")
    (album / "4").symlink_to(tmp_path / "gone")
    (album / "5").symlink_to(album)
    (album / "6.txt").symlink_to(tmp_path / "gone.txt")
    (album / "7.jpg").symlink_to(album / "7.jpg")
    (album / "8").symlink_to(tmp_path / "closed")
    (album / "9.jpg").symlink_to(tmp_path / "a.jpg")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("8"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    photos = [album / "1.jpg", album / "2/c.jpg", album / "9.jpg"]
    walked = list(images.walk(str(album)))
    assert [Path(path) for path, error in walked if error is None] == photos
    lost = {path: str(error) for path, error in walked if error is not None}
    assert list(lost) == [str(album / name) for name in ("3.jpg", "4", "7.jpg", "8")]
    assert (
        "3.jpg: is a link that leads nowhere (No such file or directory); mend or delete it" in lost[f"{album}/3.jpg"]
    )
    assert "8: cannot be searched for photos (Permission denied); change its permissions" in lost[f"{album}/8"]
    assert images.find([album]) == photos
    assert all(message in caplog.text for message in lost.values())


def test_a_folder_is_searched_once_however_many_links_lead_to_it(tmp_path):
    touch(tmp_path / "a/photo.jpg", tmp_path / "c/photo.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "c")
    assert images.find([tmp_path]) == [tmp_path / "a/photo.jpg", tmp_path / "b/photo.jpg"]


def test_a_folder_of_very_many_levels(tmp_path):
    deep = tmp_path
    for _ in range(1500):
        deep = deep / "d"
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1500):
            Path("d").mkdir()
            os.chdir("d")
        Path("photo.jpg").touch()
        assert [path for path, _ in images.walk(str(tmp_path))] == [str(deep / "photo.jpg")]
        Path("photo.jpg").unlink()
        for _ in range(1500):
            os.chdir("..")
            Path("d").rmdir()
    finally:
        os.chdir(here)


def test_walk_can_stay_on_one_level_and_see_hidden_names(tmp_path):
    touch(tmp_path / "a.jpg", tmp_path / ".b.jpg", tmp_path / "c/d.jpg", tmp_path / ".e/f.jpg")

    def names(**options):
        return [str(Path(path).relative_to(tmp_path)) for path, _ in images.walk(str(tmp_path), **options)]

    assert names() == ["a.jpg", "c/d.jpg"]
    assert names(recursive=False) == ["a.jpg"]
    assert names(hidden=True) == [".b.jpg", ".e/f.jpg", "a.jpg", "c/d.jpg"]


# Many photos


@pytest.fixture
def album(tmp_path):
    """Eleven photos, whose colours are their numbers."""
    return [saved(Image.new("RGB", (8, 8), (n, n, n)), tmp_path / f"{n:02}.png") for n in range(11)]


@pytest.mark.parametrize("batch_size", [1, 3, 11, 64])
def test_stream_keeps_the_order(album, batch_size):
    batches = list(images.stream(album, 8, batch_size))
    assert [index for batch in batches for index in batch.indices] == list(range(11))
    assert [len(batch.indices) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for batch in batches:
        assert batch.pixels.shape == (len(batch.indices), 3, 8, 8)
        assert batch.pixels[:, 0, 0, 0].tolist() == batch.indices
    assert list(images.stream([], 8, batch_size)) == []


def test_stream_reports_failures_and_goes_on(album, tmp_path):
    album[2] = tmp_path / "missing.png"
    album[4].write_bytes(b"no photo")
    for index in (6, 7, 8):
        album[index].write_bytes(b"")
    batches = list(images.stream(album, 8, 3))
    assert [batch.indices for batch in batches] == [[0, 1], [3, 5], [], [9, 10]]
    assert [sorted(batch.failures) for batch in batches] == [[2], [4], [6, 7, 8], []]
    assert batches[1].pixels[:, 0, 0, 0].tolist() == [3, 5]
    assert batches[2].pixels.shape == (0, 3, 8, 8)
    assert str(batches[0].failures[2]).endswith("missing.png: no such file; give the path of a photo")


def test_stream_is_a_few_batches_ahead_and_no_more(album, monkeypatch):
    asked = []
    monkeypatch.setattr(images, "load", lambda path, size: asked.append(path) or np.zeros((3, size, size), np.uint8))
    stream = images.stream(album * 100, 8, 10)
    for number in range(1, 20):
        next(stream)
        assert len(asked) <= 10 * (number + 2)
    stream.close()


@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_that_is_left_early_leaves_nothing_behind(album, monkeypatch, closed):
    running, decoded = threading.active_count(), []

    def load(path, size):
        if len(decoded) >= 20:
            time.sleep(0.2)
        decoded.append(path)
        return np.zeros((3, size, size), np.uint8)

    monkeypatch.setattr(images, "load", load)
    stream = images.stream(album * 100, 8, 20)
    assert len(next(stream).indices) == 20
    if closed:
        stream.close()
    del stream
    gc.collect()
    assert threading.active_count() == running
    assert len(decoded) < 50  # 40 more were waiting: a caller who stops does not wait for them


def test_stream_leaves_the_filters_of_warnings_alone(album):
    before = list(warnings.filters)
    for _ in images.stream(album * 20, 8, 10):
        pass
    assert list(warnings.filters) == before


@pytest.mark.shared
def test_real_photos(shared):
    paths = sorted((shared / "coco/val2017").glob("*.jpg"))
    batch = next(images.stream(paths[:16], 224, 16))
    assert not batch.failures
    assert 60 < batch.pixels.mean() < 180
    assert isinstance(paths[0], Path)
