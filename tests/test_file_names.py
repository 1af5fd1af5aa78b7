"""File names made of arbitrary text, such as class names."""

import os

import pytest

from runtime.files import file_name_for

ODD = [
    "x" * 300,
    "a/b",
    "../../etc/passwd",
    "..",
    ".",
    ".hidden",
    "",
    " ",
    "nul\0byte",
    "two\nlines",
    "\ud800",
    "日本語" * 60,
    "😀",
    "CON",
    "nul",
    "com1.txt",
    "ends with a dot.",
    'what?*|<>":',
    "C:\\temp",
    "$(rm -rf ~)",
    "-",
    "e\N{COMBINING ACUTE ACCENT}",
]


@pytest.mark.parametrize("text", ["person", "giant_panda", "Flying-Disc.2", "Größe", "人"])
def test_a_plain_text_is_its_own_file_name(text):
    assert file_name_for(text) == text


@pytest.mark.parametrize("text", ODD)
def test_an_odd_text_has_a_file_name_that_can_be_written(tmp_path, text):
    name = file_name_for(text)
    (tmp_path / name).mkdir()
    assert os.listdir(tmp_path) == [name]  # in this folder, and in no other
    assert 0 < len(os.fsencode(name)) <= 80 and not name.startswith(".") and not name.endswith(".")
    assert all(
        letter.isalnum() or letter in "_.- "
        for letter in name.replace("\N{COMBINING ACUTE ACCENT}", "")
    )
    assert name.split(".")[0].upper() not in ("CON", "PRN", "AUX", "NUL", "COM1", "LPT1")


def test_different_texts_have_different_file_names():
    """Even if they differ in what is replaced or cut off, or one looks like the name of another."""
    alike = ["a/b", "a\\b", "a b", "a_b", "x" * 300, "x" * 301, "日" * 100, "日" * 101]
    alike += [file_name_for(text) for text in alike]
    assert len({file_name_for(text) for text in alike}) == len(set(alike))


def test_the_readable_part_stays():
    assert file_name_for("traffic light") == "traffic light"
    assert file_name_for("traffic: light").startswith("traffic_ light-")
    assert file_name_for("日本語" * 60).startswith("日本語日本語")


def test_a_file_system_without_unicode_has_names_of_ascii(monkeypatch):
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert file_name_for("Größe").startswith("Gr_e-") and file_name_for("panda") == "panda"
    assert file_name_for("日本").isascii() and file_name_for("日本") != file_name_for("日木")
