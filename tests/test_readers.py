"""Reading and joining tables: every format from a file written here, every kind of damage by name."""

from __future__ import annotations

import datetime
import gzip
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from limaml.errors import DataError
from limaml.interactions.join import join_tables
from limaml.interactions.readers import read_table

FRAME = pl.DataFrame({"user": [1, 2, 3], "item": ["a", "b", None], "score": [0.5, 1.5, -2.0]})


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---------------------------------------------------------------- formats


def test_every_format_gives_the_same_table(tmp_path: Path) -> None:
    FRAME.write_parquet(tmp_path / "a.parquet")
    FRAME.write_csv(tmp_path / "a.csv")
    FRAME.write_csv(tmp_path / "a.tsv", separator="\t")
    FRAME.write_ipc(tmp_path / "a.arrow")
    FRAME.write_ndjson(tmp_path / "a.jsonl")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    write(tmp_path / "semicolon.csv", (tmp_path / "a.csv").read_text().replace(",", ";"))
    write(tmp_path / "bom.csv", b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    write(tmp_path / "windows.csv", (tmp_path / "a.csv").read_text().replace("\n", "\r\n"))
    for path in sorted(tmp_path.iterdir()):
        assert_frame_equal(read_table(path), FRAME)
        assert_frame_equal(read_table(str(path)), FRAME)


def test_tables_in_memory() -> None:
    assert read_table(FRAME) is FRAME
    assert_frame_equal(read_table(FRAME.lazy()), FRAME)
    assert_frame_equal(read_table(FRAME.to_arrow()), FRAME)
    assert_frame_equal(read_table({"user": [1, 2, 3]}), FRAME.select("user"))
    frame = pd.DataFrame({"user": [1, 2, 3], "item": ["a", "b", None], "score": [0.5, 1.5, -2.0]})
    assert_frame_equal(read_table(frame), FRAME)
    assert_frame_equal(read_table(frame[1:]), FRAME[1:])  # pandas's own row numbers are no column
    assert_frame_equal(read_table(frame.set_index("user")), FRAME)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (pd.DataFrame({"a": [1, "x"]}), "pandas frame cannot be turned into a table"),
        (pd.DataFrame({7: [1]}), "column names must be text"),
        (pl.DataFrame({"a": pl.Series([1, object()], dtype=pl.Object)}), "'a' holds Python objects"),
        (3, "A int cannot be read"),
        ([], "list of files to read is empty"),
        ([FRAME], "must be a list of paths"),
        ({"a": [1], "b": [1, 2]}, "mapping cannot be turned into a table"),
    ],
)
def test_what_is_no_table_is_refused(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(source)  # type: ignore[arg-type]


def test_types_in_csv_come_from_every_line_and_zeros_are_kept(tmp_path: Path) -> None:
    lines = "\n".join(f"{i},{i},1,2020-01-0{i % 9 + 1}" for i in range(1, 500))
    path = write(tmp_path / "a.csv", f"zip,late,n,day\n{lines}\n02460,1.5,7,2020-01-01\n")
    found = read_table(path)
    assert found.dtypes == [pl.String, pl.Float64, pl.Int64, pl.Date]
    assert found["zip"][-1] == "02460"
    assert found["day"][-1] == datetime.date(2020, 1, 1)


def test_null_values_are_named_by_the_caller_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\n1,NA\nNA,x\n")
    assert read_table(path)["b"].to_list() == ["NA", "x"]
    assert read_table(path, null_values=["NA"]).rows() == [(1, None), (None, "x")]


CELLS = st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="\r\0", exclude_categories=("Cs",)), max_size=8
)


@settings(max_examples=60)
@given(st.lists(st.tuples(CELLS, CELLS, st.integers(-(2**62), 2**62)), min_size=1, max_size=8))
def test_any_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, int]]) -> None:
    frame = pl.DataFrame(rows, schema={"one": pl.String, "two": pl.String, "number": pl.Int64}, orient="row")
    frame = frame.with_columns(
        pl.format("x{}", pl.col(name)).alias(name) for name in ("one", "two")
    )  # so that they are read as text
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    frame.write_csv(path)
    assert_frame_equal(read_table(path), frame)


# ---------------------------------------------------------------- RecBole


def test_atomic_files_have_their_types_in_the_header(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.item",
        "item_id:token\ttitle:token_seq\tprice:float\tvector:float_seq\tcode:token\ttags:token_seq\n"
        '1\tThe "Best" Film\t2.5\t0.1 0.2\t007\t3 4\n'
        "2\t\t\t\tx\t5\n",
    )
    found = read_table(path)
    assert found.schema == {
        "item_id": pl.Int64,
        "title": pl.List(pl.String),
        "price": pl.Float64,
        "vector": pl.List(pl.Float64),
        "code": pl.String,
        "tags": pl.List(pl.Int64),
    }
    assert found.row(0) == (1, ["The", '"Best"', "Film"], 2.5, [0.1, 0.2], "007", [3, 4])
    assert found["price"].to_list() == [2.5, None]
    assert found["tags"].to_list() == [[3, 4], [5]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.inter", "user_id\titem_id\n1\t2\n", r"'name:type'"),
        ("a.inter", "user:token\tx:number\n1\t2\n", r"has 'x:number'"),
        ("a.inter", "user:token\tx:float\n1\tabc\n", r"declares 'x' as float, and it holds 'abc' in row 0"),
        ("a.inter", "user:token\tx:float_seq\n1\t1 b\n", r"declares 'x' as float_seq, and it holds 'b'"),
        ("a.inter", "user:token\tx:float\n1\t2\n3\n", r"has 1 cell\(s\) in line 3"),
        ("a.inter", "user:token\tx:float\tx:token\n", r"2 columns called 'x'"),
    ],
)
def test_damaged_atomic_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_table(write(tmp_path / name, text))
    assert name in str(error.value)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3,\xff\xfe\n", "not UTF-8"),
        ("a.csv", b"a,b\xff\n1,2\n", "not UTF-8"),
        ("a.csv", b"a,b,c\n1,2,3\n4,5\n6,7,8\n", r"2 cell\(s\) in line 3, and 3 columns"),
        ("a.csv", b"a,b,c\n1,2,3\n4,5,6,7\n", r"4 cell\(s\) in line 3, and 3 columns"),
        ("a.csv", b"a,a\n1,2\n", "2 columns called 'a'"),
        ("a.csv", b"", "is empty"),
        ("a.tsv", b"\n1\n", "is empty or starts with an empty line"),
        ("a.csv.gz", b"a,b\n1,2\n", "cannot be read as csv"),
        ("a.parquet", b"PAR1 and nothing more", "cannot be read as parquet"),
        ("a.arrow", b"no arrow", "cannot be read as arrow"),
        ("a.jsonl", b'{"a": 1}\n{"a": ', "cannot be read as jsonl"),
        ("a.xlsx", b"", "no known format"),
        ("a", b"", "no known format"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_table(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_and_a_truncated_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file '.*nothing\.csv'"):
        read_table(tmp_path / "nothing.csv")
    path = tmp_path / "cut.parquet"
    pl.DataFrame({"a": range(1000)}).write_parquet(path)
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.parquet.*cannot be read as parquet"):
            read_table(path)
    packed = gzip.compress(FRAME.write_csv().encode())
    with pytest.raises(DataError, match=r"cut\.csv\.gz.*cannot be read"):
        read_table(write(tmp_path / "cut.csv.gz", packed[: len(packed) - 12]))


def test_a_null_in_the_last_column_is_no_short_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'a,b\n1,\n"x, y\nz",2\n')
    assert read_table(path).rows() == [("1", None), ("x, y\nz", 2)]


# ---------------------------------------------------------------- several files


def test_folders_and_lists_are_put_one_below_the_other(tmp_path: Path) -> None:
    FRAME[:1].write_parquet(tmp_path / "b.parquet")
    (tmp_path / "deep").mkdir()
    FRAME[1:].select("score", "user", "item").write_csv(tmp_path / "deep" / "c.csv")
    write(tmp_path / "README.md", "not a table")
    write(tmp_path / "_SUCCESS", "")
    write(tmp_path / ".hidden.csv", "z\n1\n")
    assert_frame_equal(read_table(tmp_path), FRAME)
    listed = read_table([tmp_path / "deep" / "c.csv", str(tmp_path / "b.parquet")])
    assert listed["user"].to_list() == [2, 3, 1]
    assert listed.columns == ["score", "user", "item"]


def test_integers_and_floats_go_together_but_numbers_and_text_do_not(tmp_path: Path) -> None:
    one, two, three = (write(tmp_path / f"{i}.csv", f"a,b\n1,{value}\n") for i, value in enumerate(["2", "2.5", "x"]))
    assert read_table([one, two])["b"].to_list() == [2.0, 2.5]
    assert read_table([one, three])["b"].to_list() == ["2", "x"]  # ids, of which one file has digits only
    with pytest.raises(
        DataError, match=r"Column 'b' is of type Float64 in '.*1\.csv' and of type String in '.*2\.csv'"
    ):
        read_table([two, three])


def test_files_with_other_columns_are_refused_by_name(tmp_path: Path) -> None:
    FRAME.write_parquet(tmp_path / "a.parquet")
    FRAME.rename({"item": "thing"}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet.*lacks \['item'\] and has \['thing'\]"):
        read_table(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file that can be read"):
        read_table(tmp_path / "empty")


# ---------------------------------------------------------------- joining


def test_side_tables_are_joined_by_their_keys_and_rows_stay_in_order() -> None:
    rows = pl.DataFrame({"user": [2, 1, 2, 3], "item": ["x", "y", "x", "z"]})
    users = pl.DataFrame({"age": [10, 20], "user": [1, 2]})
    items = pl.DataFrame({"item": ["z", "y", "x"], "tags": [["t"], [], ["t", "u"]]})
    joined = join_tables(rows, {"user": users, "item": items})
    assert joined.frame["age"].to_list() == [20, 10, 20, None]
    assert joined.frame["tags"].to_list() == [["t", "u"], [], ["t", "u"], ["t"]]
    assert joined.frame.select("user", "item").equals(rows)
    assert joined.columns == {"user": ("age",), "item": ("tags",)}
    assert len(joined.notes) == 1
    assert "1 value(s) of 'user' in 1 row(s) are not in the side table, for example 3 in row 3" in joined.notes[0]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=20), st.sets(st.integers(0, 9)))
def test_joining_is_a_look_up(keys: list[int], known: set[int]) -> None:
    table = pl.DataFrame({"k": list(known), "v": [10 * key for key in known]}, schema={"k": pl.Int32, "v": pl.Int64})
    joined = join_tables(pl.DataFrame({"k": pl.Series(keys, dtype=pl.Int64)}), {"k": table})
    assert joined.frame["v"].to_list() == [10 * key if key in known else None for key in keys]
    lacking = {key for key in keys if key not in known}
    rows = sum(key not in known for key in keys)
    assert bool(joined.notes) == bool(lacking)
    if lacking:
        assert joined.notes[0].startswith(f"{len(lacking)} value(s) of 'k' in {rows} row(s)")


def test_keys_of_different_types_are_reconciled_and_that_is_said() -> None:
    rows = pl.DataFrame({"k": [1, 2, None]})
    joined = join_tables(rows, {"k": pl.DataFrame({"k": ["1", "2"], "v": [7, 8]})})
    assert joined.frame["v"].to_list() == [7, 8, None]
    assert any("compared as text" in note for note in joined.notes)
    floats = join_tables(rows, {"k": pl.DataFrame({"k": [1.0, 2.0], "v": [7, 8]})})
    assert floats.frame["v"].to_list() == [7, 8, None]
    small = join_tables(pl.DataFrame({"k": pl.Series([1], dtype=pl.Int16)}), {"k": pl.DataFrame({"k": [1], "v": [5]})})
    assert small.frame["v"].to_list() == [5]
    with pytest.raises(DataError, match="use numbers or text"):
        join_tables(pl.DataFrame({"k": [[1]]}), {"k": pl.DataFrame({"k": [1]})})


def test_compound_keys() -> None:
    rows = pl.DataFrame({"a": [1, 1, 2], "b": ["x", "y", "x"]})
    table = pl.DataFrame({"a": [1, 2], "b": ["y", "x"], "v": [5, 6]})
    assert join_tables(rows, {"a+b": table}).frame["v"].to_list() == [None, 5, 6]


def test_a_repeated_key_is_refused_with_its_value() -> None:
    table = pl.DataFrame({"k": ["p", "q", "q", "q", None, None], "v": range(6)})
    with pytest.raises(DataError, match=r"key 'q' more than once \(in 3 rows, the first is row 1\); 1 key"):
        join_tables(pl.DataFrame({"k": ["p"]}), {"k": table})
    with pytest.raises(DataError, match="Did you mean 'item_id'"):
        join_tables(pl.DataFrame({"item_id": [1]}), {"item_idd": table})


def test_a_column_in_both_tables_is_kept_once_if_equal_and_twice_if_not() -> None:
    rows = pl.DataFrame({"item": [1, 2, 9], "skill": [5, 6, 7]})
    same = join_tables(rows, {"item": pl.DataFrame({"item": [1, 2], "skill": [[5], [6]]})})
    assert same.frame.columns == ["item", "skill"]
    assert same.frame["skill"].to_list() == [5, 6, 7]
    assert any("is kept once" in note for note in same.notes)
    for other in ([[5], [6, 7]], [5, 8], ["5", "z"]):
        differs = join_tables(rows, {"item": pl.DataFrame({"item": [1, 2], "skill": other})})
        assert differs.frame["skill"].to_list() == [5, 6, 7]
        assert differs.frame["skill_of_item"].to_list() == [*other, None]
        assert differs.columns == {"item": ("skill_of_item",)}
        assert any("differs in 1 row(s)" in note for note in differs.notes)


def test_joining_reads_files(tmp_path: Path) -> None:
    pl.DataFrame({"user": [1], "age": [33]}).write_parquet(tmp_path / "users.parquet")
    assert join_tables(FRAME, {"user": tmp_path / "users.parquet"}).frame["age"].to_list() == [33, None, None]
    assert join_tables(FRAME, {"user": pa.table({"user": [2], "age": [1]})}).frame["age"].to_list() == [None, 1, None]
