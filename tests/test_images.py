"""Every kind of file that is a photo, and every kind that is not."""

import gc
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
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
    return (torch.as_tensor(found).int() - torch.as_tensor(expected)).abs().max() <= tolerance


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
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
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
    assert torch.equal(images.load(saved(big_endian, tmp_path / "ramp.tif"), 256), pixels)


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
    fast = images.load(path, 224).int()
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda image, mode, size: None)
    whole = images.load(path, 224).int()
    assert not torch.equal(fast, whole)  # it did take the other way
    assert (fast - whole).abs().float().mean() < 1.0
    assert (fast - whole).abs().float().quantile(0.99) <= 8


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
    assert torch.equal(images.load(image, 32), images.load(path, 32))
    assert torch.equal(images.load(str(path), 32), images.load(path, 32))
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
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
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
    with pytest.raises(ImageError, match=f"^{path}: not a photo; expected JPEG, PNG, WebP, GIF, BMP or TIFF$"):
        images.load(path, 32)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: no such file; give the path of a photo$"):
        images.load(tmp_path / "none.jpg", 32)
    with pytest.raises(ImageError, match=f"^{tmp_path}: is a folder; give the path of a photo$"):
        images.load(tmp_path, 32)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"a\.jpg: may not be read; change its permissions$"):
        images.load(tmp_path / "a.jpg", 32)


@pytest.mark.parametrize("size", [(14000, 14000), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, 8, 2, bytes(99)))
    with pytest.raises(ImageError, match=r"bomb\.png: has more than 178 million pixels; make it smaller first$"):
        images.load(path, 32)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_pillow_only_warns_of_photos_that_are_loaded(tmp_path, monkeypatch, name):
    """As of 108 million pixels, which is what phones make."""
    path = saved(quarters(64), tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.load(path, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(ImageError, match="more than 0 million pixels"):
        images.load(path, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    images.load(path, 32)


def test_no_width(tmp_path):
    path = tmp_path / "empty.png"
    path.write_bytes(png(0, 7, 8, 2, b""))
    with pytest.raises(ImageError, match=r"empty\.png: "):
        images.load(path, 32)


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), NotImplementedError("a"), struct.error("a"), KeyError("a")])
def test_whatever_a_decoder_raises_is_an_error_of_one_line(tmp_path, monkeypatch, error):
    path = saved(quarters(), tmp_path / "a.png")

    def fail(image):
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
    touch(tmp_path / "a/phone.HEIC")
    assert images.find([tmp_path]) == sorted(files)
    assert f"in other formats, and left out: 1, e.g. {tmp_path}/a/phone.HEIC; convert them to JPEG" in caplog.text
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
    with pytest.raises(ImageError, match=r"texts: no photo in this folder; expected files ending in \.bmp, \.gif, "):
        images.find([tmp_path / "texts"])
    with pytest.raises(ImageError, match=r"x: cannot be looked at \(File name too long\); give a photo or a folder of"):
        images.find([tmp_path / ("x" * 300)])


def test_find_in_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    touch(tmp_path / "a.jpg")
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(
        ImageError, match=r"a\.jpg: cannot be looked at \(Permission denied\); give a photo or a folder"
    ):
        images.find([tmp_path])


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
    monkeypatch.setattr(images, "load", lambda path, size: asked.append(path) or torch.zeros(3, size, size).byte())
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
        return torch.zeros(3, size, size).byte()

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


def test_photos_are_decoded_when_they_are_asked_for(album, monkeypatch):
    decoded = []
    load = images.load
    monkeypatch.setattr(images, "load", lambda path, size: decoded.append(path) or load(path, size))
    photos = images.Photos(album, 8)
    assert decoded == []
    pixels = photos[np.array([5, 2, 5])]
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels[:, 0, 0, 0].tolist() == [5, 2, 5]
    assert photos[np.array([2, 7])][:, 0, 0, 0].tolist() == [2, 7]
    assert decoded.count(album[2]) == 1  # kept in memory
    monkeypatch.setattr(images.Photos, "_KEPT_BYTES", 100)
    photos = images.Photos(album, 8)
    decoded.clear()
    for _ in range(2):
        assert photos[np.array([2])][:, 0, 0, 0].tolist() == [2]
    assert decoded == [album[2], album[2]]  # too many to keep


def test_photos_names_those_that_cannot_be_decoded(album):
    album[3].write_bytes(b"")
    photos = images.Photos(album, 8)
    failures = photos.check()
    assert list(failures) == [3]
    assert "03.png: not a photo" in str(failures[3])
    assert photos[np.array([4, 2])][:, 0, 0, 0].tolist() == [4, 2]
    with pytest.raises(ImageError, match=r"03\.png: not a photo"):
        photos[np.array([1, 3])]


@pytest.mark.shared
def test_real_photos(shared):
    paths = sorted((shared / "coco/val2017").glob("*.jpg"))
    batch = next(images.stream(paths[:16], 224, 16))
    assert not batch.failures
    assert 60 < batch.pixels.float().mean() < 180
    assert isinstance(paths[0], Path)
