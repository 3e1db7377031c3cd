"""Windows made at once are those made task by task: same rows, same order, same bytes, equal rows once."""

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from limaml.embeddings.window_build import built, first_of_equals
from limaml.embeddings.window_value import extended, unseen
from limaml.interactions.packed_rows import RowCodec

# few values, so that times tie and rows are equal
ROWS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-3, 3), st.sampled_from(["", "a", "bb"]), st.integers(1, 3)),
    min_size=1,
    max_size=60,
)


@given(ROWS, st.none() | st.integers(1, 5), st.booleans())
def test_windows_made_at_once_are_those_made_task_by_task(
    given_rows: list[tuple[int, int, str, int]], keep: int | None, text: bool
) -> None:
    names = ["task", "time", "text", "append"]
    frame = pl.DataFrame(given_rows, schema=names, orient="row")
    rows = frame.select(names[:3] if text else names[:2])
    codes = frame["task"].rank("dense").to_numpy().astype(np.int64) - 1
    times, appends, buckets = frame["time"].to_numpy(), frame["append"].to_numpy(), codes % 2
    codec = RowCodec(rows.schema)

    order = first_of_equals(rows, times, buckets, codes, codec)
    made = built(rows, order, times, buckets, codes, appends, codec, keep)

    packed = codec.pack(rows)
    by_place = np.lexsort((buckets, times)).tolist()
    kept = []
    for task in range(int(codes.max()) + 1):
        mine = [(int(times[row]), int(buckets[row]), packed[row]) for row in by_place if codes[row] == task]
        fresh, _ = unseen(None, mine)
        places = [row for row in by_place if codes[row] == task]
        left = [places[mine_at] for mine_at, entry in enumerate(mine) if any(entry is one for one in fresh)]
        kept += left
        assert made[task] == extended(None, fresh, keep, max(int(appends[row]) for row in left))
    assert order.tolist() == kept
