"""That what other suites print is counted as they mean it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_suites import assertions, passed

OUTPUT = """\
/somewhere/tests/chmod/00.t ........ 
1..4
ok 1
not ok 2 # TODO Linux does otherwise
ok 3 # TODO it was expected to fail
not ok 4 - tried 'rename a b', expected 0, got EIO
Failed 1/4 subtests 
/somewhere/tests/chmod/01.t ........ 
1..1
ok 1
ok
All tests successful.
"""  # noqa: W291


def test_what_pjdfstest_prints_is_counted() -> None:
    found = assertions(iter(OUTPUT.splitlines()))
    assert found == {
        "chmod/00.t 1": "ok",
        "chmod/00.t 2": "todo",
        "chmod/00.t 3": "ok",
        "chmod/00.t 4": "not ok",
        "chmod/01.t 1": "ok",
    }
    assert passed(found) == "3 of 4"
