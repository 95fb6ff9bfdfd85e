"""Test records of outages: written at once, paired when read."""

from datetime import UTC, datetime, timedelta

from vessa_trainer.outages import ANNOTATOR, CACHE, TRAINER, Incidents, interruptions
from vessa_trainer.reporting.run_report import interruption_table


def test_what_went_away_and_came_back_has_a_length(tmp_path):
    incidents = Incidents(tmp_path / "run")
    incidents.away(TRAINER, "killed", datetime.now(UTC) - timedelta(seconds=90))
    incidents.back(TRAINER)
    incidents.away(ANNOTATOR, "no answer")
    incidents.away(CACHE, "Redis: ConnectionError")
    incidents.back(ANNOTATOR)
    found = interruptions(tmp_path / "run")
    assert [one["what"] for one in found] == [TRAINER, ANNOTATOR, CACHE]
    assert 90 <= found[0]["seconds"] < 150
    assert 0 <= found[1]["seconds"] < 60
    assert found[2]["seconds"] is None
    assert found[2]["why"] == "Redis: ConnectionError"
    _, lines = interruption_table(found)
    assert lines[2][2] == "its end was not seen"


def test_an_undisturbed_run_has_none_and_no_file(tmp_path):
    Incidents(tmp_path)
    assert interruptions(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_by_a_kill_and_an_end_without_a_beginning_are_left_out(tmp_path):
    incidents = Incidents(tmp_path)
    incidents.back(CACHE)
    incidents.away(CACHE, "gone")
    with incidents.path.open("a") as file:
        file.write('{"at": "2026-')
    assert [one["seconds"] for one in interruptions(tmp_path)] == [None]


def test_many_of_them_are_cut_short_in_the_report():
    one = {"what": CACHE, "began": "2026-01-02T03:04:05.678+00:00", "seconds": 1.6, "why": "w"}
    _, lines = interruption_table([one] * 25)
    assert lines[0] == [CACHE, "2026-01-02 03:04:05 UTC", "2 s", "w"]
    assert len(lines) == 21
    assert lines[-1][0] == "5 more"
