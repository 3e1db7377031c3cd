"""Data sets as their publishers offer them: small files in the exact format, odd rows among them, and what is refused."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.cli.main import main
from limaml.errors import ConfigError, DataError
from limaml.interactions import prepare
from limaml.interactions.catalog import DataSet
from limaml.interactions.published import PUBLISHED, convert
from limaml.interactions.published.ads import CATEGORIES, NUMBERS
from limaml.interactions.published.kuairand import OUTCOMES

RATINGS = "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n2,296,0.5,1141415820\n"
MOVIES = (
    "movieId,title,genres\r\n"
    '296,"City of Lost Children, The (Cité des enfants perdus, La) (1995)",Adventure|Drama|Sci-Fi\r\n'
    '306,"""Great Performances"" Cats (1998) ",Musical\r\n'
    "307,Babylon 5,(no genres listed)\r\n"
)
KUAI_LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,"
    "duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
KUAI_USERS = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,follow_user_num_range,"
    "fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,register_days_range,"
    + ",".join(f"onehot_feat{i}" for i in range(18))
    + '\n0,full_active,0,0,0,5,"(0,10]",0,0,0,0,107,61-90,'
    + ",".join(["0"] * 12 + [""] * 6)
    + "\n"
)
KUAI_VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,"
    'music_type,tag\n7,4,NORMAL,2022-04-01,ShortImport,public,11700.0,720,1280,63,9.0,"12,65"\n8,5,AD,2022-04-02,,,,,,,,\n'
)
NEWS = (
    'N1\tlifestyle\tlifestyleroyals\tThe "Brands" Queen Elizabeth Swears By\tShop, now.\thttps://x\t[{"Label": "Elizabeth"}]\t[]\n'
    "N2\tnews\tnewsworld\tSão Paulo’s day\t\thttps://y\t[]\t\n"
)
BEHAVIOURS = (
    "1\tU13740\t11/11/2019 9:05:58 AM\tN1 N2\tN2-1 N1-0\n"
    "2\tU91836\t11/12/2019 12:30:00 PM\t\tN1-0\n"
    "3\tU13740\t11/12/2019 12:00:01 AM\tN1\tN2-0 N1-1 N2-1\n"
)
REVIEWS = [
    {"rating": 5.0, "title": "Such a lovely scent", "text": "line\nbreak, \"quoted\" and ✓", "images": [], "asin": "B1",
     "parent_asin": "B00YQ6X8EO", "user_id": "AGKHLEW2", "timestamp": 1588687728923, "helpful_vote": 0,
     "verified_purchase": True},
    {"rating": 4, "title": "", "text": "", "images": [{"small_image_url": "u"}], "asin": "B2", "parent_asin": "B081TJ8YS3",
     "user_id": "AGKHLEW3", "timestamp": 1588615855070, "helpful_vote": 1, "verified_purchase": False},
]  # fmt: skip
META = [
    {"main_category": "All Beauty", "title": "Howard LC0008", "average_rating": 4.8, "rating_number": 10, "features": [],
     "description": [], "price": None, "images": [], "videos": [], "store": "Howard Products", "categories": [],
     "details": {"Package Dimensions": "7.1 x 5.5"}, "parent_asin": "B00YQ6X8EO", "bought_together": None},
    {"main_category": None, "title": "Yes To Tomatoes", "average_rating": 4.5, "rating_number": 3, "features": ["a"],
     "description": ["b"], "price": 1224.5, "images": [], "videos": [], "store": None, "categories": ["Beauty", "Skin Care"],
     "details": {"UPC": "1"}, "parent_asin": "B081TJ8YS3", "bought_together": None},
]  # fmt: skip


def write(folder: Path, **files: str) -> Path:
    """`name__ext="…"` → the file `name.ext`; a name that ends with `__gz` is packed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        content = text.encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return folder


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(found: DataSet) -> tuple[pl.DataFrame, pl.DataFrame | None, pl.DataFrame | None]:
    others = (None if path is None else pl.read_parquet(path) for path in (found.task_features, found.row_features))
    return pl.read_parquet(found.interactions), *others  # type: ignore[return-value]


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


@pytest.mark.parametrize("form", ["folder", "zip", "tar.gz"])
def test_movielens_as_published(tmp_path: Path, form: str) -> None:
    files = {"ratings.csv": RATINGS, "movies.csv": MOVIES, "README.txt": "…"}
    source = tmp_path / f"ml-25m.{form}"
    if form == "folder":
        source.mkdir()
        for name, text in files.items():
            (source / name).write_text(text, newline="")
    elif form == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for name, text in files.items():
                archive.writestr(f"ml-25m/{name}", text)
    else:
        with tarfile.open(source, "w:gz") as tar:
            for name, text in files.items():
                entry = tarfile.TarInfo(f"ml-25m/{name}")
                entry.size = len(text.encode())
                tar.addfile(entry, io.BytesIO(text.encode()))
    found = convert("ml-25m", source, tmp_path / "out")
    interactions, users, items = read(found)
    assert users is None
    assert items is not None
    assert found.rows == 3
    assert interactions.row(0) == (1, 296, 5.0, at("2006-05-17 15:34:04"))
    assert items.rows() == [
        (296, "City of Lost Children, The (Cité des enfants perdus, La)", 1995, "Adventure Drama Sci-Fi"),
        (306, '"Great Performances" Cats', 1998, "Musical"),
        (307, "Babylon 5", None, None),
    ]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "interactions.parquet", "rows.parquet", "LICENCE.txt", "SOURCE.txt",
    }  # fmt: skip


def test_kuairand_as_published(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "data",
        log_standard_4_08_to_4_21_pure__csv=KUAI_LOG
        + "0,7,20220408,1300,1649395218000,1,0,0,0,0,0,1,13200,11700,0,0,0,0,1\n",
        log_random_4_22_to_5_08_pure__csv=KUAI_LOG + "0,8,20220422,900,1650590000123,0,0,0,0,0,0,0,0,11700,0,0,0,1,0\n",
        user_features_pure__csv=KUAI_USERS,
        video_features_basic_pure__csv=KUAI_VIDEOS,
    )
    said: list[str] = []
    found = convert("kuairand", folder, tmp_path / "out", progress=said.append)
    interactions, users, videos = read(found)
    assert users is not None
    assert videos is not None
    ordered = interactions.sort("timestamp")
    assert ordered["is_rand"].to_list() == [0, 1]
    assert ordered["timestamp"].to_list() == [at("2022-04-08 05:20:18"), at("2022-04-22 01:13:20.123")]
    assert ordered["is_click"].to_list() == [1, 0]
    assert users.row(0, named=True)["follow_user_num_range"] == "(0,10]"
    assert users["onehot_feat17"].to_list() == [None]
    assert videos["tag"].to_list() == ["12 65", None]
    assert any("2 logs were found" in note for note in said)
    assert set(OUTCOMES) < set(interactions.columns)  # there to be chosen as labels; the command leaves them out


def test_mind_as_published(tmp_path: Path) -> None:
    folder = write(tmp_path / "MINDsmall_train", behaviors__tsv=BEHAVIOURS, news__tsv=NEWS)
    interactions, users, news = read(convert("mind", folder, tmp_path / "out"))
    assert users is None
    assert news is not None
    assert interactions.select("impression_id", "user_id", "news_id", "clicked").rows() == [
        ("1", "U13740", "N2", 1), ("1", "U13740", "N1", 0), ("2", "U91836", "N1", 0),
        ("3", "U13740", "N2", 0), ("3", "U13740", "N1", 1), ("3", "U13740", "N2", 1),
    ]  # fmt: skip
    assert interactions["timestamp"].to_list()[::2] == [
        at("2019-11-11 09:05:58"), at("2019-11-12 12:30:00"), at("2019-11-12 00:00:01"),
    ]  # fmt: skip
    assert interactions["history"].to_list()[:3] == ["N1 N2", "N1 N2", None]
    assert news["title"].to_list() == ['The "Brands" Queen Elizabeth Swears By', "São Paulo’s day"]
    unlabelled = write(tmp_path / "test", behaviors__tsv="1\tU1\t11/11/2019 9:05:58 AM\tN1\tN2 N1\n", news__tsv=NEWS)
    with pytest.raises(DataError, match="a test set without labels"):
        convert("mind", unlabelled, tmp_path / "none")


@pytest.mark.parametrize("packed", ["", "__gz"])
def test_amazon_as_published(tmp_path: Path, packed: str) -> None:
    named = {f"All_Beauty__jsonl{packed}": lines(REVIEWS), f"meta_All_Beauty__jsonl{packed}": lines(META)}
    interactions, _, items = read(convert("amazon-2023", write(tmp_path / "data", **named), tmp_path / "out"))
    assert items is not None
    assert interactions.rows() == [
        ("AGKHLEW2", "B00YQ6X8EO", 5.0, at("2020-05-05 14:08:48.923")),
        ("AGKHLEW3", "B081TJ8YS3", 4.0, at("2020-05-04 18:10:55.070")),
    ]
    assert items["price"].to_list() == [None, 1224.5]
    assert items["categories"].to_list() == [[], ["Beauty", "Skin Care"]]
    assert "average_rating" not in items.columns
    core = write(
        tmp_path / "core", All_Beauty__csv="user_id,parent_asin,rating,timestamp,history\nA,B,5.0,1588687728923,B1 B2\n"
    )
    interactions, _, items = read(convert("amazon-2023", core, tmp_path / "out"))
    assert items is None
    assert not (tmp_path / "out" / "rows.parquet").exists()  # that of the files before is gone
    assert interactions.row(0) == ("A", "B", 5.0, at("2020-05-05 14:08:48.923"))
    write(core, All_Beauty__jsonl=lines(REVIEWS))
    with pytest.raises(DataError, match="2 files that could be the reviews"):
        convert("amazon-2023", core, tmp_path / "out")


def test_criteo_and_avazu_as_published(tmp_path: Path) -> None:
    values = [
        "1",
        *("" if i == 3 else str(i - 2) for i in range(13)),
        *(f"{i:08x}" if i != 5 else "" for i in range(26)),
    ]
    folder = write(tmp_path / "criteo", train__txt="\t".join(values) + "\n" + "\t".join(["0", *[""] * 39]) + "\n")
    found = convert("criteo", folder, tmp_path / "out")
    interactions, _, _ = read(found)
    assert interactions.shape == (2, 41)
    assert interactions["row_number"].to_list() == [0, 1]
    assert interactions["click"].to_list() == [1, 0]
    assert interactions.select(NUMBERS).row(0) == (-2, -1, 0, None, *range(2, 11))
    assert interactions.select(CATEGORIES).row(0)[4:7] == ("00000004", None, "00000006")
    assert found.task == ""  # none of its columns is a member

    header = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    header += "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21\n"
    row = (
        "1000009418151094273,0,14102113,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,a99f214a,ddd2926e,"
    )
    avazu = write(tmp_path / "avazu", train__gz=header + row + "44956a24,1,2,15706,320,50,1722,0,35,-1,79\n")
    interactions, _, _ = read(convert("avazu", avazu, tmp_path / "out"))
    assert interactions["hour"].to_list() == [at("2014-10-21 13:00:00")]

    text = (
        "timestamp\tuid\tcampaign\tconversion\tconversion_timestamp\tconversion_id\tattribution\tclick\tclick_pos\tclick_nb\t"
        "cost\tcpo\ttime_since_last_click\tcat1\tcat2\tcat3\tcat4\tcat5\tcat6\tcat7\tcat8\tcat9\n"
        "0\t20073966\t22589171\t0\t-1\t-1\t0\t0\t-1\t-1\t1e-05\t0.39\t-1\t5824233\t9312274\t3490278\t29196072\t11409686\t1973606\t"
        "25162884\t29196072\t29196072\n"
    )
    attribution = write(tmp_path / "attribution", criteo_attribution_dataset__tsv__gz=text)
    interactions, _, _ = read(convert("criteo-attribution", attribution, tmp_path / "out"))
    assert interactions.select("uid", "campaign", "click", "time_since_last_click").row(0) == (
        "20073966",
        "22589171",
        0,
        None,
    )


def test_what_was_converted_needs_no_configuration(tmp_path: Path) -> None:
    rows = "".join(f"{u},{i},{1 + (u * i) % 5},{1000 * u + i}\n" for u in range(1, 9) for i in (296, 306, 307))
    folder = write(tmp_path / "ml", ratings__csv=RATINGS[: RATINGS.index("\n") + 1] + rows, movies__csv=MOVIES)
    found = convert("ml-32m", folder, tmp_path / "out")
    prepared = prepare(
        found.interactions, task=[found.task], row=found.row, time=found.time, label=[found.label],
        row_features=found.row_features,
    )  # fmt: skip
    assert prepared.frame.height == 24
    assert prepared.schema.time == "timestamp"


# ---- what is refused ----------------------------------------------------------------------------------------------------


def test_wrong_files_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="There is no data set called 'ml-26m'"):
        convert("ml-26m", tmp_path, out)
    with pytest.raises(DataError, match="There is nothing at"):
        convert("ml-25m", tmp_path / "nowhere", out)
    with pytest.raises(DataError, match=r"has no table of films \(a file called movies.csv"):
        convert("ml-25m", write(tmp_path / "a", ratings__csv=RATINGS), out)
    old = write(tmp_path / "b", ratings__csv="user,item,rating,timestamp\n1,2,3,4\n", movies__csv=MOVIES)
    with pytest.raises(DataError, match=r"'ratings.csv' has no column 'userId', 'movieId'; its header has user, item"):
        convert("ml-25m", old, out)
    odd = write(tmp_path / "c", ratings__csv=RATINGS + "3,x,1.0,5\n", movies__csv=MOVIES)
    with pytest.raises(DataError, match=r"interactions of MovieLens 25M .* cannot be read"):
        convert("ml-25m", odd, out)
    short = write(tmp_path / "d", ratings__csv=RATINGS + "3,29", movies__csv=MOVIES)
    with pytest.raises(DataError, match=r"1 of 4 interactions .* have no 'timestamp', the first is row 3"):
        convert("ml-25m", short, out)
    with pytest.raises(DataError, match="has no interactions: its files have a header and nothing else"):
        convert("ml-25m", write(tmp_path / "e", ratings__csv=RATINGS.split("\n")[0] + "\n", movies__csv=MOVIES), out)
    with pytest.raises(DataError, match="has 5 cells, and 40 are needed"):
        convert("criteo", write(tmp_path / "f", train__txt="1\t2\t3\t4\t5\n"), out)
    with pytest.raises(DataError, match="is no JSON object with user_id"):
        convert("amazon-2023", write(tmp_path / "g", Books__jsonl='{"a": 1}\n'), out)
    assert not out.exists() or not [p for p in out.iterdir() if p.suffix == ".parquet"]


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    packed = gzip.compress(lines(REVIEWS * 200).encode())
    (folder / "Books.jsonl.gz").write_bytes(packed[: len(packed) - 20])
    with pytest.raises(DataError, match=r"'Books.jsonl.gz' of .* is cut short or damaged .* Download it again"):
        convert("amazon-2023", folder, tmp_path / "out")
    (folder / "Books.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="is cut short or damaged"):
        convert("amazon-2023", folder, tmp_path / "out")


# ---- any values ---------------------------------------------------------------------------------------------------------

WORDS = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\x85"), min_size=1, max_size=20
)
TITLES = WORDS.map(str.strip).filter(bool)


@given(st.lists(st.tuples(TITLES, st.integers(1900, 2030)), min_size=1, max_size=8))
@settings(max_examples=25)
def test_any_title_survives_movielens(tmp_path_factory: pytest.TempPathFactory, titles: list[tuple[str, int]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["movieId", "title", "genres"])
    writer.writerows((i, f"{title} ({year})", "Drama") for i, (title, year) in enumerate(titles))
    folder = tmp_path_factory.mktemp("ml")
    write(folder, ratings__csv=RATINGS)
    (folder / "movies.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    _, _, items = read(convert("ml-25m", folder, folder / "out"))
    assert items is not None
    assert items.select("movie_title", "release_year").rows() == titles


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 99), max_size=60),
            st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=6),
            st.datetimes(dt.datetime(2019, 1, 1), dt.datetime(2020, 1, 1)),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=25)
def test_any_visit_becomes_its_rows(
    tmp_path_factory: pytest.TempPathFactory,
    visits: list[tuple[list[int], list[tuple[int, bool]], dt.datetime]],
) -> None:
    folder = tmp_path_factory.mktemp("mind")
    text, expected = "", []
    for number, (history, shown, moment) in enumerate(visits):
        moment = moment.replace(microsecond=0)
        hour = moment.hour % 12 or 12
        clock = f"{moment.month}/{moment.day}/{moment.year} {hour}:{moment:%M:%S} {'AM' if moment.hour < 12 else 'PM'}"
        past = " ".join(f"N{n}" for n in history)
        text += f"{number}\tU{number}\t{clock}\t{past}\t{' '.join(f'N{n}-{int(c)}' for n, c in shown)}\n"
        kept = " ".join(f"N{n}" for n in history[-50:]) or None
        expected += [(str(number), f"N{n}", moment, int(c), kept) for n, c in shown]
    write(folder, behaviors__tsv=text, news__tsv=NEWS)
    interactions, _, _ = read(convert("mind", folder, folder / "out"))
    assert interactions.select("impression_id", "news_id", "timestamp", "clicked", "history").rows() == expected


def test_the_command_reads_and_prints_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "data", behaviors__tsv=BEHAVIOURS, news__tsv=NEWS)
    main(["data", "get", "mind", "--from", str(folder), "--out", str(tmp_path / "out")])
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"limaml compare {tmp_path}/out/interactions.parquet --task user_id --row news_id --time timestamp" in printed
    )
    assert f"--row-features {tmp_path}/out/rows.parquet --exclude impression_id" in printed
    with pytest.raises(SystemExit) as left:
        main(["data", "get", "mind"])
    assert left.value.code == 2
    assert "Download it from https://msnews.github.io/" in " ".join(capsys.readouterr().err.split())
    criteo = write(tmp_path / "criteo", train__txt="\t".join(["0", *[""] * 39]) + "\n")
    main(["data", "get", "criteo", "--from", str(criteo), "--out", str(tmp_path / "c")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Choose what to personalise for" in printed
    assert "--task C1 --time row_number" in printed
    main(["data", "list"])
    assert "kuairand" in capsys.readouterr().out


def test_every_set_says_what_it_is() -> None:
    for name, entry in PUBLISHED.items():
        assert name == entry.name
        assert entry.address.startswith("https://")
        assert entry.licence
        assert entry.unit
        assert (entry.task is None) == bool(entry.task_choices)
