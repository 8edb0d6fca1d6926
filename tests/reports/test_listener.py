"""Listeners: what they hear of a run, several at once, and how one ends a run."""

import json
import subprocess
import sys

import pytest

import fedclip
from fedclip.errors import UsageError
from fedclip.reports.listener import Listener, Listeners
from tests.support.runs import CONFIG, StopAfter, contents, with_

EVERY_SECOND = with_(evaluation={"every": 2})


class Notes(fedclip.Listener):
    """Writes down what it hears; ends the run after a round, if told to."""

    def __init__(self, end_after=None, reason="patience"):
        self.heard = []
        self.end_after, self.reason = end_after, reason

    def __enter__(self):
        self.heard.append("enter")
        return self

    def __exit__(self, kind, error, trace):
        self.heard.append("exit")

    def start(self, config):
        self.heard.append(("start", config.federation.rounds))

    def rounds(self, finished, total, clients_per_round):
        self.heard.append(("rounds", finished, total, clients_per_round))

    def client(self, report):
        self.heard.append("client")

    def round(self, record):
        self.heard.append(("round", record["server_round"]))

    def stop(self):
        return self.reason if self.heard[-1] == ("round", self.end_after) else None

    def finish(self, summary):
        self.heard.append(("finish", summary["rounds"], summary["stopped_by"]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing disturbed, and what two listeners heard of it."""
    one, two = Notes(), Notes()
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return fedclip.run(EVERY_SECOND, output=folder, listener=[one, two]), one, two


def test_every_listener_hears_of_a_run_from_start_to_finish(undisturbed):
    run, one, two = undisturbed
    assert one.heard == two.heard
    assert one.heard == [
        "enter",
        ("start", 3),
        ("round", 0),
        ("rounds", 0, 3, 2),
        *["client", "client", ("round", 1)],
        *["client", "client", ("round", 2)],
        *["client", "client", ("round", 3)],
        ("finish", 3, None),
        "exit",
    ]
    assert run.summary["stopped_by"] is None


@pytest.mark.parametrize(
    ("end_after", "reason", "told"),
    [
        (1, "patience", "patience"),
        (2, "evaluation.patience: mine", "a listener: evaluation.patience: mine"),
    ],
)
def test_a_listener_ends_a_run_cleanly_and_it_resumes_to_the_same_bytes(
    undisturbed, tmp_path, end_after, reason, told
):
    """After round 1, which is not evaluated by itself, and after round 2, which is."""
    whole, folder, notes = undisturbed[0], tmp_path / "run", Notes(end_after, reason)
    ended = fedclip.run(EVERY_SECOND, output=folder, listener=[Listener(), notes])
    assert notes.heard[-2:] == [("finish", end_after, told), "exit"]
    assert ended.summary["stopped_by"] == told
    assert ended.summary["rounds"] == end_after
    assert json.loads((folder / "summary.json").read_text()) == ended.summary
    # It is finished: its adapter is there, and has the accuracy that the summary tells.
    assert fedclip.evaluate(folder)["accuracy"] == ended.summary["accuracy"]
    metrics = (whole.folder / "metrics.jsonl").read_bytes().splitlines()
    assert (folder / "metrics.jsonl").read_bytes().splitlines() == metrics[: end_after + 1]

    again = Notes()
    resumed = fedclip.resume(folder, listener=again)
    assert again.heard[1:3] == [("start", 3), ("rounds", end_after, 3, 2)]
    assert contents(folder) == contents(whole.folder)
    assert resumed.summary["stopped_by"] is None
    assert resumed.summary["state_sha256"] == whole.summary["state_sha256"]
    assert fedclip.resume(folder, listener=StopAfter(0)).summary == resumed.summary  # finished


def test_the_last_round_is_no_early_end(tmp_path):
    notes = Notes(3)
    assert (
        fedclip.run(CONFIG, output=tmp_path / "run", listener=notes).summary["stopped_by"] is None
    )


def test_an_error_of_a_listener_ends_the_run_and_keeps_the_round(undisturbed, tmp_path):
    class Broken(Listener):
        def round(self, record):
            if record["server_round"] == 2:
                raise ZeroDivisionError("the tracker's fault")

    notes, folder = Notes(), tmp_path / "run"
    with pytest.raises(ZeroDivisionError, match="the tracker's fault"):
        fedclip.run(EVERY_SECOND, output=folder, listener=[notes, Broken()])
    assert notes.heard[-2:] == [("round", 2), "exit"]
    again = Notes()
    fedclip.resume(folder, listener=again)
    assert ("rounds", 2, 3, 2) in again.heard
    assert contents(folder) == contents(undisturbed[0].folder)


@pytest.mark.parametrize("given", [Notes, "wandb", [Notes(), 3], [None]])
def test_what_is_no_listener_is_refused_before_anything_is_done(given, tmp_path):
    with pytest.raises(UsageError, match=r"derived from fedclip\.Listener"):
        fedclip.run(CONFIG, output=tmp_path / "run", listener=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reason", [True, False, "", 3])
def test_a_reason_is_text(reason):
    class Odd(Listener):
        def stop(self):
            return reason

    with pytest.raises(UsageError, match=r"Odd\.stop\(\) must return the reason as text"):
        Listeners([Listener(), Odd()]).stop()


def test_all_are_asked_and_the_first_reason_counts():
    ends = [Notes(1), Notes(), Notes(1)]
    for notes in ends:
        notes.round({"server_round": 1})
    assert Listeners(ends).stop() == "patience"
    assert Listeners(ends[1:2]).stop() is None


def test_all_are_left_where_one_cannot_be_entered_or_left():
    class Stuck(Listener):
        def __enter__(self):
            raise OSError("no")

    class Leaving(Listener):
        def __exit__(self, kind, error, trace):
            raise OSError("no")

    one, two = Notes(), Notes()
    with pytest.raises(OSError, match="no"), Listeners([one, Stuck()]):
        raise AssertionError("not reached")
    with pytest.raises(OSError, match="no"), Listeners([two, Leaving()]):
        pass
    assert one.heard == two.heard == ["enter", "exit"]


def test_listeners_pass_on_every_event():
    """An event added to `Listener` and forgotten in `Listeners` would be lost in silence."""
    events = {n for n in vars(Listener) if not n.startswith("_")} | {"__enter__", "__exit__"}
    assert events <= vars(Listeners).keys()


def test_public_names_load_no_torch_before_they_are_used():
    code = (
        "import sys, fedclip; from fedclip import Config, Listener, UsageError, load_config; "
        "assert 'torch' not in sys.modules; "
        "[getattr(fedclip, name) for name in fedclip.__all__]; assert 'torch' in sys.modules; "
        "assert set(fedclip.__all__) <= set(dir(fedclip))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
