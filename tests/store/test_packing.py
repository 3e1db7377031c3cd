"""Packed embeddings: what comes back, how far off it may be, and that damage is seen."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from limaml.errors import StoreError
from limaml.store import packing
from limaml.store.hashing import Texts, hash_one, id_bytes
from limaml.store.packing import (
    COLD,
    DTYPES,
    checks,
    checksum,
    finite,
    identities,
    identity,
    intact,
    newer,
    pack,
    seal,
    unpack,
    value_size,
)

from .format import check_of, id_hash

singles = st.floats(width=32, allow_nan=False, allow_infinity=False)
small = st.integers(1, 9)


def vectors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return st.tuples(small, small).flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


def packed_and_back(given: np.ndarray, dtype: str) -> np.ndarray:
    n, dim = given.shape
    numbers = np.arange(n, dtype=np.int64)
    packed = pack(finite(given, dtype, [str(row) for row in range(n)]), numbers, -numbers, dtype)
    assert packed.shape == (n, value_size(dim, dtype))
    found, count, event_time = unpack(packed, dim, dtype)
    assert np.array_equal(count, numbers)
    assert np.array_equal(event_time, -numbers)
    assert found.dtype == np.float32
    return found


@settings(max_examples=100)
@given(vectors(singles))
def test_float32_is_exact(given: np.ndarray) -> None:
    assert packed_and_back(given, "float32").tobytes() == given.tobytes()


@settings(max_examples=100)
@given(vectors(st.floats(-65504, 65504, width=32)))
def test_float16_is_off_by_half_a_unit(given: np.ndarray) -> None:
    error = np.abs(packed_and_back(given, "float16").astype(np.float64) - given)
    assert (error <= np.maximum(np.abs(given.astype(np.float64)) * 2.0**-11, 2.0**-25)).all()


@settings(max_examples=200)
@given(vectors(singles))
def test_int8_is_off_by_half_a_step_of_the_largest_number(given: np.ndarray) -> None:
    found = packed_and_back(given, "int8").astype(np.float64)
    largest = np.abs(given.astype(np.float64)).max(axis=1, keepdims=True)
    assert np.isfinite(found).all()
    assert (np.abs(found - given) <= largest / 254 * (1 + 1e-5) + 2.0**-149).all()


@settings(max_examples=100)
@given(vectors(st.floats(-65504, 65504, width=32)), st.sampled_from(DTYPES))
def test_the_bytes_are_the_same_with_torch_and_without(given: np.ndarray, dtype: str) -> None:
    numbers = np.arange(len(given))
    import torch  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        with_torch = pack(given, numbers, numbers, dtype)
        patch.delitem(sys.modules, "torch")
        assert pack(given, numbers, numbers, dtype).tobytes() == with_torch.tobytes()


@pytest.mark.parametrize("extreme", [3.4028235e38, 1e-45, 1.78e-43, 1.1754944e-38, 0.0])
def test_int8_at_the_ends_of_float32(extreme: float) -> None:
    given = np.array([[extreme, -extreme, extreme / 2]], np.float32)
    found = packed_and_back(given, "int8")
    assert np.allclose(found, given, rtol=0, atol=abs(extreme) / 254 * 1.001 + 2.0**-149)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_a_finite_number_is_refused_with_the_id(dtype: str, bad: float) -> None:
    given = np.zeros((3, 2))
    given[1, 1] = bad
    with pytest.raises(StoreError, match=r"member 'bob' \(row 1\) has .* at position 1"):
        finite(given, dtype, ["al", "bob", "cy"], "member ")


def test_float16_refuses_what_would_become_infinite() -> None:
    with pytest.raises(StoreError, match=r"'a' .* does not fit into float16"):
        finite(np.array([[70000.0]]), "float16", ["a"])


def seeds_of(ids: list[str], where: bytes = b"") -> np.ndarray:
    return Texts.of(ids).hashes() + np.uint64(hash_one(where))


def test_the_bytes_are_as_documented() -> None:
    packed = pack(np.array([[1.5, -2.0, 0.25]]), np.array([7]), np.array([-9]), "float16")
    (value,) = [row.tobytes() for row in seal(packed, seeds_of(["x"], b"here"))]
    body = struct.pack("<BBHIqf3eH", 2, 1, 3, 7, -9, 1.0, 1.5, -2.0, 0.25, 0)
    assert value == body + struct.pack("<I", check_of(value, b"x", b"here"))


@settings(max_examples=60)
@given(vectors(st.floats(-60000, 60000, width=32)), st.sampled_from(DTYPES), st.data())
def test_any_flipped_bits_and_any_other_key_are_seen(given: np.ndarray, dtype: str, data: st.DataObject) -> None:
    n = len(given)
    ids = [f"t{row}" for row in range(n)]
    seeds = seeds_of(ids)
    table = seal(pack(given, np.ones(n, np.int64), np.ones(n, np.int64), dtype), seeds)
    assert intact(table, seeds).all()
    row = data.draw(st.integers(0, n - 1))
    places = data.draw(st.lists(st.integers(0, 8 * table.shape[1] - 1), min_size=1, max_size=3, unique=True))
    changed = table.copy()
    for bit in places:
        changed[row, bit // 8] ^= 1 << bit % 8
    assert intact(changed, seeds).tolist() == [each != row for each in range(n)]
    assert not intact(table[:1], seeds_of(["someone else"])).any()
    assert not intact(table[:1], seeds_of(ids[:1], b"elsewhere")).any()
    assert checksum(checks(table)) == sum(checks(table).tolist())


def test_two_numbers_that_both_change_their_sign_are_seen() -> None:
    """The highest bits of words: sums modulo 2⁶⁴ that did not fold the words would not see them."""
    dim = 33
    given = np.random.default_rng(0).normal(size=(1, dim))
    seeds = seeds_of(["a"])
    for one in range(dim):
        for other in range(one):
            table = seal(pack(given, np.ones(1, np.int64), np.ones(1, np.int64), "float32"), seeds)
            for place in (one, other):
                table[0, 20 + 4 * place + 3] ^= 0x80
            assert not intact(table, seeds).any()


@settings(max_examples=100)
@given(st.lists(st.text(st.characters(codec=None), max_size=40) | st.text(max_size=300), max_size=8))
def test_hashes_are_the_same_one_by_one_together_and_in_plain_python(ids: list[str]) -> None:
    raws = [id_bytes(each) for each in ids]
    expected = [id_hash(raw) for raw in raws]
    assert [hash_one(raw) for raw in raws] == expected
    assert Texts.of(ids).hashes().tolist() == expected
    assert Texts.of_bytes(raws).hashes().tolist() == expected


def test_a_header_of_another_shape_is_refused() -> None:
    packed = pack(np.zeros((1, 4)), np.zeros(1, np.int64), np.zeros(1, np.int64), "float32")
    with pytest.raises(StoreError, match="not that of 8 numbers in float16"):
        unpack(packed, 8, "float16")


@settings(max_examples=100)
@given(st.lists(st.text(st.characters(codec=None), max_size=450), unique=True, max_size=8))
def test_identities_are_distinct_short_and_the_same_one_by_one(ids: list[str]) -> None:
    names = identities(ids, b"prefix")
    assert names == [b"prefix" + identity(task_id) for task_id in ids]
    assert len(set(names)) == len(ids)
    assert all(len(name) <= 511 for name in names)
    assert b"prefix" + COLD not in names


@settings(max_examples=100)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1))
def test_revisions_are_ordered_as_pairs(rows: list[tuple[int, int, int, int]]) -> None:
    columns = np.array(rows, np.int64).T
    assert newer(*columns).tolist() == [(count, time) > (old, old_time) for count, time, old, old_time in rows]


def test_exports() -> None:
    assert all(hasattr(packing, name) for name in packing.__all__)
