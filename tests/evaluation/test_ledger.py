"""Finished questions on disk: what a kill leaves, and what may be gone on with."""

from __future__ import annotations

import contextlib
import json

import pytest

from searchr1.errors import UserError
from searchr1.evaluation.ledger import MANIFEST, Ledger
from searchr1.evaluation.manifest import differences
from searchr1.evaluation.results import score_rows
from searchr1.tracking.trajectory_log import eval_file


def manifest(**changes):
    return {"model": "abc", "attempts": 1, "sampling": {"temperature": 0.0, "stop": ["</answer>"]}} | changes


def test_what_was_finished_is_there_again(tmp_path, make_trajectory):
    with Ledger.open(tmp_path, manifest()) as ledger:
        assert ledger.finished == set()
        ledger.append([make_trajectory(3), make_trajectory(1)])
        ledger.append([make_trajectory(7, right=False)])
        # Before it is closed: a kill takes no row.
        assert eval_file(tmp_path, 0).read_bytes().count(b"\n") == 3
    with Ledger.open(tmp_path, manifest()) as again:
        assert again.finished == {1, 3, 7}
        again.append([make_trajectory(2)])
        assert [row["number"] for row in again.rows()] == [3, 1, 7, 2]


@pytest.mark.parametrize("rollouts", [1, 2])
def test_cut_off_at_any_byte_every_whole_question_is_kept(tmp_path, make_trajectory, rollouts):
    rows = [make_trajectory(i, rollout_id=r, answer="Zoë") for i in range(3) for r in range(rollouts)]
    with Ledger.open(tmp_path / "whole", manifest(attempts=rollouts)) as ledger:
        ledger.append(rows)
    data = eval_file(tmp_path / "whole", 0).read_bytes()
    per_question = len(data) // 3
    folder = tmp_path / "torn"
    for cut in range(0, len(data) + 1, 31):
        with Ledger.open(folder, manifest(attempts=rollouts)):
            eval_file(folder, 0).write_bytes(data[:cut])
        with Ledger.open(folder, manifest(attempts=rollouts)) as ledger:
            assert ledger.finished == set(range(cut // per_question)), cut
            ledger.append([row for row in rows if row.sample.index not in ledger.finished])
        assert eval_file(folder, 0).read_bytes() == data, cut


def test_a_hole_that_a_power_cut_leaves_at_the_end_is_cut_off(tmp_path, make_trajectory):
    with Ledger.open(tmp_path, manifest()) as ledger:
        ledger.append([make_trajectory(0)])
    with eval_file(tmp_path, 0).open("ab") as file:
        file.write(b"\0" * 40 + b"\n")
    with Ledger.open(tmp_path, manifest()) as ledger:
        assert ledger.finished == {0}
        assert len(list(ledger.rows())) == 1


def test_a_damaged_line_in_the_middle_is_named(tmp_path, make_trajectory):
    with Ledger.open(tmp_path, manifest()) as ledger:
        ledger.append([make_trajectory(0)])
    path = eval_file(tmp_path, 0)
    path.write_bytes(path.read_bytes() + b'{"number": 1}\n' + path.read_bytes())
    with pytest.raises(UserError, match=rf"{path}:2: not a logged answer"):
        Ledger.open(tmp_path, manifest())


def test_answers_of_another_model_are_not_gone_on_with(tmp_path):
    with Ledger.open(tmp_path, manifest()):
        pass
    changed = manifest(model="xyz", sampling={"temperature": 1.0, "stop": ["</answer>"]})
    with pytest.raises(UserError, match="cannot go on with") as error:
        Ledger.open(tmp_path, changed)
    assert "runner.overwrite=True" in str(error.value)
    assert "model was 'abc', is 'xyz'" in str(error.value)
    assert "sampling.temperature was 0.0, is 1.0" in str(error.value)
    assert "stop" not in str(error.value)


def test_rows_without_their_manifest_and_an_unreadable_one_are_rejected(tmp_path, make_trajectory):
    with Ledger.open(tmp_path, manifest()) as ledger:
        ledger.append([make_trajectory()])
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not readable"):
        Ledger.open(tmp_path, manifest())
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match="not what they were made with"):
        Ledger.open(tmp_path, manifest())


@pytest.mark.parametrize("anew", [True, False])
def test_looking_changes_nothing(tmp_path, make_trajectory, anew):
    with Ledger.open(tmp_path, manifest()) as ledger:
        ledger.append([make_trajectory(0)])
    with eval_file(tmp_path, 0).open("ab") as file:
        file.write(b'{"number": 1, "rep')  # a kill in the middle of a line
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    ledger = Ledger.open(tmp_path, manifest(), anew=anew)
    assert ledger.finished == (set() if anew else {0})
    ledger.close()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()} == before
    Ledger.open(tmp_path / "fresh", manifest()).close()
    assert not (tmp_path / "fresh").exists()


def test_questions_that_a_failed_tool_spoiled_are_asked_again(tmp_path, make_trajectory):
    spoiled, broken = make_trajectory(1), make_trajectory(2, stop="error")
    spoiled.turns[0].tool_error = "no answer"
    with Ledger.open(tmp_path, manifest()) as ledger:
        ledger.append([make_trajectory(0), spoiled, broken])
    with Ledger.open(tmp_path, manifest()) as ledger:
        assert (ledger.finished, ledger.spoiled) == ({0}, {1, 2})
        ledger.append([make_trajectory(1)])
    with Ledger.open(tmp_path, manifest()) as ledger:
        assert (ledger.finished, ledger.spoiled) == ({0, 1}, {2})


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"runner\.output_dir"):
        Ledger.open(tmp_path / "file/eval", manifest()).begin()


def test_a_full_disk_is_reported(tmp_path, make_trajectory):
    with Ledger.open(tmp_path, manifest()) as ledger:
        ledger._file.close()
        with open("/dev/full", "wb") as full:
            ledger._file = full
            with pytest.raises(UserError, match="No space left"):
                ledger.append([make_trajectory()])
            with contextlib.suppress(OSError):
                full.close()


def test_half_of_a_surrogate_pair_can_be_written_and_read(tmp_path, make_trajectory):
    with Ledger.open(tmp_path, manifest()) as ledger:
        ledger.append([make_trajectory(0, answer="\ud800 x")])
    with Ledger.open(tmp_path, manifest()) as ledger:
        assert ledger.finished == {0}
        score_rows(ledger.rows(), 1, "here")


def test_a_rollout_that_was_written_twice_counts_once_the_last_time(tmp_path, make_trajectory):
    with Ledger.open(tmp_path, manifest()) as ledger:
        ledger.append([make_trajectory(0, right=False), make_trajectory(1), make_trajectory(0)])
        rollouts, _ = score_rows(ledger.rows(), 2, "here")
    assert [rollout.exact_match for rollout in rollouts] == [1, 1]


def test_missing_and_foreign_rows_are_reported(make_trajectory):
    with pytest.raises(UserError, match="here: 0 rollouts are there, 3 were asked for"):
        score_rows([], 3, "here")
    with pytest.raises(UserError, match="not a logged answer"):
        score_rows([{"number": 0, "turns": 3}], 1, "here")


def test_differences_name_what_is_missing_too():
    assert list(differences({"a": 1, "b": {"c": [1]}}, {"b": {"c": [2]}, "d": None})) == [
        "a was None, is 1",
        "b.c was [2], is [1]",
    ]
    assert list(differences(json.loads(json.dumps(manifest())), manifest())) == []
