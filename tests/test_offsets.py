from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stationmaster.offsets import Lease


def lease(*offsets: int) -> Lease:
    made = Lease(topic="t", partition=0, generation=1)
    for offset in offsets:
        made.hand_out(offset)
    return made


def test_without_accounting_there_is_no_watermark() -> None:
    assert lease(5, 6).watermark is None
    assert lease(5, 6).outstanding == 2


def test_the_watermark_is_the_next_offset_after_the_accounted_prefix() -> None:
    one = lease(5, 6, 7)
    assert one.account(5, 6)
    assert (one.watermark, one.outstanding) == (7, 1)


def test_a_hole_holds_the_watermark_until_it_is_filled() -> None:
    one = lease(0, 1, 2, 3)
    assert not one.account(2, 3)
    assert not one.account(1, 1)
    assert one.outstanding == 4
    assert one.account(0, 0)
    assert (one.watermark, one.outstanding) == (4, 0)


def test_gaps_between_the_offsets_are_no_holes() -> None:
    one = lease(10, 20, 21, 40)
    one.account(20, 21)
    one.account(10, 10)
    assert one.watermark == 22
    one.account(40, 40)
    assert one.watermark == 41


def test_accounting_once_more_for_what_is_done_does_not_move_it_back() -> None:
    one = lease(0, 1, 2)
    one.account(0, 2)
    assert not one.account(0, 0)
    assert one.watermark == 3


@given(st.data())
def test_in_any_order_of_any_cuts_the_watermark_is_the_end_of_the_contiguous_prefix(
    data: st.DataObject,
) -> None:
    offsets = sorted(data.draw(st.sets(st.integers(0, 60), min_size=1)))
    cuts = sorted(data.draw(st.sets(st.sampled_from(offsets)))) or [offsets[0]]
    starts = sorted({offsets[0], *cuts})
    ends = [*[max(o for o in offsets if o < start) for start in starts[1:]], offsets[-1]]
    one = lease(*offsets)
    done: set[int] = set()
    for start, end in data.draw(st.permutations(list(zip(starts, ends, strict=True)))):
        before = one.watermark
        moved = one.account(start, end)
        done.update(offset for offset in offsets if start <= offset <= end)
        prefix = next((i for i, offset in enumerate(offsets) if offset not in done), len(offsets))
        assert one.watermark == (offsets[prefix - 1] + 1 if prefix else None)
        assert moved == (one.watermark != before)
        assert one.outstanding == len(offsets) - prefix
    assert one.outstanding == 0


def test_what_is_given_back_from_the_end_is_outstanding_no_more_and_comes_below_no_watermark() -> (
    None
):
    one = lease(5, 6, 7, 8)
    for offset in (8, 7):
        one.give_back(offset)
    assert one.outstanding == 2
    one.account(5, 5)
    one.account(6, 6)
    assert (one.watermark, one.outstanding) == (7, 0)
    one.give_back(6)
    assert (one.watermark, one.outstanding) == (7, 0)


def test_what_is_given_back_before_something_else_stays_outstanding() -> None:
    one = lease(5, 6, 7)
    one.give_back(6)
    one.account(7, 7)
    one.account(5, 5)
    assert (one.watermark, one.outstanding) == (6, 2)
