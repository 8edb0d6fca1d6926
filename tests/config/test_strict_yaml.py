"""YAML of configurations: what is a number, what is a text, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from fedclip.config.loading import load_config
from fedclip.config.overrides import override_value
from fedclip.config.strict_yaml import NotReadable, dump_yaml, parse_yaml, plain_value, read_yaml
from fedclip.errors import UsageError

TEXTS = (
    *("yes", "no", "on", "off", "Yes", "NO", "y", "n", "1:30", "1:30:00", "010", "0o10", "1_000"),
    *(
        "0x1F",
        "0b11",
        "2024-01-01",
        "2024-01-01T00:00:00Z",
        "190:20:30.15",
        "+.5_1",
        "=",
        "1e",
    ),
)


@pytest.mark.parametrize("word", TEXTS)
def test_words_that_readers_differ_on_are_texts(word: str, tmp_path: Path) -> None:
    assert plain_value(word) == override_value(word) == word
    assert parse_yaml(f"a: {word}") == {"a": word}
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {{lora: {{use_dora: {word}}}}}\nclient: {{local_epochs: {word}}}\n")
    with pytest.raises(UsageError) as error:
        load_config(file)
    assert f"model.lora.use_dora must be true or false, got the text '{word}'" in str(error.value)
    assert "client.local_epochs must be a whole number" in str(error.value)
    names = load_config(None, [f"data.class_names=[{word}, cat]"]).data.class_names
    assert names == (word, "cat")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *[("1e-4", 1e-4), ("1E5", 1e5), ("-0.5", -0.5), ("+3", 3), (".5", 0.5), ("2.", 2.0)],
        *[("0", 0), ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None)],
        *[(".inf", math.inf), ("-.Inf", -math.inf), ("1e400", math.inf)],
    ],
)
def test_numbers_and_words(word: str, value: Any) -> None:
    found = plain_value(word)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *[("seed: !!int ''", "tags"), ("seed: !!timestamp abc", "tags"), ("a: !x {b: 1}", "tags")],
        *[("5", "a single value"), ("[1]", "a list"), ("seed: " + "9" * 5000, "5000 digits")],
        *[("a: " + "[" * 2000 + "]" * 2000, "too deep"), ("a: &a [*a]", "too deep")],
        *[("a: 1\n'a': 2", "duplicate key a"), ("a: {b: 1, b: 1}", "duplicate key b")],
        *[("? [a]\n: 1", "a key must be"), ("a: 1\n--- \nb: 2", "not valid YAML")],
        *[('a: "\\UFFFFFFFF"', "not valid YAML"), ("a: \x07", "not valid YAML")],
        *[("%YAML " + "9" * 5000 + ".1\n---\na: 1", "not valid YAML"), ("<<: 1", "<< takes")],
    ],
)
def test_what_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_yaml(file)


def test_aliases_that_grow_are_refused_at_once() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    with pytest.raises(NotReadable, match="more than 100,000 values"):
        parse_yaml(bomb)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for data in (b"seed: \xff", "seed: 1".encode("utf-16"), b"x" * 1_000_001, b"a: \xed\xa0\x80"):
        file.write_bytes(data)
        with pytest.raises(UsageError, match=r"text file|larger than"):
            read_yaml(file)
    file.write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert read_yaml(file) == ({"seed": 1}, {"seed": 1})


def test_merge_keys_and_anchors() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [{x: 5}, *a]}\n"
    values = parse_yaml(text)
    assert values["b"] == {"x": 1, "y": 3}
    assert values == yaml.safe_load(text)


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(TREES)
@example({"\x85": "a\u2028b\u2029 \x85"})
@example(["\n", " \n a\r\n\t", "\ufeff", "\x00\x7f"])
def test_what_is_written_is_read_back(tree: Any) -> None:
    again = parse_yaml(dump_yaml({"tree": tree}))["tree"]
    assert repr(again) == repr(tree)  # by its text, as NaN is not itself


@pytest.mark.parametrize(
    "typed", ["my images #1", "a: b", "#1", "C:\\x", "- a", "&a", "*a", "!x", "x # y", "@", "'"[1:]]
)
def test_overrides_keep_what_was_typed(typed: str) -> None:
    assert override_value(typed) == (typed or None)


@pytest.mark.parametrize("typed", ["[a] # b", "'a' b", "[a", '"a', "{a: 1} x", "[a]\n[b]", "[!x a"])
def test_overrides_in_brackets_are_yaml_to_the_end(typed: str) -> None:
    with pytest.raises(NotReadable):
        override_value(typed)
    assert override_value("'my #1'") == "my #1"


def test_references_name_values(tmp_path: Path) -> None:
    config = load_config(None, ["seed=7", "data.path=runs/${seed}", "federation.rounds=${seed}"])
    assert config.data.path == "runs/7"
    assert config.federation.rounds == 7
    for typed in ("data.path=${nothing}", "data.path=${oc.env:HOME}", "data.path=${data.path}"):
        with pytest.raises(UsageError, match="must name a key"):
            load_config(None, [typed])
