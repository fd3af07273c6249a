"""Decoding: exactly what Pillow gives, whatever the number of threads, and errors that lead to the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from mambapeft_vision.data import Preprocessing, decode_image
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.images import decode_list
from mambapeft_vision.utils.errors import UserError


def by_pillow(file, height, width, resample=Image.Resampling.BICUBIC):
    pixels = np.asarray(Image.open(file).convert("RGB").resize((width, height), resample))
    return pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("size", [(7, 5), (23, 17), (40, 64)])
def test_decoding_equals_pillow_exactly(tmp_path, mode, size):
    pixels = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(pixels).convert(mode).save(file)
    decoded = decode_image(file, Preprocessing(size, "bicubic", (0, 0, 0), (1, 1, 1)))
    assert decoded.dtype == np.uint8 and decoded.shape == (3, *size) and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, by_pillow(file, *size))


def test_the_filter_of_the_record_is_used(tmp_path):
    file = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    bilinear = decode_image(file, Preprocessing((5, 5), "bilinear", (0, 0, 0), (1, 1, 1)))
    np.testing.assert_array_equal(bilinear, by_pillow(file, 5, 5, Image.Resampling.BILINEAR))
    assert not np.array_equal(bilinear, by_pillow(file, 5, 5))


def test_exif_orientation_is_not_applied(tmp_path):
    """The recipe's images were decoded without it, so turning them would change the benchmark."""
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    decoded = decode_image(tmp_path / "turned.png", Preprocessing((8, 16), "bicubic", (0, 0, 0), (1, 1, 1)))
    np.testing.assert_array_equal(decoded, pixels.transpose(2, 0, 1))


def test_from_timm_takes_height_before_width():
    record = {"input_size": (3, 224, 192), "interpolation": "bicubic", "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    assert Preprocessing.from_timm(record) == Preprocessing((224, 192), "bicubic", (0.1, 0.2, 0.3), (1, 1, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": (0, 5)}, "size"),
        ({"size": (5,)}, "size"),
        ({"interpolation": "magic"}, "expected one of nearest, bilinear, bicubic"),
        ({"mean": (0.5,)}, "as many numbers each"),
        ({"std": (0.5, 0.5, 0)}, "std above 0"),
    ],
)
def test_impossible_preprocessing_is_an_error(change, reason):
    good = {"size": (5, 5), "interpolation": "bicubic", "mean": (0, 0, 0), "std": (1, 1, 1)}
    with pytest.raises(UserError, match=reason):
        Preprocessing(**good | change)


def test_an_incomplete_timm_record_is_an_error():
    with pytest.raises(UserError, match="lacks interpolation, mean"):
        Preprocessing.from_timm({"input_size": (3, 8, 8), "std": (1, 1, 1)})


def test_a_list_is_decoded_in_order_with_any_number_of_threads(toy_folder, preprocessing):
    listing = read_list(toy_folder / "train800val200.txt", 3, remedy="")
    one = decode_list(listing, preprocessing, workers=1)
    many = decode_list(listing, preprocessing, workers=5)
    assert one.images.shape == (7, 3, 8, 6) and one.images.dtype == torch.uint8
    assert torch.equal(one.images, many.images)
    assert one.labels.tolist() == many.labels.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert one.names == many.names == [f"images/train800val200/{number:06d}.jpg" for number in range(7)]
    for name, image in zip(one.names, one.images, strict=True):
        np.testing.assert_array_equal(image.numpy(), by_pillow(toy_folder / name, 8, 6))


def test_progress_reports_the_end(toy_folder, preprocessing):
    reports = []
    decode_list(read_list(toy_folder / "test.txt", 3, remedy=""), preprocessing, progress=reports.append)
    assert (reports[-1].done, reports[-1].total, reports[-1].eta_seconds) == (4, 4, 0.0)
    assert reports[-1].rate > 0


def truncate(file):
    file.write_bytes(file.read_bytes()[:-60])


def break_header(file):
    file.write_bytes(b"not an image")


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, break_header, empty, lambda file: file.unlink()])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_bad_image_is_an_error_that_names_image_list_and_line(toy_folder, preprocessing, damage, workers):
    damage(toy_folder / "images/test/000001.jpg")
    damage(toy_folder / "images/test/000002.jpg")
    listing = read_list(toy_folder / "test.txt", 3, remedy="Do this.")
    with pytest.raises(UserError) as error:
        decode_list(listing, preprocessing, workers=workers)
    text = str(error.value)
    assert text.startswith(f"{toy_folder / 'test.txt'}:2: {toy_folder / 'images/test/000001.jpg'}: ")
    assert text.endswith("Do this.")
