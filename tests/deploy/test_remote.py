"""Federations over machines, without the machines: sites are functions in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fedclip.config.loading import config_from_dict
from fedclip.deploy.coordinator import rounds as server_run
from fedclip.deploy.job import make_job
from fedclip.deploy.messages.envelope import Envelope, read_header
from fedclip.deploy.remote.roster import Roster
from fedclip.deploy.site.config import PolicyConfig, SiteConfig, load_site
from fedclip.deploy.site.policy import Against, check_adapter, check_clock, check_job, preflight
from fedclip.deploy.site.private_state import PrivateState
from fedclip.errors import FedclipWarning, TrainingFailed, UsageError
from fedclip.experiment.build import model_seed
from fedclip.experiment.run import run
from fedclip.models.adapter_folder import read_adapter
from fedclip.models.clip import create_clip_model
from fedclip.models.summary import base_sha256
from tests.support.machines import (
    MAY_LEAVE,
    NAMES,
    FakeMail,
    clock_by_hand,
    coordinate_here,
    sequential,
    trainer,
    tree,
    write_images,
)
from tests.support.models import PROBE

Site = Callable[[bytes], bytes | None]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def honest(images: Path, state: Path, **keys: Any) -> dict[str, Site]:
    return {name: trainer(images, state, name, **keys).answer for name in NAMES}


def on_training(site: Site, change: Callable[[bytes, bytes], bytes | None]) -> Site:
    """A site whose answers to training requests are changed: from request and honest answer."""

    def answer(data: bytes) -> bytes | None:
        honest_answer = site(data)
        if honest_answer is None or read_header(data)["kind"] != "train":
            return honest_answer
        return change(data, honest_answer)

    return answer


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"federation": {"strategy": "fedsa"}},
        {"federation": {"ditto_mu": 0.1}},
        {"model": PROBE},
        {"federation": {"strategy": "flora"}},
        {"federation": {"strategy": "flexlora", "dynamic_ranks": {"enabled": True, "every": 1}}},
    ],
    ids=["fedavg", "fedsa", "ditto", "probe", "flora", "dynamic"],
)
def test_a_run_over_machines_is_the_sequential_engines_to_the_last_site(
    images: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    """As on one machine, where personal adapters are beside the shared one."""
    alone = run(sequential(images, **sections), output=tmp_path / "alone")
    mail = FakeMail(honest(images, tmp_path))
    done, _ = coordinate_here(config_from_dict(tree(images, **sections)), tmp_path / "run", mail)
    assert done.summary["adapter_sha256"] == alone.summary["adapter_sha256"]
    assert done.summary["clients"] == 3
    assert done.summary["engine"] == "flower"
    for name in NAMES:
        own = alone.folder / "adapter_of" / name
        whole = own if own.exists() else alone.adapter
        assert_same_adapter(tmp_path / name / "adapter", whole)
    last, last_alone = (json.loads((r.folder / "metrics.jsonl").read_text().splitlines()[-1])
                        for r in (done, alone))  # fmt: skip
    assert last["accuracy_by_client"] == last_alone["accuracy_by_client"]
    assert None not in last["accuracy_by_client"].values()
    assert done.summary["client_accuracy"] == alone.summary["client_accuracy"]
    if (alone.folder / "adapter_of").exists():  # there is no other model
        assert done.summary["accuracy"] == pytest.approx(alone.summary["accuracy"])


def assert_same_adapter(one: Path, other: Path) -> None:
    """Folders with equal tensors and equal ranks."""
    (tensors, _, config), (theirs, _, other_config) = map(read_adapter, (one, other))
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, theirs[name])
    assert config == other_config


def test_a_site_may_keep_its_accuracy_to_itself_and_a_silent_one_is_named(
    images: Path, tmp_path: Path
) -> None:
    def no_result(site: Site) -> Site:
        return lambda data: None if read_header(data)["kind"] == "result" else site(data)

    sites = honest(images, tmp_path)
    sites["north"] = trainer(images, tmp_path, "north", policy={"tell_accuracy": False}).answer
    sites["south"] = no_result(sites["south"])
    sections = {"federation": {"strategy": "fedsa"}, "deploy": {"round_deadline": 3.0}}
    done, said = coordinate_here(
        config_from_dict(tree(images, **sections)), tmp_path / "run", FakeMail(sites)
    )
    assert done.summary["client_accuracy"]["min"] == done.summary["accuracy"]  # west's
    assert "south has not answered to the result" in said
    assert (tmp_path / "north/adapter/adapter_model.safetensors").exists()


def test_a_class_without_a_test_image_is_named_at_the_coordinator(
    images: Path, tmp_path: Path
) -> None:
    sections = {"evaluation": {"max_examples": 2}, "federation": {"rounds": 1}}
    mail = FakeMail(honest(images, tmp_path))
    config = config_from_dict(tree(images, **sections))
    done, said = coordinate_here(config, tmp_path / "run", mail)
    missing = done.summary["classes_not_tested"]
    assert len(missing) >= 3
    (told,) = [text for text in said if text.startswith("warning: ")]
    assert told.startswith(f"warning: {len(missing)} of 5 classes have no test image")
    assert ", ".join(missing) in told


def test_a_site_too_small_to_hold_out_a_test_image_takes_part(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"north": 24, "south": 1, "west": 30})
    mail = FakeMail(honest(images, tmp_path))
    sections = {"federation": {"rounds": 1}}
    done, said = coordinate_here(config_from_dict(tree(images, **sections)), tmp_path / "run", mail)
    assert "south is there, with 1 training examples" in said
    last = json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy_by_client"]["south"] is None
    with pytest.warns(FedclipWarning, match="site south has images of one class only"):
        alone = run(sequential(images, **sections), output=tmp_path / "alone")
    assert done.summary["adapter_sha256"] == alone.summary["adapter_sha256"]


class Killed(Exception):
    """The coordinator ends here."""


@pytest.mark.parametrize("sections", [{"deploy": {"up": "int8"}}], ids=["int8"])
def test_a_killed_coordinator_goes_on_to_the_same_adapter(
    images: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Sites have trained a round whose end the coordinator has not written: it is asked again."""
    config = config_from_dict(tree(images, **sections, federation={"strategy": "fedsa"}))
    undisturbed, _ = coordinate_here(
        config, tmp_path / "undisturbed", FakeMail(honest(images, tmp_path / "one"))
    )
    sites = honest(images, tmp_path / "two")

    def kills(data: bytes, answer: bytes) -> bytes:
        if read_header(data)["round"] == 2:
            raise Killed
        return answer

    deadly = sites | {"south": on_training(sites["south"], kills)}
    with pytest.raises(Killed):
        coordinate_here(config, tmp_path / "run", FakeMail(deadly))
    # New processes at the sites too, and with them nothing in memory.
    done, said = coordinate_here(
        config, tmp_path / "run", FakeMail(honest(images, tmp_path / "two"))
    )
    assert done.summary["state_sha256"] == undisturbed.summary["state_sha256"]
    assert not any("round 1:" in line for line in said)


def test_nothing_but_the_allowed_fields_leaves_a_site(images: Path, tmp_path: Path) -> None:
    sections = {"federation": {"strategy": "fedsa"}, "deploy": {"up": "int8"}}
    mail = FakeMail(honest(images, tmp_path))
    coordinate_here(config_from_dict(tree(images, **sections)), tmp_path / "run", mail)
    assert {read_header(data)["kind"] for _, data in mail.received} == {"ready", "update", "tested"}
    for name, data in mail.received:
        envelope = Envelope.unpack(data)
        assert set(envelope.header) <= MAY_LEAVE[envelope.kind]
        for value in envelope.header.values():  # no lists that could hold one thing per example
            assert isinstance(value, str | int | float | dict | None)
        if envelope.kind == "update":
            assert set(envelope.tensors) == {"update/A", "update/A.scale"}  # no B of FedSA
        else:
            assert not envelope.tensors
        if envelope.kind == "ready":
            assert set(envelope.header["software"]) == {"fedclip", "torch"}
        text = data.decode("latin-1")
        assert str(tmp_path) not in text
        assert str(images) not in text
        assert ".png" not in text
        assert "digit" not in text  # a class's name
        for image in (images / "sites" / name).rglob("*.png"):
            assert image.read_bytes()[40:80] not in data


def rewritten(data: bytes, **header: Any) -> bytes:
    envelope = Envelope.unpack(data)
    return Envelope({**envelope.header, **header}, envelope.tensors).pack()


def scaled(data: bytes, by: float) -> bytes:
    envelope = Envelope.unpack(data)
    return Envelope(envelope.header, {n: t * by for n, t in envelope.tensors.items()}).pack()


BAD: dict[str, tuple[Callable[[bytes, bytes], bytes | None], str]] = {
    "NaN": (lambda q, a: scaled(a, float("nan")), "south sends values that are not finite"),
    "100 times": (lambda q, a: scaled(a, 1e3), "south sends an update .* times as large"),
    "stale": (lambda q, a: rewritten(a, round=0), "south sends a stale answer"),
    "replay": (lambda q, a: rewritten(a, nonce="used"), "south sends an answer to another request"),
    "base": (lambda q, a: rewritten(a, base="x"), "south has another base model"),
    "rank": (lambda q, a: rewritten(a, ranks={"1": 16}), "south sends factors of other ranks"),
    "too large": (lambda q, a: a + b" " * 10**6, "south: the message has .* are the most"),
    "silence": (lambda q, a: None, "south has not answered within 0.3 s"),
}


@pytest.mark.parametrize(("change", "why"), BAD.values(), ids=BAD)
def test_a_bad_answer_drops_its_site_and_the_round_goes_on(
    images: Path, tmp_path: Path, change: Callable[[bytes, bytes], bytes | None], why: str
) -> None:
    sites = honest(images, tmp_path)
    sites["south"] = on_training(sites["south"], change)
    config = config_from_dict(
        tree(
            images,
            federation={"rounds": 1},
            evaluation={"max_examples": 1},
            deploy={"round_deadline": 0.3, "largest_message_mb": 1.0},
        )
    )
    done, said = coordinate_here(config, tmp_path / "run", FakeMail(sites))
    line = [line for line in said if "south" in line][-1]
    assert re.search(f"^round 1: .*{why}", line), line
    last = json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert sorted(last["clients"]) == ["north", "west"]


def test_a_round_without_a_quorum_is_tried_again_and_then_stops(
    images: Path, tmp_path: Path
) -> None:
    sites = honest(images, tmp_path)
    asked: list[int] = []

    def late(request: bytes, answer: bytes) -> bytes | None:
        asked.append(1)
        return answer if len(asked) > 2 else None

    config = tree(
        images,
        federation={"rounds": 1},
        evaluation={"max_examples": 1},
        deploy={"round_deadline": 0.3, "quorum": 1.0},
    )
    flaky = sites | {"west": on_training(sites["west"], late)}
    _, said = coordinate_here(config_from_dict(config), tmp_path / "one", FakeMail(flaky))
    assert len(asked) == 3
    assert sum("2 of 3 sites have answered, 3 are needed; missing: west" in s for s in said) == 2

    silent = sites | {"west": on_training(sites["west"], lambda q, a: None)}
    with pytest.raises(TrainingFailed, match=r"round 1: 2 of 3 .* missing: west; the last"):
        coordinate_here(config_from_dict(config), tmp_path / "two", FakeMail(silent))


def test_too_few_sites_at_the_start_are_not_waited_for_forever(
    images: Path, tmp_path: Path
) -> None:
    sites = {"north": honest(images, tmp_path)["north"]}
    deploy = {"join_deadline": 0.2, "sites": list(NAMES)}
    config = config_from_dict(tree(images, deploy=deploy))
    with pytest.raises(TrainingFailed, match=r"1 of 3 sites .* missing: south, west"):
        coordinate_here(config, tmp_path / "run", FakeMail(sites))


def test_a_site_that_comes_late_takes_part_from_then_on(images: Path, tmp_path: Path) -> None:
    sites = honest(images, tmp_path)

    class Late(FakeMail):
        def online(self) -> dict[int, str]:
            there = dict(super().online())
            trained = sum(read_header(data)["kind"] == "train" for _, data in self.sent)
            return there if trained else {n: name for n, name in there.items() if name != "west"}

    deploy = {"join_deadline": 0.2, "sites": list(NAMES), "round_deadline": 60.0}
    config = config_from_dict(tree(images, deploy=deploy))
    done, said = coordinate_here(config, tmp_path / "run", Late(sites))
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(line.get("clients", ())) for line in lines[1:]] == [
        ["north", "south"],
        sorted(NAMES),
    ]
    assert "beginning without west, who may come later" in said
    assert json.loads((done.folder / "deploy/sites.json").read_text()).keys() == set(NAMES)


def test_names_that_do_not_fit_are_refused(images: Path, tmp_path: Path) -> None:
    """A key of one site used by another; and without keys, a site that nobody expects."""
    sites = honest(images, tmp_path)
    impostor = {"north": sites["south"], "west": sites["west"]}
    deploy = {"join_deadline": 0.2, "quorum": 1, "sites": ["north", "west"]}
    config = config_from_dict(tree(images, federation={"rounds": 1}, deploy=deploy))
    _, said = coordinate_here(config, tmp_path / "one", FakeMail(impostor))
    assert any("north calls itself 'south'; its key is registered as north" in s for s in said)
    _, said = coordinate_here(config, tmp_path / "two", FakeMail(sites, keyed=False))
    assert any("south is not among the sites of this run" in line for line in said)


def test_a_sites_policy_is_heard_at_the_coordinator(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = honest(images, tmp_path)
    policies = {
        "north": {"strategies": ["ffa"]},
        "south": {"largest_adapter_mb": 0.001},
        "west": {"most_rounds": 1},
    }
    for name, policy in policies.items():
        sites[name] = trainer(images, tmp_path, name, policy=policy).answer
    config = config_from_dict(tree(images, deploy={"join_deadline": 0.1, "quorum": 1}))
    lines: list[str] = []
    monkeypatch.setattr(
        "tests.support.machines.Lines.message", lambda self, text: lines.append(text)
    )
    with pytest.raises(TrainingFailed, match="0 of 3 sites"):
        coordinate_here(config, tmp_path / "run", FakeMail(sites))
    text = "\n".join(lines)
    assert "north refuses: its policy does not allow fedavg (allowed: ffa)" in text
    assert "south refuses: its policy allows an adapter of 0.001 MB" in text
    assert "west refuses: its policy allows 1 rounds, the run has 2" in text


def test_classes_that_the_run_does_not_know_stay_at_the_site(images: Path, tmp_path: Path) -> None:
    """The coordinator hears that the data do not fit, and not which classes there are."""
    folder = tmp_path / "images/sites/north/secret_disease"
    write_images(tmp_path / "images")
    folder.mkdir()
    next((tmp_path / "images/sites/north/digit_1").iterdir()).rename(folder / "a.png")
    heard: list[str] = []
    site = trainer(tmp_path / "images", tmp_path, "north")
    site._say = heard.append
    mail = FakeMail({"north": site.answer})
    config = config_from_dict(tree(images, deploy={"join_deadline": 0.1, "quorum": 1}))
    with pytest.raises(TrainingFailed):
        coordinate_here(config, tmp_path / "run", mail)
    assert any("secret disease" in line for line in heard)
    (answer,) = [data for _, data in mail.received]
    assert b"secret" not in answer
    assert "its own log says how" in read_header(answer)["reason"]


def test_the_rounds_wait_for_the_folder_of_a_killed_coordinator(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedclip.experiment.folder import RunFolder

    monkeypatch.setattr(server_run, "LOCK_PATIENCE", 0.0)
    config = config_from_dict(tree(images))
    folder = RunFolder.create(tmp_path / "run", "seed: 0")
    with folder.exclusive(), pytest.raises(UsageError, match="another process is working"):
        coordinate_here(config, tmp_path / "run", FakeMail({}))


# A site's own side


def test_private_state_is_that_before_the_round(tmp_path: Path) -> None:
    private = PrivateState(tmp_path, "run", "client", pytest.fail)
    assert private.before(1) == {}
    for number in (1, 2, 3):
        private.save(number, {"x": torch.tensor([float(number)])})
    assert private.before(3)["x"].item() == 2.0
    private.save(2, {"x": torch.tensor([20.0])})  # asked again: what came after is void
    assert private.before(9)["x"].item() == 20.0
    for number in range(3, 9):
        private.save(number, {"x": torch.tensor([float(number)])})
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert all(path.stat().st_mode & 0o77 == 0 for path in tmp_path.rglob("*.safetensors"))


def test_private_state_with_a_flipped_bit_is_named_and_the_one_before_is_taken(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    private = PrivateState(tmp_path, "run", "client", said.append)
    for number in (1, 2):
        private.save(number, {"x": torch.full((3,), float(number))})
    newest = tmp_path / "run" / "client" / "2.safetensors"
    whole = newest.read_bytes()
    for place in range(len(whole)):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        said.clear()
        assert private.before(3)["x"].tolist() == [1.0] * 3, place
        assert "2.safetensors" in said[0]
    newest.write_bytes(whole)
    assert private.before(3)["x"].tolist() == [2.0] * 3
    newest.write_bytes(save({"x": torch.zeros(1)}))  # as an older version wrote it
    assert private.before(3)["x"].tolist() == [0.0]


def test_a_run_named_by_another_machine_is_no_path(tmp_path: Path) -> None:
    PrivateState(tmp_path / "in", "../../out", "../x", pytest.fail).save(1, {"x": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_preflight_names_everything_that_is_wrong(images: Path, tmp_path: Path) -> None:
    good = SiteConfig.model_validate(
        {"state": str(tmp_path / "s"), "data": {"path": str(images / "sites/north")},
         "free_memory_gb": 0.0, "free_disk_gb": 0.0}
    )  # fmt: skip
    facts = preflight(good)
    assert facts["images"] == 24
    assert len(facts["classes"]) == 5
    bad = good.model_copy(
        update={
            "free_disk_gb": 1e9,
            "free_memory_gb": 1e9,
            "model": str(tmp_path / "none"),
            "data": good.data.model_copy(update={"path": str(tmp_path / "nothing")}),
        }
    )
    with pytest.raises(UsageError) as caught:
        preflight(bad)
    for words in ("nothing does not exist", "free_disk_gb asks", "free_memory_gb asks", "model:"):
        assert words in str(caught.value)


def test_a_sites_file_has_paths_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: north\nkeys: keys\ndata: {path: images}\n")
    config = load_site(tmp_path / "a.yaml", ["policy.most_rounds=5"])
    assert config.keys == str(tmp_path / "keys")
    assert config.data.path == str(tmp_path / "images")
    assert config.policy.most_rounds == 5
    (tmp_path / "a.yaml").write_text("name: north\ndata: {pth: images}\n")
    with pytest.raises(UsageError, match=r"unknown key data.pth; did you mean data.path"):
        load_site(tmp_path / "a.yaml")


def test_clocks_and_adapters_beyond_the_limit_are_refused() -> None:
    check_clock(1000.0, now=1100.0)
    with pytest.raises(Against, match="differs from the coordinator's by -300 s"):
        check_clock(1300.0, now=1000.0)
    with pytest.raises(Against, match=r"1 MB, this one has 4\.0 MB"):
        check_adapter(PolicyConfig(largest_adapter_mb=1.0), {"x": torch.zeros(1000, 1000)})


@pytest.mark.parametrize(
    ("promised", "why"),
    [
        (None, "promises none"),
        (9.5, "promises 9.5"),
        ("8", "promises '8'"),
        (True, "promises True"),
        (-1.0, "promises -1.0"),
        (7.5, ""),
        (8, ""),
    ],
)
def test_the_least_privacy_is_a_sites_own_choice(
    images: Path, promised: float | str | bool | None, why: str
) -> None:
    config = config_from_dict(tree(images))
    job = {**make_job(config, ["a", "b"], ["{}"]), "epsilon": promised}
    check_job(PolicyConfig(), job, config)
    if not why:
        check_job(PolicyConfig(largest_epsilon=8.0), job, config)
        return
    with pytest.raises(Against, match=f"epsilon of at most 8, the run {why}"):
        check_job(PolicyConfig(largest_epsilon=8.0), job, config)


@pytest.mark.parametrize("keyed", [True, False], ids=["keys", "no keys"])
def test_a_site_without_keys_that_starts_again_is_a_new_node(
    images: Path, tmp_path: Path, keyed: bool
) -> None:
    """The old node counts as online for a minute; with keys there is one node for a name."""
    site = honest(images, tmp_path)["north"]
    mail = FakeMail({"north": site, "again": site}, keyed=False)
    there = {1: "north" if keyed else ""}
    mail.online = lambda: there  # type: ignore[method-assign]
    said: list[str] = []
    config = config_from_dict(tree(images))
    job = make_job(config, [f"digit {n}" for n in range(5)], ["a {}"])
    model = create_clip_model(
        config.model, class_names=job["class_names"], templates=["a {}"], seed=model_seed(config)
    )
    base = base_sha256(model)
    roster = Roster(mail, "run", job, base, 10**6, said.append)
    with clock_by_hand() as clock:
        roster.greet(clock.now + 30, lambda: "north" in roster.nodes)
        assert roster.nodes == {"north": 1}
        there[2] = there[1]
        roster.greet(clock.now + 30, lambda: True)
    assert roster.nodes == {"north": 1 if keyed else 2}
    assert any("a second site calls itself so" in line for line in said) == keyed
