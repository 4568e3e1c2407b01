"""Tables keep to the width, align what belongs together, and let no cell break a line."""

from __future__ import annotations

import pytest

from deepseek_mp.report.table import clean, listing, paragraph, table, tables

WORDS = "each of these words is short and all of them together are long"


def test_numbers_stand_to_the_right_and_empty_columns_are_left_out() -> None:
    lines = table(("name", "nothing", "count"), [("a", "", "1"), ("bcdef", "", "12")], 80)
    assert lines == ["name   count", "-" * 12, "a          1", "bcdef     12"]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_text_wraps_to_the_width_and_numbers_do_not(width: int) -> None:
    lines = table(("name", "count", "why"), [("layer", "123456", WORDS), ("other", "7", "because")], width)
    assert max(map(len, lines)) <= width
    assert sum("123456" in line for line in lines) == 1
    column = lines[0].index("why")
    assert " ".join(line[column:].strip() for line in lines[2:-1]) == WORDS


def test_titles_of_numbers_wrap_before_a_row_is_too_long() -> None:
    lines = table(("a long title", "another title"), [("1.5", "2.5")], 12)
    assert max(map(len, lines)) <= 15
    assert lines[-1].split() == ["1.5", "2.5"]


def test_short_words_are_not_broken_even_where_the_row_is_too_long() -> None:
    lines = table(("reason", "evidence"), [("measured_fastest", WORDS)], 20)
    assert any("measured_fastest" in line for line in lines)


def test_a_cell_breaks_no_line_and_moves_no_cursor() -> None:
    lines = table(("name",), [("one\ntwo\x1b[31m\tthree",)], 80)
    assert lines[2:] == ["one two?[31m three"]
    assert clean("a\u202eb") == "a?b"


def test_no_rows_are_no_table() -> None:
    assert table(("name", "count"), [], 80) == []


def test_a_listing_hangs_under_its_texts() -> None:
    lines = listing([("short", "x"), ("a longer name", WORDS), ("nothing", "")], 50)
    assert lines[0] == "short          x"
    assert lines[1].startswith("a longer name  each")
    assert all(line.startswith(" " * 15) for line in lines[2:])
    assert max(map(len, lines)) <= 50
    assert listing([], 50) == []


def test_a_paragraph() -> None:
    assert " ".join(paragraph(WORDS, 20)) == WORDS
    assert max(map(len, paragraph(WORDS, 20))) <= 20


@pytest.mark.parametrize("width", [30, 45, 200])
def test_columns_that_do_not_fit_stand_in_tables_below(width: int) -> None:
    heading = ("name", "", "one", "two", "three", "nothing", "four")
    rows = [("layer", "", "1.111111", "2.222222", "3.333333", "", "4.444444"), ("other", "", "", "7", "", "", "")]
    lines = tables(heading, rows, width, repeated=2)
    assert max(map(len, lines)) <= width
    heads = [line.split() for line in lines if line.startswith("name")]
    assert [title for head in heads for title in head[1:]] == ["one", "two", "three", "four"]
    assert len(heads) == {30: 2, 45: 1, 200: 1}[width]
    assert sum("other" in line for line in lines) == len(heads)


def test_a_column_wider_than_the_width_stands_alone() -> None:
    lines = tables(("name", "one", "two"), [("a", "1" * 50, "2")], 20, repeated=1)
    assert [line.split()[1:] for line in lines if line.startswith("name")] == [["one"], ["two"]]
    assert tables(("name", "one"), [("a", "")], 20, repeated=1) == []
