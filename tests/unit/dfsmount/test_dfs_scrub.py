"""`dfs scrub` and the column of `dfs status`: which servers, until when, and what is said."""

import pytest

from chunkserver.protocol import ScrubReport
from dfsmount import dfs_scrub
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_scrub import Scrubbed
from metaserver import words
from metaserver.protocol import ScrubStatus, ServerStatus

STATUS = ScrubStatus(43 << 20, 100 << 20, 5.0, 2.1 * (1 << 20), 0, 600.0, 5 * 86400.0)


def server(number: int, state: str = "UP") -> ServerStatus:
    return ServerStatus(number, f"s{number}", state, "h", 1, 2, "", "/d", 1, 1, 0, 0, 0.0)


class FakeApi:
    """Servers that answer as told, one answer after another; the last again and again."""

    def __init__(self, answers: dict[int, list[ScrubReport | Problem]]) -> None:
        self.answers = answers
        self.begun: list[int] = []

    def scrub(self, server: ServerStatus, *, begin: bool) -> ScrubReport:
        if begin:
            self.begun.append(server.server)
        queue = self.answers[server.server]
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(answer, Problem):
            raise answer
        return answer


def view(
    completed: int, asked: int = 3, incarnation: str = "a", damaged: tuple[tuple[str, str], ...] = ()
) -> ScrubReport:
    return ScrubReport(incarnation, asked if completed < asked else 0, asked, completed, STATUS, list(damaged))


def run(answers: dict[int, list[ScrubReport | Problem]]) -> list[Scrubbed]:
    shown: list[str] = []
    api = FakeApi(answers)
    found = dfs_scrub.watch(api, [server(number) for number in answers], lambda name, *_: shown.append(name))  # type: ignore[arg-type]
    assert api.begun == list(answers)
    return found


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfs_scrub, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(dfs_scrub, "PATIENCE_SECONDS", 0.0)


def test_what_a_person_sees() -> None:
    assert words.scrub_text(STATUS) == "43 % of pass, 2.1 MiB/s, last pass 5 d ago, 0 bad"
    assert words.scrub_text(ScrubStatus(0, 0, 0.0, 0.0, 2)) == "no pass yet, 2 bad"
    assert words.scrub_text(None) == "not known"


def test_which_servers() -> None:
    servers = [server(1), server(2, "LOST"), server(3, "DOWN")]
    assert [each.server for each in dfs_scrub.chosen(servers, [])] == [1, 3]
    assert [each.server for each in dfs_scrub.chosen(servers, ["s2", "3", "s2"])] == [2, 3]
    with pytest.raises(Problem, match="no chunkserver 'x': known are s1, s2, s3"):
        dfs_scrub.chosen(servers, ["x"])
    with pytest.raises(Problem, match="no chunkserver to scrub"):
        dfs_scrub.chosen([], [])


def test_the_end_of_a_pass_is_waited_for() -> None:
    results = run({1: [view(2), view(2), view(2), view(3)], 2: [view(1), view(3)]})
    assert dfs_scrub.clean(results)
    assert [result.server for result in results] == ["s1", "s2"]
    assert dfs_scrub.lines(results)[0].startswith("s1: 100 MiB read back in ")


def test_damage_restarts_and_silence_are_no_success() -> None:
    results = run(
        {
            1: [view(2), view(3, damaged=(("00ff", "2 bad blocks"),))],
            2: [view(2), view(0, incarnation="b")],
            3: [view(2), Problem("no chunkserver at h:2")],
            4: [Problem("refused")],
        }
    )
    assert [bool(result.problem) for result in results] == [False, True, True, True]
    assert [dfs_scrub.clean([result]) for result in results] == [False] * 4
    text = "\n".join(dfs_scrub.lines(results))
    assert "chunk 00ff on s1: 2 bad blocks" in text
    assert "s2: not scrubbed: the server was restarted" in text
    assert "s3: not scrubbed: no chunkserver at h:2" in text
