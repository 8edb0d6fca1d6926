"""The reference page of the configuration, from its descriptions, in both languages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedclip.config import Config
from fedclip.config.wording import expected, named_section_of, section_of

_ENGLISH = """\
# Configuration reference

[中文](reference-configuration.zh-CN.md)

<!-- Made by scripts/reference.py from src/fedclip/config/; edit there. -->

A configuration is a YAML file; every key may be left out. Any key can be changed on the command
line, as `key=value` or `--set key=value`: `federation.rounds=5`, `data.class_names='[cat, dog]'`,
`optimizer.max_grad_norm=null`. `fedclip validate FILE` reports everything that is wrong with a file
at once; with `--data` it also opens every image, and shows sites, classes and sizes.

- The value of an override that begins with `[`, `{` or a quote is YAML, to its last character. Any
  other is a number, `true`, `false`, `null`, or a text as it was typed: `"data.path=my images #1"`.
- Words that versions of YAML read differently are texts: `yes`, `off`, `1:30`, `010`, `1_000`,
  dates. `1e-4` is a number. Tags and keys given twice are refused; `${seed}` takes another key's
  value.
- Numbers have bounds beyond which they can only be mistakes, such as a learning rate over 1000; the
  message names the bound.
- Patterns of layers are regular expressions, but for lookaround and references; one that could be
  matched in more than a million ways, such as `(a+)+`, is refused.
"""

_WORDS = {
    "head": _ENGLISH,
    "top": "Top level",
    "as": "Keys as in `data`, and:",
    "row": "| key | values | default | meaning |\n|---|---|---|---|",
}
_TRANSLATION = Path(__file__).with_suffix(".zh-CN.yaml")


class Words:
    """What is said of sections and keys in one language; in Chinese, every key has to be there."""

    def __init__(self, language: str) -> None:
        self._chinese = language != "en"
        file = yaml.safe_load(_TRANSLATION.read_text("utf-8")) if self._chinese else {}
        self.fixed: dict[str, str] = file.get("words", _WORDS)
        self._sections: dict[str, str] = file.get("sections", {})
        self._keys: dict[str, str] = file.get("keys", {})
        self._values: list[list[str]] = file.get("values", [])

    def section(self, name: str, english: str) -> str:
        """What a section is."""
        return self._chinese_of(self._sections, name) if self._chinese else english

    def _chinese_of(self, words: dict[str, str], name: str) -> str:
        if name not in words:
            raise ValueError(f"{_TRANSLATION.name} has nothing on {name or 'the whole'}; add it")
        return words.pop(name)

    def row(self, key: str, field: FieldInfo) -> str:
        """A key's line of the table."""
        english = str(field.description)
        meaning = self._chinese_of(self._keys, key) if self._chinese else english
        if _facts(meaning) != _facts(english):
            raise ValueError(f"{_TRANSLATION.name}: {key} has other names or numbers: {english}")
        values = expected(field)
        for pattern, words in self._values:
            values = re.sub(pattern, words, values)
        values = re.sub(r"<(?=\w)", r"\\<", values.replace("|", "\\|"))
        return f"| `{key}` | {values} | `{_default(field)}` | {meaning} |"

    def left(self) -> list[str]:
        """Sections and keys that the configuration has no more."""
        return [*self._sections, *self._keys]


def _facts(text: str) -> list[str]:
    """Names of code, and numbers, of a sentence."""
    return sorted(re.findall(r"`[^`]*`|\d[\d.]*\d|\d", re.sub(r"<[^>]*>", "", text)))


def page(language: str = "en") -> str:
    """The whole page as Markdown."""
    words = Words(language)
    text = "\n".join([words.fixed["head"], *_section(words, Config, "")]).rstrip() + "\n"
    if words.left():
        raise ValueError(f"{_TRANSLATION.name}: no such keys: {', '.join(words.left())}")
    return text


def _section(words: Words, model: type[BaseModel], prefix: str) -> Iterator[str]:
    heading = f"`{prefix.rstrip('.')}`" if prefix else words.fixed["top"]
    yield f"## {heading}\n\n{words.section(prefix.rstrip('.'), str(model.__doc__))}\n"
    plain = {n: f for n, f in model.model_fields.items() if section_of(f) is None}
    if plain:
        yield words.fixed["row"]
        yield from (words.row(f"{prefix}{name}", field) for name, field in plain.items())
        yield ""
    for name, field in model.model_fields.items():
        inner, named = section_of(field), named_section_of(field)
        if inner is not None:
            yield from _section(words, inner, f"{prefix}{name}.")
        elif named is not None:
            yield from _named_section(words, named, f"{prefix}{name}.<name>.")


def _default(field: FieldInfo) -> str:
    """A field's default as YAML would have it."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default" in extra:
        return str(extra["default"])
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return str(default)


def _named_section(words: Words, model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A section that may stand several times; keys that it has from another are not repeated."""
    (base,) = model.__bases__
    known = base.model_fields if issubclass(base, BaseModel) else {}
    told = words.section(prefix.rstrip("."), str(model.__doc__))
    yield f"## `{prefix.rstrip('.')}`\n\n{told} {words.fixed['as']}".rstrip() + "\n"
    yield words.fixed["row"]
    own = {name: field for name, field in model.model_fields.items() if name not in known}
    yield from (words.row(f"{prefix}{name}", field) for name, field in own.items())
    yield ""


if __name__ == "__main__":  # the name under which the pages were made before
    from reference import main

    raise SystemExit(main())
