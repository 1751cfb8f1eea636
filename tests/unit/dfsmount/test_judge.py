"""Who is to blame: pure judgement, and for how long he is left out."""

from chunkserver.pulse import Reading
from dfsmount.avoided import AVOID_SECONDS, NEVER_SECONDS, Avoided
from dfsmount.judge import HUNG_SECONDS, SILENT_SECONDS, SLOW_SECONDS, Verdict, judge

WELL = Reading(0, 0.001, 0)
MUTE = Reading(SILENT_SECONDS, None, 0)
SLOW = Reading(0, 0.5, 0)
NOBODY: frozenset[int] = frozenset()


def test_who_does_not_answer_is_blamed_if_somebody_else_does() -> None:
    assert judge({1: WELL, 2: MUTE}) == Verdict(frozenset({2}), NOBODY)
    assert judge({1: WELL, 2: MUTE, 3: MUTE}) == Verdict(frozenset({2, 3}), NOBODY)
    assert judge({1: SLOW, 2: MUTE}) == Verdict(frozenset({2}), NOBODY)
    assert judge({1: WELL, 2: Reading(SILENT_SECONDS - 0.1, None, 0)}) == Verdict(NOBODY, NOBODY)


def test_nobody_is_blamed_if_nobody_answers() -> None:
    assert judge({1: MUTE, 2: MUTE}) == Verdict(NOBODY, NOBODY)
    assert judge({1: MUTE}) == Verdict(NOBODY, NOBODY)
    # A moment of silence is no answer either.
    assert judge({1: MUTE, 2: Reading(0.5, None, 0)}) == Verdict(NOBODY, NOBODY)
    assert judge({}) == Verdict(NOBODY, NOBODY)


def test_slowness_is_relative() -> None:
    assert judge({1: WELL, 2: SLOW}) == Verdict(NOBODY, frozenset({2}))
    assert judge({1: SLOW, 2: SLOW}) == Verdict(NOBODY, NOBODY)
    assert judge({1: Reading(0, 0.2, 0), 2: SLOW}) == Verdict(NOBODY, NOBODY)
    assert judge({1: WELL, 2: Reading(0, SLOW_SECONDS - 0.01, 0)}) == Verdict(NOBODY, NOBODY)
    # An answer that is due is no reason to wait and see.
    assert judge({1: WELL, 2: Reading(0.4, 0.5, 0)}) == Verdict(NOBODY, frozenset({2}))
    # Not measured often enough.
    assert judge({1: WELL, 2: Reading(0, None, 0)}) == Verdict(NOBODY, NOBODY)
    assert judge({1: Reading(0, None, 0), 2: SLOW}) == Verdict(NOBODY, NOBODY)


def test_a_disk_that_hangs_is_as_bad_as_silence_unless_all_do() -> None:
    hung = Reading(0, None, HUNG_SECONDS)
    assert judge({1: WELL, 2: hung}) == Verdict(frozenset({2}), NOBODY)
    assert judge({1: Reading(0, None, HUNG_SECONDS / 2), 2: hung}) == Verdict(NOBODY, NOBODY)
    assert judge({1: hung, 2: hung}) == Verdict(NOBODY, NOBODY)


def test_offenders_are_left_out_longer_each_time() -> None:
    avoided = Avoided()
    avoided.never({1}, 0)
    assert avoided.to_leave_out(NEVER_SECONDS - 0.1) == {1}
    assert avoided.to_leave_out(NEVER_SECONDS) == NOBODY
    assert avoided.to_avoid(NEVER_SECONDS) == {1}
    avoided.never({1}, NEVER_SECONDS)
    assert avoided.to_leave_out(3 * NEVER_SECONDS - 0.1) == {1}
    # What is seen again while it is held against the server is the same offence.
    avoided.never({1}, NEVER_SECONDS + 1)
    assert avoided.to_leave_out(3 * NEVER_SECONDS + 0.9) == {1}
    assert avoided.to_leave_out(3 * NEVER_SECONDS + 1) == NOBODY
    # In the end it is forgiven.
    later = 1000 + AVOID_SECONDS
    avoided.never({1}, later)
    assert avoided.to_leave_out(later + NEVER_SECONDS) == NOBODY


def test_slow_ones_may_be_used_if_there_are_no_others() -> None:
    avoided = Avoided()
    avoided.avoid({2}, 0)
    assert avoided.to_leave_out(1) == NOBODY
    assert avoided.to_avoid(1) == {2}
    assert avoided.to_avoid(AVOID_SECONDS) == NOBODY
