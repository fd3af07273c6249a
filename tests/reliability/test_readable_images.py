"""Kinds of images that are read, and what becomes of their pixels: docs/reference/images.md says the same."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mambapeft_vision.data.preprocessing import Preprocessing, decode_image

SIZE = (6, 8)
SAME_SIZE = Preprocessing(SIZE, "nearest", (0, 0, 0), (1, 1, 1))  # resizing changes no pixel
COLOUR = np.random.RandomState(0).randint(0, 256, (*SIZE, 3), dtype=np.uint8)
OTHER = 255 - COLOUR
GREY = COLOUR[..., 0]
BITS = GREY > 127
SIXTEEN = GREY.astype(np.uint16) * 256 + 77  # the high byte is the value in 8 bits
INKS = np.concatenate((COLOUR, np.zeros((*SIZE, 1), np.uint8)), axis=2)  # cyan, magenta, yellow, no black
ALPHA = np.concatenate((COLOUR, GREY[..., None]), axis=2)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def palette() -> Image.Image:
    image = Image.fromarray((GREY // 64).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    return image


PALETTE = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], np.uint8)[GREY // 64]


def turned() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


FRAMES = {"save_all": True, "append_images": [Image.fromarray(OTHER)], "duration": 100}


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.fromarray(COLOUR), {"format": "PNG"}, COLOUR),
        (Image.fromarray(COLOUR), {"format": "BMP"}, COLOUR),
        (Image.fromarray(COLOUR), {"format": "PPM"}, COLOUR),
        (Image.fromarray(COLOUR), {"format": "TIFF"}, COLOUR),
        (Image.fromarray(COLOUR), {"format": "WEBP", "lossless": True}, COLOUR),
        (Image.fromarray(GREY), {"format": "PNG"}, grey(GREY)),
        (Image.fromarray(BITS), {"format": "PNG"}, grey(BITS.astype(np.uint8) * 255)),
        (palette(), {"format": "PNG"}, PALETTE),
        (palette(), {"format": "GIF"}, PALETTE),
        (palette(), {"format": "PNG", "transparency": 2}, PALETTE),
        (Image.fromarray(ALPHA, "RGBA"), {"format": "PNG"}, COLOUR),
        (Image.fromarray(INKS, "CMYK"), {"format": "TIFF"}, 255 - COLOUR),
        (Image.fromarray(SIXTEEN), {"format": "PNG"}, grey(GREY)),
        (Image.fromarray(SIXTEEN), {"format": "TIFF"}, grey(GREY)),
        (Image.fromarray(COLOUR), {"format": "PNG", **turned()}, COLOUR),
        (Image.fromarray(COLOUR), {"format": "PNG", **FRAMES}, COLOUR),
        (Image.fromarray(COLOUR), {"format": "WEBP", "lossless": True, **FRAMES}, COLOUR),
    ],
    ids=[
        *("png", "bmp", "ppm", "tiff", "webp", "grey", "one bit", "palette", "gif", "transparency", "alpha"),
        *("cmyk", "16-bit png", "16-bit tiff", "exif rotated", "animated png", "animated webp"),
    ],
)
def test_pixels(image, options, expected):
    file = io.BytesIO()
    image.save(file, **options)
    np.testing.assert_array_equal(decode_image(file.getvalue(), SAME_SIZE).transpose(1, 2, 0), expected)


def test_a_16_bit_pgm():
    """Written by hand: Pillow 10 reads it and cannot write it."""
    file = io.BytesIO(b"P5 %d %d 65535\n" % SIZE[::-1] + SIXTEEN.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode_image(file.getvalue(), SAME_SIZE).transpose(1, 2, 0), grey(GREY))


@pytest.mark.parametrize("stored", [65535 - SIXTEEN, GREY], ids=["16 bits", "8 bits"])
def test_a_tiff_whose_white_is_zero(stored):
    """Radiographs are often stored so. Of 8 bits Pillow itself stores the inverse."""
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(decode_image(file.getvalue(), SAME_SIZE).transpose(1, 2, 0), grey(GREY))


def test_an_animated_gif_is_its_first_frame():
    file = io.BytesIO()
    second = Image.fromarray((3 - GREY // 64).astype(np.uint8), "P")
    palette().save(file, "GIF", save_all=True, append_images=[second], optimize=False)
    np.testing.assert_array_equal(decode_image(file.getvalue(), SAME_SIZE).transpose(1, 2, 0), PALETTE)


def test_jpegs_of_grey_and_inks_are_what_pillow_makes_of_them():
    for image in (Image.fromarray(GREY), Image.fromarray(INKS, "CMYK")):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        decoded = decode_image(file.getvalue(), SAME_SIZE).transpose(1, 2, 0)
        expected = grey(GREY) if image.mode == "L" else 255 - COLOUR
        np.testing.assert_array_equal(decoded, np.asarray(Image.open(file).convert("RGB")))
        if image.mode == "L":
            assert np.abs(decoded.astype(int) - expected).mean() < 8


def test_a_png_with_much_text_and_a_large_profile():
    """Microscopes and editors store their settings so: megabytes beside few pixels."""
    file, text = io.BytesIO(), PngInfo()
    text.add_text("settings", "zoom " * 600_000, zip=True)
    text.add_itxt("history", "edited " * 400_000, zip=True)
    Image.fromarray(COLOUR).save(file, "PNG", pnginfo=text, icc_profile=bytes(3_000_000))
    np.testing.assert_array_equal(decode_image(file.getvalue(), SAME_SIZE).transpose(1, 2, 0), COLOUR)
