"""Private runs: what they leave, tell, spend and refuse; resumed to the same bytes."""

import json
import shutil
import stat

import pytest

import fedclip
from fedclip.adapters.card import run_card
from fedclip.adapters.inspect import evaluate
from fedclip.config.loading import config_from_dict
from fedclip.deploy.coordinator.coordinate import coordinate
from fedclip.errors import FedclipWarning, TrainingFailed, UsageError
from fedclip.experiment import privacy_checks
from fedclip.experiment import run as experiment
from fedclip.experiment.bench.plan import make_plan
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.federated.privacy.accounting import Spent, epsilon
from fedclip.federated.strategies.averaging import FedAvg
from tests.support.runs import StopAfter
from tests.support.small import SMALL

PRIVACY = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3}
CONFIG = {
    "model": {"model_name": SMALL, "lora": {"r": 2, "last_layers": 1}},
    "data": {
        "name": "digits",
        "max_train_examples": 90,
        "batch_size": 8,
        "partition": {"name": "iid"},
    },
    "federation": {"strategy": "ffa", "rounds": 3, "num_clients": 3, "clients_per_round": 2},
    "privacy": PRIVACY,
}
COMPARED = (
    "metrics.jsonl",
    "partition.json",
    "config.yaml",
    "checkpoint.safetensors",
    "adapter/adapter_model.safetensors",
    "ledger.json",
)


def with_(**sections):
    return {**CONFIG, **{name: CONFIG.get(name, {}) | keys for name, keys in sections.items()}}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in COMPARED}


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    return fedclip.run(with_(privacy={"tell": True}), output=tmp_path_factory.mktemp("p") / "run")


def test_epsilon_is_that_of_the_largest_client_and_of_the_rounds_that_it_took_part_in(private):
    books = json.loads((private.folder / "ledger.json").read_text())
    partition = json.loads((private.folder / "partition.json").read_text())
    sizes = {c["client_id"]: c["train"]["num_examples"] for c in partition["clients"]}
    steps = dict.fromkeys(sizes, 0)
    for server_round, line in enumerate(lines(private.folder)):
        for entry in books["entries"]:
            if entry["server_round"] == server_round:
                assert len(entry["steps"]) == 2
                for client_id, count in entry["steps"].items():
                    assert count == round(sizes[client_id] / 8)
                    steps[client_id] += count
        spent = [epsilon(Spent(8 / n, 1.0, steps[c]), 1e-3) for c, n in sizes.items()]
        assert line["epsilon"] == pytest.approx(max(e.least for e in spent))
        assert line["epsilon_rdp"] == pytest.approx(max(e.rdp for e in spent))
    promise = private.summary["privacy"]
    assert promise["guarantee"] is True
    assert promise["epsilon"] == lines(private.folder)[-1]["epsilon"] > 0
    assert (promise["unit"], promise["delta"], promise["clip_norm"]) == ("example", 1e-3, 1.0)
    assert promise["noise_multiplier"] == [1.0, 1.0]


def test_nothing_tells_of_single_clients_but_the_file_that_was_asked_for(private):
    for line in lines(private.folder):
        assert not [key for key in line if "client" in key or "validation" in key]
        assert not {"loss", "num_examples"} & line.keys()
        assert {"accuracy", "epsilon"} <= line.keys() or line["server_round"]
    told = lines(private.folder, "told.jsonl")
    assert all(line["outside_the_guarantee"] is True for line in told)
    assert "accuracy_by_client" in told[0]
    assert len(told[2]["clients"]) == 2
    for name in ("partition.json", "summary.json", "timing.jsonl"):
        text = (private.folder / name).read_text()
        assert not [word for word in ("by_class", "indices_sha256", 'examples": {') if word in text]
    assert private.summary["client_accuracy"] is None
    assert all(line["clients"] == {} for line in lines(private.folder, "timing.jsonl"))


def test_a_finished_run_has_no_key_left_and_can_be_evaluated(private):
    assert not (private.folder / "noise.key").exists()
    assert evaluate(private.folder)["accuracy"] == private.summary["accuracy"]


def test_the_card_promises_what_was_spent(private):
    card = run_card(private.folder)
    spent = private.summary["privacy"]
    assert f"epsilon {spent['epsilon']:.3g} at delta 0.001" in card
    assert "any one training image" in card
    assert "no guarantee" not in card.lower()


@pytest.mark.parametrize("stop", [0, 2])
def test_an_interrupted_run_goes_on_to_the_bytes_of_its_own_key(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        experiment.run(CONFIG, output=tmp_path / "run", listener=StopAfter(stop))
    assert stat.S_IMODE((tmp_path / "run" / "noise.key").stat().st_mode) == 0o600
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    one = experiment.resume(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        experiment.resume(tmp_path / "twin", listener=StopAfter(stop + 1))
    two = experiment.resume(tmp_path / "twin")
    assert contents(one.folder) == contents(two.folder)
    entries = json.loads((one.folder / "ledger.json").read_text())["entries"]
    assert [entry["server_round"] for entry in entries] == [1, 2, 3]


def test_a_round_that_was_noted_and_killed_is_not_counted_twice(tmp_path, monkeypatch):
    def killed(self, folder):
        if self.finished_rounds == 2:
            raise TrainingFailed("killed")
        kept(self, folder)

    kept = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", killed)
    with pytest.raises(TrainingFailed):
        experiment.run(CONFIG, output=tmp_path / "run")
    monkeypatch.setattr(Checkpoint, "save", kept)
    noted = json.loads((tmp_path / "run" / "ledger.json").read_text())["entries"]
    assert [entry["server_round"] for entry in noted] == [1, 2]
    run = experiment.resume(tmp_path / "run")
    after = json.loads((run.folder / "ledger.json").read_text())["entries"]
    assert after[:2] == noted
    assert [entry["server_round"] for entry in after] == [1, 2, 3]


def test_a_run_killed_after_its_key_is_gone_still_comes_to_its_end(tmp_path, monkeypatch):
    whole = experiment.write_summary
    monkeypatch.setattr(experiment, "write_summary", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        experiment.run(CONFIG, output=tmp_path / "run")
    assert not (tmp_path / "run" / "noise.key").exists()
    monkeypatch.setattr(experiment, "write_summary", whole)
    assert experiment.resume(tmp_path / "run").summary["privacy"]["epsilon"] > 0


def test_who_knows_the_configuration_cannot_make_the_same_run(private, tmp_path):
    again = fedclip.run(with_(privacy={"tell": True}), output=tmp_path / "run")
    assert again.summary["adapter_sha256"] != private.summary["adapter_sha256"]
    assert again.summary["privacy"] == private.summary["privacy"]


def test_a_reproducible_run_repeats_and_promises_nothing(tmp_path):
    said = []

    class Heard(StopAfter):
        def message(self, text):
            said.append(text)

    config = with_(privacy={"reproducible": True})
    one = fedclip.run(config, output=tmp_path / "one", listener=Heard(99))
    two = fedclip.run(config, output=tmp_path / "two")
    assert contents(one.folder) == contents(two.folder)
    assert not (one.folder / "noise.key").exists()
    assert one.summary["privacy"]["guarantee"] is False
    assert "**No guarantee of privacy**" in run_card(one.folder)
    assert any("no guarantee" in text for text in said)


def test_a_target_is_met_from_below_by_every_client_for_itself(tmp_path):
    config = with_(
        privacy={"noise_multiplier": None, "target_epsilon": 2.0},
        data={"partition": {"name": "dirichlet", "alpha": 5.0, "min_size": 12}},
        federation={"clients_per_round": None, "rounds": 2},
    )
    run = fedclip.run(config, output=tmp_path / "run")
    books = json.loads((run.folder / "ledger.json").read_text())
    noises = {m["noise_multiplier"] for m in books["mechanisms"].values()}
    assert len(noises) == 3
    for client_id, m in books["mechanisms"].items():
        steps = sum(entry["steps"][client_id] for entry in books["entries"])
        spent = epsilon(Spent(m["sampling_rate"], m["noise_multiplier"], steps), 1e-3).least
        assert 1.96 <= spent <= 2.0
    assert 1.96 <= run.summary["privacy"]["epsilon"] <= 2.0


class TrainsTwice(FedAvg):
    """Asks every client twice, which no plan of the noise knows."""

    def round(self, state, request, train):
        from dataclasses import replace

        half = super().round(state, request, train)
        return super().round(half, replace(request, state=half.shared), train)


def test_a_run_stops_before_the_round_that_exceeds_its_budget(tmp_path):
    config = with_(
        privacy={"noise_multiplier": None, "target_epsilon": 2.0},
        federation={
            "clients_per_round": None,
            "rounds": 2,
            "strategy": f"{__file__}:TrainsTwice",
        },
    )
    run = fedclip.run(config, output=tmp_path / "run")
    assert run.summary["rounds"] == 1
    assert "above 2" in run.summary["stopped_by"]
    assert run.summary["privacy"]["epsilon"] <= 2.0
    assert run.summary["accuracy"] is not None
    assert (run.adapter / "adapter_model.safetensors").exists()


def test_clients_can_be_hidden_and_who_took_part_too(tmp_path):
    config = with_(
        privacy={"unit": "client", "noise_multiplier": 3.0, "delta": 1e-2, "tell": True},
        data={"max_train_examples": 60},
        federation={"num_clients": 12, "clients_per_round": 1, "rounds": 4, "strategy": "fedsvd"},
    )
    with pytest.warns(FedclipWarning, match=r"with 12 clients: noise|times privacy.clip_norm"):
        run = fedclip.run(config, output=tmp_path / "run")
    told, shown = lines(run.folder, "told.jsonl"), lines(run.folder)
    taking_part = [len(line.get("clients", {})) for line in told[1:]]
    assert len(set(taking_part)) > 1  # not a fixed number, as four draws of Binomial(12, 1/12) are
    assert len({line["bytes_up"] for line in shown[1:]}) == 1
    assert shown[-1]["epsilon"] == pytest.approx(epsilon(Spent(1 / 12, 3.0, 4), 1e-2).least)
    assert "any one client" in run_card(run.folder)


@pytest.mark.filterwarnings("ignore:privacy.unit. client")
def test_a_clip_norm_that_follows_is_told_kept_and_gone_on_with(tmp_path):
    config = with_(
        privacy={
            "unit": "client",
            "noise_multiplier": 0.3,
            "delta": 1e-2,
            "clip_quantile": 0.5,
            "clip_norm": 0.01,
            "reproducible": True,
        },
        data={"max_train_examples": 60},
        federation={"num_clients": 12, "clients_per_round": 6, "rounds": 3},
    )
    whole = fedclip.run(config, output=tmp_path / "whole")
    norms = [line["clip_norm"] for line in lines(whole.folder)]
    assert (
        norms[0] == 0.01 < norms[1] < norms[2] < norms[3] == whole.summary["privacy"]["clip_norm"]
    )
    books = json.loads((whole.folder / "ledger.json").read_text())
    assert [own["noise_multiplier"] for own in books["mechanisms"].values()] == [0.3]
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, output=tmp_path / "cut", listener=StopAfter(2))
    assert contents(experiment.resume(tmp_path / "cut").folder) == contents(whole.folder)
    few = with_(**{k: v for k, v in config.items() if k in ("data", "federation")}, privacy={
        **config["privacy"], "noise_multiplier": 3.0,
    })  # fmt: skip
    with pytest.raises(UsageError, match=r"privacy.clip_quantile: a noise multiplier of 3"):
        fedclip.run(few, output=tmp_path / "few")


@pytest.mark.parametrize("strategy", ["qfedavg", "fedsa", "flora", "fedex", "fed_sb", "hetlora"])
def test_strategies_that_read_single_updates_are_refused_before_the_run(tmp_path, strategy):
    config = with_(privacy={"unit": "client", "delta": 1e-2}, federation={"strategy": strategy})
    with pytest.raises(UsageError, match=r"single updates|model for each client"):
        fedclip.run(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privacy": {"unit": None}}, r"without privacy.unit"),
        ({"privacy": {"target_epsilon": 1.0}}, "both are given"),
        ({"privacy": {"noise_multiplier": None}}, "neither is given"),
        ({"privacy": {"delta": None}}, "privacy.delta is missing"),
        ({"privacy": {"clip_norm": 0}}, r"privacy.clip_norm must be a number > 0"),
        ({"privacy": {"target_epsilon": -1}}, r"privacy.target_epsilon must be a number > 0"),
        ({"privacy": {"delta": 1}}, r"privacy.delta must be a number"),
        ({"privacy": {"clip_quantile": 0.5}}, "with privacy.unit: example set privacy.clip_norm"),
        ({"privacy": {"clip_quantile": 1.0}}, "privacy.clip_quantile must be"),
        ({"evaluation": {"keep_best": True}}, "keep_best does not go with privacy.unit"),
        ({"federation": {"strategy": "qfedavg"}}, "reads each client's exact loss"),
        ({"federation": {"strategy": "local"}}, "a model for each client"),
        ({"federation": {"scaffold": True, "strategy": "fedavg"}}, "control variate"),
        ({"federation": {"ditto_mu": 0.1}}, "trains every client twice"),
        ({"federation": {"client_ranks": [1, 2], "strategy": "flexlora"}}, "fill the rows"),
        ({"precision": "fp16"}, "precision: fp16"),
        ({"model": {"lora": {"use_dora": True}}}, "use_dora"),
        (
            {"model": {"lora": {"enabled": False}}, "federation": {"strategy": "fedavg"}},
            "noise grows with the number",
        ),
        ({"data": {"accumulation_steps": 2}}, "one random batch"),
        ({"engine": {"name": "mine.py:Mine"}}, "not known to keep privacy"),
    ],
    ids=str,
)
def test_what_cannot_be_promised_is_an_error_of_the_configuration(change, words):
    config = {**CONFIG, **{k: v for k, v in change.items() if not isinstance(v, dict)}}
    config |= {k: CONFIG.get(k, {}) | v for k, v in change.items() if isinstance(v, dict)}
    if change.get("precision"):
        config["precision"] = change["precision"]
    with pytest.raises(UsageError, match=words):
        config_from_dict(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"batch_size": 40}}, "data.batch_size: 40 is more than the .* of client"),
        ({"privacy": {"delta": 0.04}}, r"privacy.delta must be less than .* client client-0"),
        (
            {
                "model": {
                    "head": "linear",
                    "lora": {"target_modules": {"text_encoder": ["q_proj"]}},
                }
            },
            "leave text_encoder out",
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*does not use the text tower")
def test_what_only_the_data_and_model_show_is_refused_before_the_run(tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        fedclip.run(with_(**change), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_delta_is_below_one_over_the_clients(tmp_path):
    config = with_(privacy={"unit": "client", "delta": 0.4})
    with pytest.raises(UsageError, match="number of clients, 1/3"):
        fedclip.run(config, output=tmp_path / "run")


def test_without_an_accountant_nothing_begins(tmp_path, monkeypatch):
    def missing():
        raise UsageError("pip install 'fedclip[privacy]'")

    monkeypatch.setattr(privacy_checks, "require_accountant", missing)
    with pytest.raises(UsageError, match=r"fedclip\[privacy\]"):
        fedclip.run(CONFIG, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_federation_over_machines_hides_no_whole_clients(tmp_path):
    config = config_from_dict(with_(privacy={"unit": "client"}))
    with pytest.raises(UsageError, match=r"privacy.unit: client is for runs on one machine"):
        coordinate(config, tmp_path / "run", lambda text: None)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["noise.key", "ledger.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "foreign"])
def test_a_run_does_not_go_on_without_its_own_key_and_books(tmp_path, name, damage):
    with pytest.raises(KeyboardInterrupt):
        experiment.run(CONFIG, output=tmp_path / "run", listener=StopAfter(1))
    path = tmp_path / "run" / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:20])
    else:
        with pytest.raises(KeyboardInterrupt):
            experiment.run(
                with_(client={"learning_rate": 0.02}),
                output=tmp_path / "other",
                listener=StopAfter(0),
            )
        path.write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(UsageError, match=name):
        experiment.resume(tmp_path / "run")
    path.write_bytes(whole)
    path.chmod(0o600)
    assert experiment.resume(tmp_path / "run").summary["rounds"] == 3


def test_private_arms_are_not_tuned_by_the_clients_images(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(CONFIG))
    grid = {
        "config": "run.yaml",
        "overrides": ["data.test_seed=7"],
        "seeds": [0, 1],
        "reference": "tuned",
        "arms": {
            "tuned": {"tune": {"client.learning_rate": [0.01, 0.02]}},
            "fixed": {"tune": {"client.learning_rate": [0.01]}},
        },
    }
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    plan = make_plan(tmp_path / "grid.yaml")
    assert "would choose by validation images" in plan.problem("tuned")
    assert plan.problem("fixed") is None
