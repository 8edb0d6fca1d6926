"""The signed statement of a federation's adapter: whole, trusted, and covering every field."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedclip.config.loading import config_from_dict
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.log.adapter_statement import read_seal, verify_adapter
from fedclip.deploy.log.statement import Signer, Statement, sign_statement
from fedclip.deploy.log.verify import verify_folders
from fedclip.deploy.messages import results
from fedclip.deploy.messages.envelope import Envelope, read_header
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.signed_result import check_policy
from fedclip.deploy.site.trainer import SiteTrainer
from fedclip.errors import UsageError
from fedclip.models.adapter_folder import STATEMENT
from fedclip.records import RunState
from tests.conftest import Command
from tests.support.machines import NAMES, FakeMail, coordinate_here, trainer, tree, write_images


class Federation:
    """A finished run with keys: its folder, the sites, and what was sent at the end."""

    def __init__(self, place: Path) -> None:
        self.place, self.keys, self.run = place, place / "keys", place / "run"
        images = write_images(place / "images", dict.fromkeys(NAMES, 10))
        keys.init(self.keys, ["localhost"])
        self.sites: dict[str, SiteTrainer] = {}
        for name in NAMES:
            keys.site(self.keys, name)
            own = {"keys": str(self.keys / "sites" / name), "policy": {"signed_result": True}}
            self.sites[name] = trainer(images, place, name, **own)
        deploy = {"join_deadline": 1.0, "keys": str(self.keys)}
        mail = FakeMail({name: site.answer for name, site in self.sites.items()})
        coordinate_here(config_from_dict(tree(images, deploy=deploy)), self.run, mail)
        self.result = next(
            data for name, data in mail.sent
            if name == "north" and read_header(data)["kind"] == "result"
        )  # fmt: skip

    @property
    def ca(self) -> Path:
        return self.keys / "ca.crt"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("federation"))


def test_every_adapter_of_a_federation_is_verified(
    federation: Federation, fedclip: Command
) -> None:
    folders = {"coordinator": federation.run / "adapter"}
    folders |= {name: federation.place / name / "adapter" for name in NAMES}
    for name, folder in folders.items():
        facts = verify_adapter(folder, [federation.ca])
        assert facts["saved_by"] == name
        assert facts["rounds"] == 2
        assert facts["sites"] == [f"{n} (7 examples)" for n in NAMES]
        assert (facts["epsilon"], facts["left_out_of_a_round"]) == ("none promised", "none")
    signed, _ = read_seal(folders["north"])
    assert [one.key is not None for one in signed.statement.sites] == [True] * 3
    assert signed.statement.rounds[0].state != signed.statement.rounds[1].state
    rows = verify_folders([federation.run, *(federation.place / n for n in NAMES)], federation.keys)
    assert {row["note"] for row in rows} == {"nothing is missing"}
    for key in (federation.ca, federation.keys / "server.crt"):
        code, output, _ = fedclip("verify", federation.run, "--key", key)
        assert (code, "none promised" in output) == (0, True)
    code, output, said = fedclip("verify", folders["north"])
    assert code == 0
    assert "NOT COMPARED" in output
    assert "whose it is was not compared" in said


def test_only_a_key_that_vouches_is_trusted(
    federation: Federation, tmp_path: Path, fedclip: Command
) -> None:
    adapter = federation.run / "adapter"
    keys.init(tmp_path / "others", ["localhost"])
    public = certificates.read_private(federation.keys / "server.key").public_key()
    own, foreign = tmp_path / "own.pub", federation.keys / "sites/north/site.key.pub"
    own.write_bytes(certificates.public_openssh(public, "coordinator"))
    verify_adapter(adapter, [foreign, own])
    for key in (tmp_path / "others/ca.crt", tmp_path / "others/server.crt", foreign):
        with pytest.raises(UsageError, match=r"for which none of .* vouches"):
            verify_adapter(adapter, [key])
    for words in (
        ["verify", adapter, "--key", foreign],
        ["serve", adapter, "--signed-by", foreign],
    ):
        code, _, said = fedclip(*words)
        assert (code, "vouches" in said) == (2, True)
    for missing in (tmp_path / "none.pub", federation.run / "summary.json"):
        with pytest.raises(UsageError, match=str(missing.name)):
            verify_adapter(adapter, [missing])


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all that is no mapping or list, and to empty ones."""
    if not (isinstance(value, dict | list) and value):
        yield path
        return
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(one, (*path, key))


def changed(value: Any) -> list[Any]:
    """Other values of the same type, and of another."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int | float):
        return [value + 1, None, str(value)]
    if isinstance(value, str):
        flipped = "".join("1" if c == "0" else "0" for c in value[:1])
        return [f"{flipped}{value[1:]}", f"{value} ", value.swapcase() + "x", None]
    return [["x"], "x", 1] if value is None else [[*value, "x"] if isinstance(value, list) else 1]


PARTS = [*(f"signed.statement.{name}" for name in Statement.model_fields),
         "signed.signature", "signed.key", "signed.certificate",
         "seal.holder", "seal.statement", "seal.files", "seal.log", "signature", "key"]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_every_field_is_covered(federation: Federation, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(federation.place / "north/adapter", folder)
    whole = json.loads((folder / STATEMENT).read_text())
    assert verify_adapter(folder, [federation.ca])
    start = tuple(part.split("."))
    inside: Any = whole
    for key in start:
        inside = inside[key]
    tried = 0
    for path in leaves(inside, start):
        for value in changed(at(whole, path)):
            other = copy.deepcopy(whole)
            at(other, path[:-1])[path[-1]] = value
            (folder / STATEMENT).write_text(json.dumps(other))
            with pytest.raises(UsageError):
                verify_adapter(folder, [federation.ca])
            tried += 1
    assert tried


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_a_field_may_neither_be_added_nor_left_out(federation: Federation, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(federation.run / "adapter", folder)
    whole = json.loads((folder / STATEMENT).read_text())
    paths = {(), *(path[:end] for path in leaves(whole) for end in range(len(path)))}
    for path in paths:
        if not isinstance(at(whole, path), dict):
            continue
        for other in (copy.deepcopy(whole), copy.deepcopy(whole)):
            place = at(other, path)
            if other == whole:
                place["more"] = 1
                (folder / STATEMENT).write_text(json.dumps(other))
                with pytest.raises(UsageError):
                    read_seal(folder)
                del place["more"]
            for key in list(place):
                kept = place.pop(key)
                (folder / STATEMENT).write_text(json.dumps(other))
                with pytest.raises(UsageError):
                    read_seal(folder)
                place[key] = kept


def test_a_statement_of_another_adapter_is_refused(
    federation: Federation, tmp_path: Path, fedclip: Command
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(federation.run / "adapter", folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})
    code, _, said = fedclip("verify", folder, "--key", federation.ca)
    assert code == 2
    assert "adapter_model.safetensors is not the file that was sealed" in said
    shutil.copy(federation.run / "adapter/adapter_model.safetensors", path)
    (folder / "README.md").write_text("another card")  # which says nothing of the weights
    assert verify_adapter(folder)
    (folder / "head.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"head\.safetensors is not the file"):
        verify_adapter(folder)
    (folder / STATEMENT).unlink()
    with pytest.raises(UsageError, match="is no adapter of a federation"):
        verify_adapter(folder)


def test_a_site_of_another_key_may_not_seal(federation: Federation, tmp_path: Path) -> None:
    """South's folder cannot be passed off as north's, nor by a key that nobody knows."""
    folder = tmp_path / "adapter"
    shutil.copytree(federation.place / "south/adapter", folder)
    whole = json.loads((folder / STATEMENT).read_text())
    for key in (certificates.new_key(), certificates.read_private(
        federation.keys / "sites/north/site.key")):  # fmt: skip
        signer = Signer(key)
        other = {**whole, "key": signer.public, "signature": signer.sign(whole["seal"])}
        (folder / STATEMENT).write_text(json.dumps(other))
        with pytest.raises(UsageError, match="is not that of a site in the statement"):
            verify_adapter(folder)


def forged(whole: Mapping[str, Any], signer: Signer, **changes: Any) -> dict[str, Any]:
    return sign_statement({**whole["statement"], **changes}, signer)


def test_a_site_takes_no_result_without_its_statement(
    federation: Federation, tmp_path: Path
) -> None:
    site = federation.sites["north"]
    adapter = Path(site.config.state) / "adapter"
    before = (adapter / STATEMENT).read_bytes()
    envelope = Envelope.unpack(federation.result)
    whole: Any = envelope.header[results.STATEMENT]
    theirs = Signer.coordinator(federation.keys, tmp_path)
    stranger = Signer(certificates.new_key())
    borrowed = replace(stranger, certificate=theirs.certificate)
    sites = copy.deepcopy(whole["statement"]["sites"])
    sites[0]["examples"] = 500
    cases: dict[str, Any] = {
        "none came": None,
        "is damaged": {"statement": {}},
        "it was changed": {**whole, "statement": {**whole["statement"], "epsilon": 1.0}},
        "its state_sha256 is": forged(whole, theirs, state_sha256="0" * 64),
        "its run is": forged(whole, theirs, run="another"),
        "its job is": forged(whole, theirs, job="another"),
        "its base.sha256 is": forged(whole, theirs, base={"name": "tiny", "sha256": "0" * 64}),
        "its examples of this site is": forged(whole, theirs, sites=sites),
        "none of": forged(whole, stranger),
        "is not that of the key": forged(whole, borrowed),
    }
    for why, value in cases.items():
        header = {**envelope.header, results.STATEMENT: value}
        answer = Envelope.unpack(site.answer(Envelope(header, envelope.tensors).pack()))
        assert answer.kind == "refusal"
        assert why in answer.header["reason"], why
    tensors = {name: torch.zeros_like(t) for name, t in envelope.tensors.items()}
    answer = Envelope.unpack(site.answer(Envelope(envelope.header, tensors).pack()))
    assert "its state_sha256 is" in answer.header["reason"]
    assert (adapter / STATEMENT).read_bytes() == before
    assert Envelope.unpack(site.answer(federation.result)).kind == "tested"


def test_demands_that_nobody_could_vouch_for() -> None:
    with pytest.raises(UsageError, match="signed_result: true needs keys"):
        check_policy(SiteConfig.model_validate({"policy": {"signed_result": True}}))


def test_the_digest_is_of_what_a_site_is_sent(federation: Federation) -> None:
    envelope = Envelope.unpack(federation.result)
    state = RunState.from_flat(envelope.tensors)
    told: Any = envelope.header[results.STATEMENT]
    assert results.state_digest(state) == told["statement"]["state_sha256"]
