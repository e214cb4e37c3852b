import csv
import math

import pytest

from bhsd_jax.platform import csv_files, faults


@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_records_become_lines_and_no_records_no_file(tmp_path, end):
    path = tmp_path / "new" / "t.csv"
    records = [{"case": "a", "said": 'of "b", ä'}, {"case": "c", "said": None}]
    csv_files.write_records(path, records, line_end=end)
    assert path.read_bytes().decode() == end.join(["case,said", 'a,"of ""b"", ä"', "c,", ""])
    with path.open(newline="") as file:
        assert next(csv.DictReader(file)) == records[0]
    csv_files.write_records(path, [])
    csv_files.write_records(path, [])
    assert not path.exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_are_read_as_spreadsheets_export_them(tmp_path, separator, encoding):
    """Separators of all countries, spaces, lines of empty cells, and lines cut short."""
    lines = ["case; any ;Höhe", "a; 1.0 ;x", ";;", "", "b;0"]
    text = "\r\n".join(lines).replace(";", separator)
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    (_, names), *rows = csv_files.read_records(tmp_path / "t.csv")
    assert list(names)[:2] == ["case", "any"]
    assert [(number, *row.values()) for number, row in rows] == [
        (2, "a", "1.0", "x"),
        (5, "b", "0", ""),
    ]


def test_whole_numbers_may_have_a_decimal_of_zero():
    assert [csv_files.whole(cell) for cell in ("1", "1.0", "0,0", "-1")] == [1, 1, 0, -1]
    assert [csv_files.whole(cell) for cell in ("TRUE", "False")] == [1, 0]
    assert [csv_files.known(cell, -1) for cell in ("NA", "nan", "", "0")] == [-1, -1, -1, 0]
    for cell in ("", "x", "0.5", "nan", "inf"):
        with pytest.raises(ValueError, match=r"whole|convert"):
            csv_files.whole(cell)


def test_floats_keep_all_their_digits(tmp_path):
    csv_files.write_csv(tmp_path / "t.csv", "xyz", iter([(0.1 + 0.2, math.nan, math.inf)]))
    assert (tmp_path / "t.csv").read_bytes() == b"x,y,z\r\n0.30000000000000004,nan,inf\r\n"


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path, disk):
    folder = disk("size=64k")
    csv_files.write_csv(folder / "t.csv", ("a",), [(1,)])
    before = (folder / "t.csv").read_bytes()
    with pytest.raises(faults.WriteError, match="No space left"):
        csv_files.write_csv(folder / "t.csv", ("a",), [("x" * 2**17,)])
    assert (folder / "t.csv").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["t.csv"]


def test_no_name_is_a_formula_for_a_spreadsheet_and_numbers_stay(tmp_path):
    rows = [
        {"case": name, "=ml": "-1.5", "x": -2.0}
        for name in ("=1+1", "@SUM(A1)", "+cmd", "-cmd", "\tx", "ID_1", "-3", "")
    ]
    csv_files.write_records(tmp_path / "a.csv", rows, harmless=True)
    with (tmp_path / "a.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["case"] for row in found] == [
        *("'=1+1", "'@SUM(A1)", "'+cmd", "'-cmd", "'\tx", "ID_1", "-3", ""),
    ]
    assert {row["'=ml"] for row in found} == {"-1.5"}
    assert {row["x"] for row in found} == {"-2.0"}
