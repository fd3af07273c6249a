"""How a task's images are encoded is told by their content."""

from PIL import Image

from mambapeft_vision.data.encoding import SAMPLE, encoding_of


def test_encodings_are_those_of_the_content(tmp_path):
    files = []
    for number, kind in enumerate(("jpeg", "png", "webp", "bmp", "gif", "tiff")):
        files.append(tmp_path / f"{number}.jpg")  # whatever the name says
        Image.new("RGB", (4, 4)).save(files[-1], kind)
        assert encoding_of(files[-1:]) == kind
    assert encoding_of([files[1], files[0], files[1]]) == "jpeg+png"
    text = tmp_path / "text.png"
    text.write_text("no image")
    assert encoding_of([text]) == encoding_of([tmp_path / "missing.png"]) == encoding_of([]) == "other"


def test_a_sample_of_a_long_list_is_read(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    files = [tmp_path / "a.png"] * 5000
    files[-1] = tmp_path / "missing.png"
    assert encoding_of(files) == "png" and SAMPLE < 100
