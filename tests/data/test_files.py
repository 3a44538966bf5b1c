"""One reader for every file: formats, compressions, shards, marks of Windows, damage, and what a hostile file costs."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import tracemalloc
import zipfile

import pytest
from text_samples import write_rows

from data import files, table_files, text_files
from data.files import each_row, read_rows
from evals import answers, exact, readers

pyarrow = pytest.importorskip("pyarrow")
openpyxl = pytest.importorskip("openpyxl")

ROWS = [{"prompt": "Tea?", "completion": "Green or 'x'"}, {"prompt": "日本\nзима", "completion": 'a,b\tc "d"'}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def excel() -> bytes:
    book, out = openpyxl.Workbook(), io.BytesIO()
    for row in ([*ROWS[0]], *([*row.values()] for row in ROWS)):
        book.active.append(row)
    book.save(out)
    return out.getvalue()


def arrow(new) -> bytes:
    rows, out = pyarrow.Table.from_pylist(ROWS), io.BytesIO()
    with new(out, rows.schema) as writer:
        writer.write_table(rows)
    return out.getvalue()


def parquet() -> bytes:
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
    return out.getvalue()


MADE = {
    "a.jsonl": lambda: LINES,
    "a.ndjson": lambda: LINES,
    "lines.json": lambda: LINES,
    "array.json": lambda: json.dumps(ROWS).encode(),
    "pretty.json": lambda: json.dumps(ROWS, indent=4, ensure_ascii=False).encode(),
    "a.csv": lambda: table(","),
    "a.tsv": lambda: table("\t"),
    "a.xlsx": excel,
    "a.parquet": parquet,
    "stream.arrow": lambda: arrow(pyarrow.ipc.new_stream),
    "file.feather": lambda: arrow(pyarrow.ipc.new_file),
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.jsonl.bz2": lambda: bz2.compress(LINES),
    "a.json.xz": lambda: lzma.compress(json.dumps(ROWS).encode()),
    "a.csv.xz": lambda: lzma.compress(table(",")),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "bom.json": lambda: b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode(),
    "bom.csv": lambda: b"\xef\xbb\xbf" + table(","),
    "two_streams.jsonl.gz": lambda: gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]),
    "two_streams.jsonl.xz": lambda: lzma.compress(LINES[:50]) + lzma.compress(LINES[50:]),
}


@pytest.mark.parametrize("name", MADE)
def test_every_format_holds_the_same_rows(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(MADE[name]())
    assert [row for _, row in read_rows(str(path))] == ROWS


def test_zst_holds_the_same_rows(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(LINES)
    assert [row for _, row in read_rows(str(path))] == ROWS


def test_trainers_checks_and_evaluation_read_with_one_reader():
    assert readers.read_rows is answers.read_rows is exact.read_rows is files.read_rows


def test_a_glob_a_directory_and_saved_datasets_are_read_shard_after_shard(tmp_path):
    for shard in range(3):
        (tmp_path / "set").mkdir(exist_ok=True)
        write_rows(tmp_path / "set" / f"train-0000{shard}-of-00003.jsonl", {"n": shard})
    (tmp_path / "set" / "README.md").write_text("# A set")
    for name in ("set", "set/train-*.jsonl"):
        assert [row["n"] for _, row in read_rows(str(tmp_path / name))] == [0, 1, 2]
    write_rows(tmp_path / "set" / "test-00000-of-00001.jsonl", {"n": 9})
    with pytest.raises(ValueError, match="has the splits test, train; name the files"):
        list(each_row(str(tmp_path / "set")))
    saved = tmp_path / "saved"
    saved.mkdir()
    for shard in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow"):
        (saved / shard).write_bytes(arrow(pyarrow.ipc.new_stream))
    (saved / "cache-1234.arrow").write_bytes(b"left over")
    state = {"_data_files": [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]}
    (saved / "state.json").write_text(json.dumps(state))
    assert [row for _, row in read_rows(str(saved))] == ROWS + ROWS
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"has the splits train, test; name one, e.g. .*/train"):
        list(each_row(str(tmp_path)))


def test_dates_decimals_and_bytes_of_a_table_are_text_and_numbers(tmp_path):
    import decimal

    import pyarrow.parquet

    day = datetime.datetime(2026, 11, 28, 9, 30)
    row = {"at": day, "cost": decimal.Decimal("1.50"), "raw": b"ok", "image": b"\xff\xd8", "in": {"on": [day.date()]}}
    row["took"] = datetime.timedelta(days=2, seconds=1)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    ((_, found),) = read_rows(str(tmp_path / "a.parquet"))
    expected = {"at": "2026-11-28T09:30:00", "cost": 1.5, "raw": "ok", "image": "/9g=", "in": {"on": ["2026-11-28"]}}
    expected["took"] = 172_801.0
    assert json.loads(json.dumps(found)) == expected


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv:3: 3 cells under 2 columns"),
        ("a.csv", b"a,b\n1,2\n1\n", "a.csv:3: 1 cells under 2 columns"),
        ("a.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("a.csv", b'messages,b\n"[{",2\n', "a.csv:2: messages begins a list and is not JSON"),
        ("a.json", b'[{"a": 1}, {"a": ]', r"a.json: element 2 of the array is not JSON"),
        ("a.json", b'[{"a": 1}, 3]', "a.json:2: expected a JSON object, got int"),
        ("a.json", b'[{"a": 1}] {"b": 2}', "there is text after the end of the array"),
        ("a.json", b'[{"a": "\\ud83d"}]', r"a.json:1: a text contains \S+, half of a surrogate pair"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x \\ud83d y"}\n', r"a.jsonl:2: a text contains \\ud83d, half of a surrogate"),
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "a.jsonl:2: not JSON, one object per line"),
        ("a.jsonl", b'{"a": 1}\n{"b": [{"c": 1, "c": 2}]}\n', "a.jsonl:2: an object has a key twice: c, c"),
        ("a.json", b'[{"a": 1}, {"b": 1, "b": 2}]', "a.json:2: an object has a key twice: b, b"),
        ("a.jsonl.xz", lzma.compress(LINES)[:60], "a.jsonl.xz:1: the file is damaged"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:60], "a.jsonl.bz2:1: the file is damaged"),
        ("a.jsonl", gzip.compress(LINES), r"a.jsonl is compressed, but its name does not end in \.gz"),
        ("a.jsonl", "ß".encode("latin-1"), "a.jsonl:1: the file is not UTF-8"),
        ("a.xlsx", b"no zip", "is not a readable Excel file"),
        ("a.arrow", b"no arrow", "is not a readable Arrow file"),
        ("a.docx", b"", r"\.docx is not a known format \(\.jsonl"),
        ("a.zip", b"", r"\.zip is not a known format"),
        ("a", b"{}", "a name without a suffix is not a known format"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(name, content, problem, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        list(read_rows(str(tmp_path / name)))


def test_an_empty_cell_of_a_table_is_null(tmp_path):
    (tmp_path / "a.tsv").write_text("a\tb\n\t2\n")
    assert [row for _, row in read_rows(str(tmp_path / "a.tsv"))] == [{"a": None, "b": "2"}]


def test_a_nan_of_a_table_is_null(tmp_path):
    column = pyarrow.array([1.0, float("nan")], pyarrow.float64())
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(str(tmp_path / "a.parquet"))] == [{"a": 1.0}, {"a": None}]


@pytest.mark.parametrize("header", [("a", "b", "a"), ("a", None, "b")])
def test_each_column_of_a_sheet_has_a_name_of_its_own(header, tmp_path):
    book = openpyxl.Workbook()
    book.active.append([*header, None])
    book.active.append(["1", "2"])  # without the last cell: under a gap it would slip to the left
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(
        ValueError, match=f"a.xlsx:1: each column needs a name of its own, got a, {header[1]}, {header[2]}"
    ):
        list(read_rows(str(tmp_path / "a.xlsx")))


def test_a_workbook_of_several_sheets_asks_which(tmp_path):
    book = openpyxl.Workbook()
    book.create_sheet("more")
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(ValueError, match="has the sheets Sheet, more"):
        list(read_rows(str(tmp_path / "a.xlsx")))


def test_bombs_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW", 1 << 20)
    bomb = gzip.compress(b'{"a": "' + b"x" * (1 << 26))
    (tmp_path / "a.jsonl.gz").write_bytes(bomb)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"a": "' + b"x" * (1 << 26)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="a line of more than 1 MiB"):
        list(read_rows(str(tmp_path / "a.jsonl.gz")))
    with pytest.raises(ValueError, match="element 1 of the array is not JSON"):
        list(read_rows(str(tmp_path / "a.json.gz")))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    (tmp_path / "a.jsonl.xz").write_bytes(
        lzma.compress(LINES, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29}])
    )
    with pytest.raises(ValueError, match="a.jsonl.xz:1: the file is damaged.*[Mm]emory"):
        list(read_rows(str(tmp_path / "a.jsonl.xz")))
    monkeypatch.setattr(table_files, "MAX_EXCEL", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", b" " * (1 << 21))
    with pytest.raises(ValueError, match="unpacks to 2,097,152 bytes"):
        list(read_rows(str(tmp_path / "a.xlsx")))


def test_rows_stream_whatever_the_file_holds(tmp_path):
    """12 MB of rows, as lines and as one array: what lies in memory is a row, not the file."""
    row = json.dumps({"messages": "x" * 4000})
    (tmp_path / "a.jsonl").write_text((row + "\n") * 3_000)
    (tmp_path / "a.json").write_text("[" + ",".join([row] * 3_000) + "]")
    for name in ("a.jsonl", "a.json"):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(str(tmp_path / name))) == 3_000
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        tracemalloc.stop()
