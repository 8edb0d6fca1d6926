"""Names: which a site may have, when two classes are one, what files they become, how they show."""

from __future__ import annotations

import io
import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import fedclip
from fedclip.config.names import (
    LONGEST_FILE,
    class_key,
    clean_class_name,
    each_class_once,
    file_name,
    is_site_name,
    site_name,
    site_names,
    text_key,
)
from fedclip.data.captions import with_captions
from fedclip.data.datasets import load_source
from fedclip.data.sources.site import site_source
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.messages import replies
from fedclip.deploy.messages.replies import Refused
from fedclip.deploy.messages.requests import Ticket
from fedclip.deploy.site.config import SiteConfig
from fedclip.errors import FedclipWarning, UsageError, harmless
from fedclip.models.pretrained import load_tokens
from fedclip.records import ClientReport
from fedclip.reports.comparison import accuracy_table
from fedclip.reports.progress import LiveProgress, PlainProgress
from fedclip.reports.tables import partition_table
from fedclip.reports.text import json_text, no_formula
from tests.conftest import Command

GOOD = [
    "north",
    "St. Mary's (A)",
    "北京协和医院",
    "München",
    "a_b-c",
    "7",
    "x" * 63,
    "[x] [red]",
    "क्षेत्र",
    "100%",
]
BAD = [
    *("", " a", "a ", ".a", "a.", "..", "-a", "a/b", "a\\b", "a:b", "x" * 64, "a\nb", "a\x1b[2Jb"),
    *("\udce9", "a\u202eb", "north.old-1", "a*", "𠀀" * 60, "a\x00"),
]


def images(root: Path, *folders: str, count: int = 6) -> Path:
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            picture = np.full((8, 8, 3), 20 * number + i, np.uint8)
            Image.fromarray(picture).save(root / folder / f"{i}.png")
    return root


# --- sites ---


@pytest.mark.parametrize("name", GOOD)
def test_a_site_may_be_called_so_at_every_door(tmp_path: Path, name: str) -> None:
    root = images(tmp_path / "data", f"{name}/cat", f"{name}/dog", "other/cat", "other/dog")
    assert name in load_source("imagefolder", path=str(root), layout="sites").site_names
    coordinator = tmp_path / "keys"
    keys.init(coordinator, ["localhost"])
    keys.site(coordinator, name)
    assert keys.site_names(coordinator) == [name]
    assert keys.site_folder(coordinator, name).is_dir()
    assert SiteConfig(name=name).name == name
    assert replies.read_ready(_hello(name), TICKET, "", 10**6) == (name, 3)


@pytest.mark.parametrize("name", BAD)
def test_a_site_may_not_be_called_so_at_any_door(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a site's name must be"):
        site_name(name)
    with pytest.raises(UsageError, match=r"data: .*a site's name must be"):
        site_names(["north", name], "data: pairs")
    coordinator = tmp_path / "keys"
    keys.init(coordinator, ["localhost"])
    with pytest.raises(UsageError, match="a site's name must be"):
        keys.site(coordinator, name)
    assert not (coordinator / "sites").exists()
    if name != "\udce9":  # which no message can carry
        with pytest.raises(Refused):
            replies.read_ready(_hello(name), TICKET, "", 10**6)


TICKET = Ticket("run", "job", 0, "nonce", "base")


def _hello(name: str) -> bytes:
    return replies.ready(TICKET, name, 3, {"fedclip": "1"})


def test_a_site_is_the_same_in_both_forms_of_unicode(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "München")
    keys.init(tmp_path / "keys", ["localhost"])
    assert keys.site(tmp_path / "keys", decomposed)["site"] == "München"
    with pytest.raises(UsageError, match="is there already"):
        keys.site(tmp_path / "keys", "München")
    with pytest.raises(UsageError, match="one name but for case or Unicode form"):
        keys.site(tmp_path / "keys", "MÜNCHEN")
    with pytest.raises(UsageError, match="one name but for case or Unicode form; rename it"):
        site_names(["München", decomposed], "data: hub")


@pytest.mark.parametrize("strategy", ["local", "fedsa"])
def test_names_that_become_paths_are_tested_before_the_training(
    tmp_path: Path, strategy: str
) -> None:
    table = tmp_path / "table.csv"
    images(tmp_path, "cat", "dog")
    for name in ("..", "../../x", "x" * 200, "a\\b"):
        rows = [
            f"{c}/{i}.png,{c} {i},{name if i < 3 else 'b'}"
            for c in ("cat", "dog")
            for i in range(6)
        ]
        table.write_text("\n".join(["image,caption,site", *rows]))
        config = {
            "task": "contrastive",
            "model": {"model_name": "tiny", "lora": {"r": 2, "lora_alpha": 4}},
            "data": {"name": "pairs", "path": str(table), "batch_size": 2},
            "federation": {"strategy": strategy, "rounds": 1},
        }
        with pytest.raises(UsageError, match="a site's name must be"):
            fedclip.run(config, output=tmp_path / "run")
        assert not (tmp_path / "run").exists()


# --- files ---


@given(st.text(min_size=1), st.text(min_size=1))
def test_files_of_owners_are_one_safe_part_of_a_path(owner: str, other: str) -> None:
    name = file_name(owner)
    assert 0 < len(os.fsencode(name)) <= LONGEST_FILE
    assert not re.search(r'[/\\:*?"<>|\x00-\x1f]|^\.|\.$| $', name)
    assert (name == file_name(other)) == (owner == other)


def test_files_of_usual_names_are_called_by_them() -> None:
    assert [file_name(n) for n in ("client-00", "北京", "digits/a b", "..", "con")] == [
        *("client-00", "北京", "digits%2Fa%20b", "%2E%2E", "%63on"),
    ]
    long = file_name("北" * 100)
    assert long.startswith("北" * 61 + "~")
    assert long != file_name("北" * 101)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=63))
def test_what_is_a_sites_name_stays_one(text: str) -> None:
    if is_site_name(text):
        assert site_name(unicodedata.normalize("NFD", text)) == text


# --- classes ---


TOKENS = load_tokens("tiny")


@given(st.lists(st.text("aAbB1½ _-'sté\u0301\u00a0.日ß|<>", min_size=1, max_size=4), min_size=2))
def test_one_key_is_one_row_of_tokens(names: list[str]) -> None:
    rows = TOKENS.read(names)
    for name, row in zip(names, rows, strict=True):
        for other, other_row in zip(names, rows, strict=True):
            assert (row == other_row) == (text_key(name) == text_key(other))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("Café", "Cafe\u0301"),
        ("T_shirt", "t  shirt"),
        ("t-shirt", "T - Shirt"),
        ("no. 12", "No.1 2"),
    ],
)
def test_names_of_one_class(name: str, other: str) -> None:
    assert class_key(name) == class_key(other)
    assert each_class_once([[name, "x"], [other]]) == (name, "x")


@pytest.mark.parametrize("pair", [("Café", "Cafe\u0301"), ("T_shirt", "t shirt"), ("A-b", "a - B")])
def test_a_class_is_the_same_in_a_simulation_and_over_the_network(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    one, other = pair
    root = images(tmp_path, f"A/{one}", "A/dog", f"B/{other}", "B/dog")
    with pytest.warns(FedclipWarning, match="class folders whose names differ in case, blanks"):
        together = load_source("imagefolder", path=str(root), layout="sites")
    assert len(together.class_names) == 2
    for number, site in enumerate(together.site_names):
        alone = site_source(str(root / site), site, together.class_names)
        assert together.sites is not None
        assert alone.labels.tolist() == together.labels[together.sites == number].tolist()
    both = images(tmp_path / "both", one, other, "dog")
    with pytest.warns(FedclipWarning):
        alone = site_source(str(both), "both", together.class_names)
    assert np.bincount(alone.labels).max() == 12


@pytest.mark.parametrize("names", [("Café", "Cafe\u0301"), ("t shirt", "T_shirt")])
def test_listed_classes_must_differ(tmp_path: Path, names: tuple[str, str]) -> None:
    images(tmp_path, "a", "b")
    with pytest.raises(UsageError, match=r"data\.class_names: .* are the same class"):
        load_source("imagefolder", path=str(tmp_path), class_names=names)


def test_bytes_that_are_no_utf_8_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a class cannot be called 'caf\\udce9'"):
        clean_class_name("caf\udce9")
    images(tmp_path, "cat", "dog")
    os.rename(os.fsencode(tmp_path / "cat"), os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(UsageError, match=r"caf\\xe9 is not UTF-8; rename it"):
        load_source("imagefolder", path=str(tmp_path))


@pytest.mark.filterwarnings("ignore:the text tower reads 77 tokens")
def test_captions_that_are_cut_before_they_differ_are_one() -> None:
    long = "very " * 90
    source = load_source("digits")
    names = (long + "old", long + "new", "One", "one", *source.class_names[4:])
    with pytest.warns(FedclipWarning, match="2 of 10 captions are the same as others"):
        found = with_captions(replace(source, class_names=names, templates=("{}",)), TOKENS.read)
    assert len(found.class_names) == 8
    assert found.labels.tolist() == [(0, 0, 1, 1, 2, 3, 4, 5, 6, 7)[i] for i in source.labels]


# --- what is shown ---

ODD = ["cat [/b]", "[red]dog", ":cat:", "[link=x]y", "{note}", "a\x1b[2Jb", "$x^$"]
SHOWN = [*ODD[:5], "a\\x1b[2Jb", ODD[6]]


@pytest.mark.parametrize("kind", [PlainProgress, LiveProgress])
def test_progress_shows_names_as_they_are(kind: Callable[[Console], PlainProgress]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=kind is LiveProgress, no_color=True)
    with kind(console) as shown:
        shown.partition(ODD, {odd: [1] * len(ODD) for odd in ODD})
        shown.rounds(0, 1, len(ODD))
        for odd in ODD:
            shown.message(f"{odd} is there")
            shown.client(ClientReport(odd, 3, 1.0, 1, 0.1))
    assert all(name in out.getvalue() for name in SHOWN)
    assert "\x1b[2Jb" not in out.getvalue()


def test_tables_show_names_as_they_are() -> None:
    out = io.StringIO()
    many = [*ODD, *map(str, range(20))]
    Console(file=out, width=200).print(partition_table(many, {odd: [1] * 27 for odd in ODD}))
    assert all(name in out.getvalue() for name in SHOWN)
    assert accuracy_table({}, []).rich().row_count == 0


def test_errors_and_warnings_show_names_as_they_are(fedclip: Command, tmp_path: Path) -> None:
    for name in ("[red] [b].yaml", ":cat:.yaml", "a\x1b[2Jb.yaml"):
        (tmp_path / name).write_text("seed: x\n")
        code, _, told = fedclip("validate", tmp_path / name)
        assert code == 2
        assert harmless(name) in told
        assert "\x1b" not in told


def test_json_is_printable_and_the_same() -> None:
    value = {"name": "a\x1b\x9b\u202e\udce9é北\n😀"}
    text = json_text(value)
    assert json.loads(text) == value
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "é北" in text
    assert "😀" in text


@given(st.text())
def test_harmless_text_is_printable(text: str) -> None:
    shown = harmless(text, lines=False)
    assert all(
        c.isprintable() or unicodedata.category(c) == "Zs" or c in "\u200c\u200d" for c in shown
    )
    shown.encode()  # also what is no text
    assert harmless(shown) == shown
    assert no_formula("$a$") == r"\$a\$"
