"""Consent of a site: what was not agreed to is refused before an image is read."""

from __future__ import annotations

import ast
import copy
import io
import json
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedclip.config.loading import config_from_dict
from fedclip.deploy.app_code import APP, LARGEST, bundle_digest, installed_app
from fedclip.deploy.flower import app_guard, private
from fedclip.deploy.job import make_job
from fedclip.deploy.messages import requests
from fedclip.deploy.messages.envelope import Envelope
from fedclip.deploy.messages.requests import Ticket
from fedclip.deploy.site import work as work_module
from fedclip.deploy.site.approve import approve
from fedclip.deploy.site.config import PolicyConfig, SiteConfig, load_site
from fedclip.deploy.site.consent import RUNNING, Terms, read_terms, write_terms
from fedclip.deploy.site.requirements import Requirement, parse_requirement, unmet
from fedclip.deploy.site.terms_in_words import in_words
from fedclip.deploy.site.trainer import SiteTrainer
from fedclip.errors import UsageError
from fedclip.experiment.build import model_config, model_seed
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.pretrained import base_folder
from fedclip.models.summary import base_sha256
from fedclip.records import TrainRequest
from tests.support.machines import tree, write_images

CLASSES = tuple(f"digit_{n}" for n in range(5))
CONFIG = config_from_dict(tree(Path("nowhere")))
JOB = make_job(CONFIG, CLASSES, ("a {}.",))
RUN = "0" * 16
OTHER = "e5" * 32


@cache
def model() -> CLIPLoRAWrapper:
    config = model_config(CONFIG)
    return create_clip_model(
        config, class_names=CLASSES, templates=("a {}.",), seed=model_seed(CONFIG)
    )


@cache
def base() -> str:
    return base_sha256(model())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), {"north": 24}, tests=1)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls by which images would have been read."""
    calls: list[str] = []

    def read(*_: object, **__: object) -> None:
        calls.append("images were read")
        raise AssertionError("images were read")

    monkeypatch.setattr(work_module, "load_federated", read)
    monkeypatch.setattr(work_module, "site_source", read)
    return calls


def site(place: Path, images: Path | None = None, **keys: Any) -> SiteTrainer:
    """A site whose policy approves JOB on base()."""
    file = place / "approved.json"
    if not file.exists():
        write_terms(file, [Terms.of(ticket(JOB), JOB, place)])
    policy = {"approved": str(file), **keys.pop("policy", {})}
    data = {"path": str(place / "no images" if images is None else images / "sites/north")}
    config = {"name": "north", "state": str(place / "state"), "device": "cpu", "data": data}
    return SiteTrainer(SiteConfig.model_validate({**config, "policy": policy, **keys}), lambda _: 0)


def ticket(job: Mapping[str, Any], server_round: int = 0, **keys: str) -> Ticket:
    whole = {"run": RUN, "nonce": "n", "base": base(), **keys}
    return Ticket(job=requests.job_digest(job), server_round=server_round, **whole)


def asked(job: Mapping[str, Any], **keys: str) -> bytes:
    return requests.hello(ticket(job, **keys), "north", job, time.time())


def answer(trainer: SiteTrainer, message: bytes) -> Mapping[str, Any]:
    return Envelope.unpack(trainer.answer(message)).header


def changed(path: str, value: Any) -> dict[str, Any]:
    """JOB with another value at a dotted path."""
    job = copy.deepcopy(JOB)
    *parents, last = path.split(".")
    place: Any = job
    for key in parents:
        place = place[key]
    assert last in place
    assert place[last] != value
    place[last] = value
    return job


DOCTORED: dict[str, tuple[str, Any, str]] = {
    "more rounds": ("config.federation.rounds", 200, "federation.rounds: approved 2, asked for"),
    "more epochs": ("config.client.local_epochs", 50, "client.local_epochs: approved"),
    "larger rank": ("config.model.lora.r", 64, "model.lora.r: approved 4, asked for 64"),
    "other layers": (
        "config.model.lora.target_modules.vision_encoder",
        ["fc1", "fc2"],
        "model.lora.target_modules.vision_encoder: approved",
    ),
    "full fine-tuning": ("config.model.lora.enabled", False, "model.lora.enabled: approved true"),
    "other strategy": ("strategy", "flora", 'strategy: approved "fedavg", asked for "flora"'),
    "less privacy": ("epsilon", 100.0, "epsilon: approved null, asked for 100"),
    "other classes": ("class_names", ["a", "b", "c", "d", "e"], "class_names: approved"),
    "other prompts": ("templates", ["my {}"], "templates: approved"),
    "other precision up": ("up", "int8", 'up: approved "fp32", asked for "int8"'),
    "other base by name": (
        "config.model.model_name",
        "random:tiny",
        'model.model_name: approved "tiny", asked for "random:tiny"',
    ),
    "fewer test images": ("config.data.test_fraction", 0.0, "data.test_fraction: approved"),
    "other rate": ("config.optimizer.learning_rate", 1.0, "optimizer.learning_rate: approved"),
}


@pytest.mark.parametrize(("path", "value", "why"), DOCTORED.values(), ids=DOCTORED)
def test_a_doctored_recipe_is_refused_before_an_image_is_read(
    tmp_path: Path, unread: list[str], path: str, value: Any, why: str
) -> None:
    header = answer(site(tmp_path), asked(changed(path, value)))
    assert header["kind"] == "refusal"
    assert "the site has not approved this" in header["reason"]
    assert why in header["reason"]
    assert "fedclip site approve" in header["reason"]
    assert unread == []


def doctored_base(place: Path) -> Path:
    """The embedded model with one weight changed."""
    folder = place / "doctored"
    shutil.copytree(base_folder("tiny"), folder)
    weights = load_file(folder / "model.safetensors")
    name = sorted(name for name, tensor in weights.items() if tensor.ndim == 2)[0]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("admitted", [True, False], ids=["its digest", "the approved digest"])
def test_a_base_with_one_changed_weight_is_refused(
    tmp_path: Path, unread: list[str], admitted: bool
) -> None:
    """Whether the coordinator tells the digest of what it ships, or that of the approved base."""
    folder = doctored_base(tmp_path)
    theirs = create_clip_model(
        model_config(CONFIG).model_copy(update={"model_name": str(folder)}), class_names=CLASSES
    )
    told = base_sha256(theirs) if admitted else base()
    assert base_sha256(theirs) != base()
    header = answer(site(tmp_path, model=str(folder)), asked(JOB, base=told))
    assert header["kind"] == "refusal"
    assert ("base model (sha256): approved" if admitted else "has another base") in header["reason"]
    assert unread == []


def test_another_app_is_refused(tmp_path: Path, unread: list[str]) -> None:
    """That the node has started, or that the job names."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / RUNNING).write_text(json.dumps({"sha256": OTHER}))
    assert "is not the one that the job names" in answer(site(tmp_path), asked(JOB))["reason"]
    header = answer(site(tmp_path), asked(changed("app", OTHER)))
    assert (
        f"code of the app (sha256): approved {installed_app()}, asked for {OTHER}"
        in header["reason"]
    )
    assert unread == []


def test_a_job_that_names_no_code_or_has_no_end_is_refused(
    tmp_path: Path, unread: list[str]
) -> None:
    trainer = site(tmp_path, policy={"approved": None})
    for app in (None, "", "x", "E5" * 32, 7, "a" * 900_000):
        header = answer(trainer, asked({**JOB, "app": app}))
        assert "does not name its base model and its code" in header["reason"]
    header = answer(trainer, asked({**JOB, "more": "x" * 10_000_001}))
    assert "the job has more than 10000000 characters" in header["reason"]
    assert unread == []


def test_masks_that_are_required_and_missing_are_refused(tmp_path: Path, unread: list[str]) -> None:
    header = answer(site(tmp_path, policy={"require": ["masked"]}), asked(JOB))
    assert header["reason"].startswith("its policy requires masked sums (secure.aggregation")
    assert unread == []


def test_what_is_approved_is_taken_up_and_withdrawn_again(images: Path, tmp_path: Path) -> None:
    trainer = site(tmp_path, images)
    assert answer(trainer, asked(JOB))["kind"] == "ready"
    assert answer(trainer, asked(JOB, run="f" * 16))["kind"] == "ready"  # the same recipe
    (tmp_path / "approved.json").write_text('{"terms": []}')
    assert "has approved no run yet" in answer(trainer, asked(JOB))["reason"]
    (tmp_path / "approved.json").write_text('{"terms": [{"run": 1}]}')
    assert answer(trainer, asked(JOB))["kind"] == "refusal"


def training(job: Mapping[str, Any], server_round: int = 1, **keys: Any) -> bytes:
    request = TrainRequest(server_round, ("north",), dict(model().get_parameters()), **keys)
    own = ticket(job, server_round)
    return requests.train(request, "north", own, "fp32", "fp32")[0]


@pytest.mark.parametrize("strategy", ["fedavg", "fedsa", "ffa", "local", "fedavg+ditto"])
def test_a_request_beyond_the_job_is_refused(images: Path, tmp_path: Path, strategy: str) -> None:
    job = JOB if strategy == "fedavg" else changed("strategy", strategy)
    write_terms(tmp_path / "approved.json", [Terms.of(ticket(job), job, tmp_path)])
    trainer = site(tmp_path, images)
    assert answer(trainer, asked(job))["kind"] == "ready"
    layer = {"vision_model.encoder.layers.0.self_attn.q_proj": torch.ones(2, 2)}
    refused = {
        "round 3 is asked for": training(job, 3),
        "changes weights of the base model": training(job, shift=layer, sent=frozenset()),
        "the coordinator asks for": training(job),
    }
    if strategy == "fedavg":
        refused.pop("the coordinator asks for")
        assert answer(trainer, training(job))["kind"] == "update"
    if strategy == "fedavg+ditto":
        refused["the coordinator asks for"] = training(job, purpose="personal")
    for why, message in refused.items():
        assert why in answer(trainer, message)["reason"]


def test_approving_shows_the_terms_and_writes_them(images: Path, tmp_path: Path) -> None:
    file, shown = tmp_path / "policy.json", list[Mapping[str, str]]()
    trainer = site(tmp_path, images, policy={"approved": str(file)})
    with pytest.raises(UsageError, match="nothing has been asked for"):
        approve(trainer.config, shown.append, lambda _: True)
    assert "has approved no run yet" in answer(trainer, asked(JOB))["reason"]
    assert "goes on refusing" in approve(trainer.config, shown.append, lambda _: False)
    assert not file.exists()
    assert "approved in" in approve(trainer.config, shown.append, lambda _: True)
    assert "approves this already" in approve(trainer.config, shown.append, lambda _: True)
    assert file.stat().st_mode & 0o77 == 0
    assert answer(trainer, asked(JOB))["kind"] == "ready"
    words = shown[0]
    assert words["base model"] == f"tiny, sha256 {base()}"
    assert words["amount"].startswith("2 rounds of 1 epochs, batches of 32")
    assert words["trains"].startswith("LoRA of rank 4, alpha 8")
    assert "NONE is promised" in words["privacy"]
    assert words["leaves this site"].startswith("factors A, factors B, the head")
    odd = in_words(replace(read_terms(file)[0], app=OTHER), trainer.config)
    assert "OTHER CODE" in odd["code"]
    with pytest.raises(UsageError, match=r"policy\.approved names no file"):
        approve(SiteConfig(), shown.append, lambda _: True)


def test_without_approvals_the_first_job_of_a_run_is_pinned(images: Path, tmp_path: Path) -> None:
    trainer = site(tmp_path, images, policy={"approved": None})
    said: list[str] = []
    trainer._say = said.append
    assert answer(trainer, asked(JOB))["kind"] == "ready"
    assert said[0] == f"first job of the run {RUN}, pinned: base {base()}, app {installed_app()}"
    other = changed("config.client.local_epochs", 50)
    reason = answer(trainer, asked(other))["reason"]
    assert "asks for something else than when it began here: client.local_epochs" in reason
    assert answer(trainer, asked(other, run="1" * 16))["kind"] == "ready"


REQUIREMENTS = {
    "masked": Requirement("masked"),
    " masked ": Requirement("masked"),
    "epsilon<=4": Requirement("epsilon", most=4.0),
    "epsilon <= 0.5": Requirement("epsilon", most=0.5),
    f"base_sha256={'A' * 64}": Requirement("base_sha256", digest="a" * 64),
}
BAD = (
    *("", "mask", "masked,", "epsilon<4", "epsilon<=0", "epsilon<=-1", "epsilon<=nan"),
    *("epsilon<=1e999", "epsilon<=4 or more", "rounds<=4"),
    *("base_sha256=abc", f"base_sha256={'g' * 64}"),
)


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_requirements(text: str) -> None:
    assert parse_requirement(text) == REQUIREMENTS[text]


@pytest.mark.parametrize("text", BAD)
def test_requirements_that_are_not_understood(text: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(f"policy: {{require: [{json.dumps(text)}]}}\n")
    with pytest.raises(UsageError, match=r"policy\.require"):
        load_site(tmp_path / "site.yaml")


def test_requirements_are_met_or_told() -> None:
    private = {**JOB, "epsilon": 3.5}
    assert unmet(["epsilon<=4"], private, base()) is None
    for epsilon in (None, 4.5, -1, "3", True, 10**400):
        why = unmet(["epsilon<=4"], {**JOB, "epsilon": epsilon}, base())
        assert why is not None
        assert "requires differential privacy with epsilon<=4" in why
    assert unmet([f"base_sha256={base()}"], JOB, base()) is None
    assert "the run has" in str(unmet([f"base_sha256={'0' * 64}"], JOB, base()))
    masked = {"secure": {"aggregation": "masked"}}
    for job in ({**JOB, **masked}, {**JOB, "config": {**JOB["config"], **masked}}):
        assert unmet(["masked"], job, base()) is None
    for odd in ({"secure": "masked"}, {"config": None}, {"secure": {"aggregation": "none"}}):
        assert unmet(["masked"], odd, base()) is not None


def test_a_sites_file_of_approvals_is_beside_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("policy: {approved: a.json, require: [epsilon<=4]}\n")
    policy = load_site(tmp_path / "site.yaml").policy
    assert policy == PolicyConfig(approved=str(tmp_path / "a.json"), require=("epsilon<=4",))


def bundled(change: Callable[[str, bytes], bytes] = lambda _, data: data, **more: bytes) -> bytes:
    """The installed app as a bundle, with changed or added files."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for path in (APP / "pyproject.toml", *sorted(APP.glob("*/*.py"))):
            name = path.relative_to(APP).as_posix()
            archive.writestr(name, change(name, path.read_bytes()))
        for name, data in more.items():
            archive.writestr(name, data)
    return target.getvalue()


def test_the_digest_of_an_app_is_of_its_files() -> None:
    assert bundle_digest(bundled()) == installed_app()
    spoilt = bundled(lambda n, data: data + b"\n#" if n.endswith("client_app.py") else data)
    table = bundled(lambda n, data: data.replace(b"server_app:app", b"evil:app"))
    found = {bundle_digest(b) for b in (spoilt, table, bundled(**{"fedclip_federation/x.py": b""}))}
    assert len(found | {installed_app()}) == 4
    whole = bundled()
    for bad in (b"", b"PK", whole[:200], whole[:-30], bundled(x=b"0" * (LARGEST + 1))):
        assert bundle_digest(bad) is None
    assert bundle_digest(bundled(lambda n, data: b"= 1" if n == "pyproject.toml" else data)) is None


def test_the_digest_is_that_of_what_flower_sends(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    shutil.copytree(APP, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    with warnings.catch_warnings():  # of libraries that Flower uses in an older way
        warnings.simplefilter("ignore", DeprecationWarning)
        sent = private.load("build_fab_from_disk")(tmp_path / "app")
    assert bundle_digest(sent) == installed_app()


def test_a_node_starts_no_other_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, approved, evil = (
        tmp_path / "app.json",
        tmp_path / "approved.json",
        bundled(x=b""),
    )
    monkeypatch.setenv(app_guard.RECORD, str(record))
    assert app_guard.admits(evil)  # nothing was agreed on: as ever
    assert json.loads(record.read_text()) == {"sha256": bundle_digest(evil)}
    monkeypatch.setenv(app_guard.APPROVED, str(approved))
    assert not app_guard.admits(evil)
    assert app_guard.admits(bundled())  # all of it is on this machine already
    write_terms(approved, [Terms(RUN, base(), str(bundle_digest(evil)), JOB)])
    assert app_guard.admits(evil)
    approved.write_text("{}")
    assert not app_guard.admits(bundled())
    assert not app_guard.admits(b"no zip")


def test_flowers_node_verifies_every_app() -> None:
    """By Flower's own steps for signed apps, with fedclip's digest in place of a signature."""
    pytest.importorskip("flwr")

    def pull(**arguments: Any) -> Any:
        fab = arguments["get_fab"]("hash", 7)
        assert fab.content == b"zip"
        assert fab.verifications.get("valid_license")
        assert arguments["trusted_entities"]
        return arguments["state"]

    fab = private.load("Fab")("hash", b"zip", {})
    assert app_guard.checking(pull)(state=1, get_fab=lambda *_: fab, trusted_entities=None) == 1
    source = Path(private.import_module(private.REPLACED["_verify_fab"]).__file__ or "").read_text()
    for expected in ("_verify_fab(fab, trusted_entities)", "_pull_and_store_message(\n",
                     'fab.verifications.get("valid_license", "")'):  # fmt: skip
        assert expected in source


def test_what_is_used_of_flowers_private_modules() -> None:
    """All of it is in one table, and is there in the installed version."""
    root = Path(private.__file__).parents[2]
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] != "flwr" or name in public, f"{path}: {name}"
    pytest.importorskip("flwr")
    for name in {**private.PRIVATE, **private.REPLACED}:
        assert callable(private.load(name))
    with pytest.raises(KeyError):
        private.load("Something")
