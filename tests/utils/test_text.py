"""Text of others where it is shown."""

import csv
import html.parser
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import check_name, user_path
from mambapeft_vision.utils.text import command, csv_cell, html_text, latex, markdown, override, plain, shown

ANY = st.text(st.characters(exclude_categories=()), max_size=40)


@given(ANY)
def test_a_line_of_a_terminal_has_no_control_characters(text):
    for cleaned in (plain(text), shown(text), shown([text])):
        assert cleaned.replace("\u3000", "").isprintable() or all(c.isprintable() or c.isspace() for c in cleaned)
        assert not set(cleaned) & set("\n\r\x1b\x07\x9b\u202e\u2066\u200b\u2028")
        cleaned.encode()


def test_what_is_hidden_is_shown():
    assert plain("\x1b[31mred\n\u202e") == r"\x1b[31mred\n\u202e" and plain("naïve – ∂") == "naïve – ∂"
    assert plain("x" * 1000) == "x" * 200 + "…"
    assert len(shown(["x" * 10**6] * 10**5)) <= 201 and len(shown({str(n): n for n in range(10**5)})) <= 201
    assert shown(10**5000) == "a int"


@given(ANY)
def test_a_cell_of_markdown_stays_a_cell(text):
    cell = markdown(f"a|b{text}")
    assert "\n" not in cell and "<" not in cell and ">" not in cell
    assert all(cell[i - 1] == "\\" for i, c in enumerate(cell) if c in "|[`")


@given(ANY)
def test_html_text_holds_no_tag(text):
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, attributes))
    parser.feed(f'<p title="{html_text(text)}">{html_text(text)}</p>')
    assert len(found) == 1 and found[0][1][0][1] == plain(text)


@pytest.mark.parametrize("text", [r"\input{x}\write18{y}", "a & b # $ % _ ^ ~", "two\nlines"])
def test_latex_is_text(text):
    cleaned = latex(text)
    assert "\n" not in cleaned and r"\input" not in cleaned and r"\write" not in cleaned
    unescaped = cleaned.replace(r"\&", "").replace(r"\#", "").replace(r"\$", "").replace(r"\%", "").replace(r"\_", "")
    assert not set(unescaped) & set("&#$%_^~")


@pytest.mark.parametrize("text", ["=1+1", "+cmd|x", "-2+3", "@SUM(A1)", "=\n"])
def test_no_cell_is_a_formula(text):
    assert str(csv_cell(text)).startswith("'")
    assert csv_cell("-0.5") == "-0.5" and csv_cell(-0.5) == -0.5 and csv_cell("LoRA_p(X)") == "LoRA_p(X)"


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20), min_size=1))
def test_a_command_can_be_pasted(words):
    assert shlex.split(command(*words)) == words


@pytest.mark.parametrize(
    "value",
    [
        *("plain/path-1.0", "my birds", "sp/a=b", 'quote"d', "back\\slash", "a,b", "{x}", "é", "~/x", "a~", ""),
        *("null", "True", "1e3", "12", "-1", "1_000", "nan", "inf", "007", "1.", ".5", "0x1"),
        *(None, True, False, 12, -1, 1e-05, 2.0, [1, "a", "1", None], ["a b", 'c"d'], {"rank": 8, "x": "8"}, []),
    ],
)
def test_an_override_means_its_value_to_hydra(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    def plain_value(found):
        if isinstance(found, list):
            return [plain_value(item) for item in found]
        if isinstance(found, dict):
            return {key: plain_value(item) for key, item in found.items()}
        return found.text if hasattr(found, "text") else found

    (parsed,) = OverridesParser.create().parse_overrides([override("dataset.folder", value)])
    found = plain_value(parsed.value())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name", ["a", "vim_s", "a.b-c", "0", "ü"])
def test_good_names(name):
    assert check_name(name, "x") == name and check_name(f"{name}/{name}", "x", parts=2) == f"{name}/{name}"


@pytest.mark.parametrize("name", ["", "a/b", "/a", "../a", ".a", "-a", "a b", "a=b", "a\n", "n" * 101, None, 3, "${x}"])
def test_bad_names(name):
    with pytest.raises(UserError, match=r"dataset\.name=.*expected letters"):
        check_name(name, "dataset.name")


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/w.pth") == tmp_path / "w.pth" and str(user_path("a/~b")) == "a/~b"


def test_csv_survives(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerow([csv_cell('a,\n"b"')])
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1
