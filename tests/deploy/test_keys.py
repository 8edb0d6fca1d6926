"""Keys and certificates: what is made, who trusts it, and what is refused in which words."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedclip.deploy.addresses import Address, Unreachable, answers, check, free_port
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys import folder as keys
from fedclip.errors import UsageError
from tests.conftest import Command
from tests.support.deploy import health_server
from tests.system.test_house_rules import HEAVY, loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.init(tmp_path / "keys", ["coordinator.example.org"])
    return tmp_path / "keys"


def rewrite_certificate(folder: Path, hosts: list[str], days: int, start: datetime) -> None:
    """Another certificate for the coordinator, by the same authority."""
    ca, ca_key = (
        certificates.read_certificate(folder / "ca.crt"),
        certificates.read_private(folder / "ca.key"),
    )
    key = certificates.read_private(folder / "server.key").public_key()
    made = certificates.server_certificate(key, hosts, days, (ca, ca_key), start)
    (folder / "server.crt").write_bytes(certificates.pem(made))


# --- what is made ---


def test_files_and_who_may_read_them(folder: Path) -> None:
    keys.site(folder, "north")
    modes = {
        str(path.relative_to(folder)): path.stat().st_mode & 0o777
        for path in folder.rglob("*")
        if path.is_file()
    }
    public = 0o666 & ~os.umask(os.umask(0o022) or 0o022)
    private = {"ca.key", "server.key", "sites/north/site.key"}
    others = {"ca.crt", "server.crt"} | {
        f"sites/north/{name}" for name in ("ca.crt", "site.key.pub", "README.txt")
    }
    assert modes == dict.fromkeys(private, 0o600) | dict.fromkeys(others, public)
    for place in (folder, folder / "sites", folder / "sites/north"):
        assert place.stat().st_mode & 0o777 == 0o700


def test_a_sites_folder_holds_nothing_of_the_authoritys(folder: Path) -> None:
    facts = keys.site(folder, "north")
    place = folder / "sites/north"
    assert sorted(facts["copy_to_the_site"]) == sorted(map(str, place.iterdir()))
    assert (place / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()
    secrets = [(folder / name).read_bytes() for name in ("ca.key", "server.key")]
    for path in place.iterdir():
        assert path.read_bytes() not in secrets
    assert facts["never_leave_this_machine"] == [
        str(folder / "ca.key"),
        str(folder / "server.key"),
    ]
    assert "fedclip keys revoke north" in (place / "README.txt").read_text()


def test_openssh_reads_the_key_and_shows_the_same_fingerprint(folder: Path) -> None:
    facts = keys.site(folder, "north")
    for name in ("site.key", "site.key.pub"):
        done = subprocess.run(
            ["ssh-keygen", "-l", "-f", folder / "sites/north" / name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == ["384", facts["fingerprint"], "north", "(ECDSA)"]


def test_flower_reads_the_key(folder: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key

    keys.site(folder, "north")
    path = folder / "sites/north/site.key.pub"
    assert try_load_public_key(path) == certificates.public_pem(certificates.read_public(path))


def test_openssl_accepts_the_chain_strictly(folder: Path) -> None:
    subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile",
         folder / "ca.crt", folder / "server.crt"],
        check=True, capture_output=True,
    )  # fmt: skip


def test_hosts_and_dates(folder: Path) -> None:
    facts = keys.check_coordinator(folder, ["COORDINATOR.example.org", "127.0.0.1", "0:0::1"])
    assert facts["hosts"] == ["coordinator.example.org", "localhost", "127.0.0.1", "::1"]
    assert facts["days_left"] == 364
    assert facts["valid_until"] == f"{datetime.now(UTC) + timedelta(365):%Y-%m-%d}"


def test_a_site_may_make_its_own_key(folder: Path, tmp_path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "own"],
        check=True,
    )
    keys.site(folder, "south", public=tmp_path / "own.pub")
    place = folder / "sites/south"
    assert not (place / "site.key").exists()
    (place / "site.key").write_bytes((tmp_path / "own").read_bytes())
    (place / "site.key").chmod(0o600)
    keys.check_site(place)


# --- what is there stays ---


def test_nothing_is_overwritten(folder: Path) -> None:
    keys.site(folder, "north")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="is there already; --force"):
        keys.init(folder, ["localhost"])
    with pytest.raises(UsageError, match="sites/north is there already; --force"):
        keys.site(folder, "north")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    keys.init(tmp_path / "keys", ["localhost"])
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file cannot be written: Not a directory"):
        keys.init(tmp_path / "file", ["localhost"])


def test_force_moves_aside(folder: Path) -> None:
    old = keys.site(folder, "north")["fingerprint"]
    facts = keys.site(folder, "north", force=True)
    assert facts["fingerprint"] != old
    assert facts["moved_aside"] == str(folder / "sites/north.old-1")
    assert keys.check_site(folder / "sites/north.old-1")["fingerprint"] == old
    assert keys.site_names(folder) == ["north"]
    again = keys.init(folder, ["localhost"], force=True)
    assert again["moved_aside"] == str(folder.with_name("keys.old-1"))
    assert keys.site_names(folder) == []


def test_renewing_keeps_authority_and_key(folder: Path) -> None:
    start = datetime.now(UTC) - timedelta(days=30)
    rewrite_certificate(folder, ["coordinator.example.org"], 10, start)
    with pytest.raises(UsageError, match=r"server\.crt has expired on "):
        keys.check_coordinator(folder)
    kept = {name: (folder / name).read_bytes() for name in ("ca.crt", "ca.key", "server.key")}
    facts = keys.renew(folder, ["10.0.0.5"], days=100)
    assert facts["days_left"] == 99
    assert facts["hosts"][0] == "coordinator.example.org"
    assert "10.0.0.5" in facts["hosts"]
    assert kept == {name: (folder / name).read_bytes() for name in kept}


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedclip import files

    def full(path: Path, data: bytes) -> None:
        if b"PRIVATE" in data:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(files, "write_synced", full)
    with pytest.raises(UsageError, match="cannot be written: No space left"):
        keys.init(tmp_path / "keys", ["localhost"])
    assert list(tmp_path.iterdir()) == []


# --- what is wrong ---


def test_everything_that_is_wrong_at_once(folder: Path, tmp_path: Path) -> None:
    keys.init(tmp_path / "other", ["localhost"])
    rewrite_certificate(folder, ["a.example"], 1, datetime.now(UTC) + timedelta(days=2))
    (folder / "ca.crt").write_bytes((tmp_path / "other/ca.crt").read_bytes())
    (folder / "server.key").write_bytes((tmp_path / "other/server.key").read_bytes())
    (folder / "server.key").chmod(0o644)
    with pytest.raises(UsageError) as caught:
        keys.check_coordinator(folder, ["b.example"])
    text = str(caught.value)
    for words in (
        "server.crt is not valid before ",
        "server.crt is not signed by ",
        "ca.key is not the key of ",
        "server.key is not the key of ",
        "server.key can be read by others (mode 644); chmod 600 ",
        "server.crt is for a.example, not for b.example; `fedclip keys renew --host b.example`",
    ):
        assert words in text
    assert len(text.splitlines()) == 6


def test_the_authoritys_key_may_be_kept_elsewhere(folder: Path) -> None:
    (folder / "ca.key").unlink()
    keys.check_coordinator(folder)
    with pytest.raises(UsageError, match=r"ca\.key is missing"):
        keys.site(folder, "north")


def test_a_sites_files(folder: Path) -> None:
    keys.site(folder, "north")
    keys.site(folder, "south")
    north = folder / "sites/north"
    (north / "site.key.pub").write_bytes((folder / "sites/south/site.key.pub").read_bytes())
    with pytest.raises(UsageError, match=r"site\.key\.pub does not belong to .*site\.key"):
        keys.check_site(north)
    far = datetime.now(UTC) + timedelta(days=3651)
    with pytest.raises(UsageError, match=r"ca\.crt has expired on "):
        keys.check_site(folder / "sites/south", now=far)
    (north / "ca.crt").unlink()
    with pytest.raises(UsageError, match=r"ca\.crt is missing"):
        keys.check_site(north)


@pytest.mark.parametrize(
    ("key", "got"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "secp256r1"),
        (rsa.generate_private_key(65537, 1024), "RSA"),
    ],
    ids=["P-256", "RSA"],
)
def test_other_kinds_of_keys(tmp_path: Path, key: ec.EllipticCurvePrivateKey, got: str) -> None:
    path = tmp_path / "site.key"
    path.write_bytes(certificates.private_openssh(key))
    with pytest.raises(UsageError, match=f"P-384 .* got {got}"):
        certificates.read_private(path)


@pytest.mark.parametrize("read", ["read_certificate", "read_private", "read_public"])
def test_files_that_are_something_else(tmp_path: Path, read: str) -> None:
    for data in (b"", b"hello", b"\x00\xff" * 50, b"-----BEGIN CERTIFICATE-----\nAAAA\n"):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(UsageError, match="file is not a"):
            getattr(certificates, read)(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be read"):
        getattr(certificates, read)(tmp_path)


@pytest.mark.parametrize(
    "host", ["", "a b", "x:8000", "https://x", "-a", "a..b", "1.2.3.400", "a" * 64, "ü.example"]
)
def test_hosts_that_are_none(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="--host must be a name or an address"):
        keys.init(tmp_path / "keys", [host])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", " a", "../x", "-x", ".x", "x" * 64, "x.old-1"])
def test_site_names_that_are_none(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="a site's name must be"):
        keys.site(folder, name)
    assert not (folder / "sites").exists()


def test_days_out_of_range(folder: Path) -> None:
    for days in (0, 3651):
        with pytest.raises(UsageError, match=f"--days must be between 1 and 3650, got {days}"):
            keys.renew(folder, days=days)
    with pytest.raises(UsageError, match=r"--days must be at most 3649, .* got 3650"):
        keys.renew(folder, days=3650)


# --- who trusts it, by real handshakes ---


def test_the_coordinator_is_trusted(folder: Path) -> None:
    with health_server(folder) as address:
        check(address, folder / "ca.crt")
        check(Address("localhost", address.port), folder / "ca.crt")
        assert answers(address, folder / "ca.crt")


def test_a_foreign_authority_is_refused(folder: Path, tmp_path: Path) -> None:
    keys.init(tmp_path / "other", ["localhost"])
    with (
        health_server(folder) as address,
        pytest.raises(UsageError, match=r"not signed by the authority in this ca\.crt"),
    ):
        check(address, tmp_path / "other/ca.crt")


def test_an_expired_certificate_is_refused(folder: Path) -> None:
    rewrite_certificate(folder, ["127.0.0.1"], 1, datetime.now(UTC) - timedelta(days=2))
    with health_server(folder) as address, pytest.raises(UsageError, match="has expired; on its"):
        check(address, folder / "ca.crt")


def test_a_certificate_of_tomorrow_is_refused(folder: Path) -> None:
    rewrite_certificate(folder, ["127.0.0.1"], 9, datetime.now(UTC) + timedelta(days=1))
    with health_server(folder) as address, pytest.raises(UsageError, match="one of the two clocks"):
        check(address, folder / "ca.crt")


def test_a_wrong_host_is_refused(folder: Path) -> None:
    rewrite_certificate(folder, ["coordinator.example.org"], 9, datetime.now(UTC))
    with health_server(folder) as address, pytest.raises(UsageError, match="is for other names"):
        check(address, folder / "ca.crt")


def test_plain_text_to_a_tls_port_is_refused(folder: Path) -> None:
    with health_server(folder) as address, pytest.raises(UsageError, match="it speaks TLS"):
        check(address, None)


def test_tls_to_a_plain_port_is_refused(folder: Path) -> None:
    with health_server(None) as address:
        with pytest.raises(UsageError, match="speaks no TLS there"):
            check(address, folder / "ca.crt")
        check(address, None)


def test_nobody_there_is_not_a_users_fault(folder: Path) -> None:
    address = Address("127.0.0.1", free_port())
    with pytest.raises(Unreachable, match=f"{address} does not answer: Connection refused"):
        check(address, folder / "ca.crt")
    with pytest.raises(Unreachable, match="does not answer"):
        check(Address("nowhere.invalid", 1), folder / "ca.crt")
    with pytest.raises(UsageError, match=r"is missing; it is the coordinator's ca\.crt"):
        check(address, folder / "none.crt")
    with pytest.raises(UsageError, match="is not a certificate in PEM format"):
        check(address, folder / "ca.key")


# --- the command ---


def test_the_command(fedclip: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedclip("keys", "init", "keys", "--host", "c.example")[0] == 0
    code, out, _ = fedclip("keys", "site", "north")
    assert code == 0
    assert "keys/sites/north/site.key" in out
    assert "never leave this machine" in out
    code, out, _ = fedclip("keys", "check", "keys", "--host", "c.example")
    assert code == 0
    assert "north" in out
    assert fedclip("keys", "check", "keys/sites/north")[0] == 0
    for name in ("south", "west"):
        code, _, err = fedclip("keys", "peers")
        assert code == 2
        assert "masked sums need 3" in err
        fedclip("keys", "site", name)
    code, out, _ = fedclip("keys", "peers")
    assert code == 0
    assert "SHA256:" in out
    lists = {path.read_text() for path in Path("keys/sites").glob("*/peers.pub")}
    assert len(lists) == 1
    assert len(lists.pop().splitlines()) == 3
    code, out, _ = fedclip("keys", "check", "keys/sites/north")
    assert code == 0
    assert "south SHA256:" in out
    fedclip("keys", "site", "north", "--force")
    old = Path("keys/sites/north.old-1/peers.pub")
    old.rename("keys/sites/north/peers.pub")
    code, _, err = fedclip("keys", "check", "keys/sites/north")
    assert code == 2
    assert "it is older than the key" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "new"], "needs --host"),
        (["init", "keys", "--host", "b"], "keys is there already"),
        (["site", "north", "--keys", "none"], "none holds no keys (ca.crt is missing)"),
        (["check", "none"], "none/ca.crt is missing"),
        (["register", "north", "--coordinator", "here"], "--coordinator must be a host and a port"),
        (["list", "--coordinator", "127.0.0.1:1"], "127.0.0.1:1 does not answer"),
    ],
)
def test_what_the_command_refuses(
    fedclip: Command,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    code, _, err = fedclip("keys", *arguments)
    assert code == (1 if "does not answer" in message else 2)
    assert message in err


def test_the_end_is_announced(fedclip: Command, tmp_path: Path) -> None:
    code, _, err = fedclip("keys", "init", tmp_path / "keys", "--host", "a", "--days", "7")
    assert code == 0
    assert "valid for 6 more days; `fedclip keys renew`" in err


def test_the_command_loads_nothing_heavy(folder: Path) -> None:
    work = (
        "from fedclip.cli.main import main; "
        f"sys.argv = ['fedclip', 'keys', 'check', {str(folder)!r}]; main()"
    )
    assert loaded(work, HEAVY) == ""
