"""Render docs/reference-configuration.md from the configuration's own descriptions.

python scripts/reference_configuration.py          # writes the page
python scripts/reference_configuration.py --check  # exits with 1 where it is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedclip.config import Config
from fedclip.config.wording import expected, named_section_of, section_of

PAGE = Path(__file__).parents[1] / "docs" / "reference-configuration.md"

HEAD = """\
# Configuration reference

<!-- Made by scripts/reference_configuration.py from src/fedclip/config*.py; edit there. -->

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


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *_section(Config, "")]).rstrip() + "\n"


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    heading = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    yield f"## {heading}\n\n{model.__doc__}\n"
    plain = {n: f for n, f in model.model_fields.items() if section_of(f) is None}
    if plain:
        yield "| key | values | default | meaning |\n|---|---|---|---|"
        for name, field in plain.items():
            values = expected(field).replace("|", "\\|")
            default = _default(field)
            yield f"| `{prefix}{name}` | {values} | `{default}` | {field.description} |"
        yield ""
    for name, field in model.model_fields.items():
        inner, named = section_of(field), named_section_of(field)
        if inner is not None:
            yield from _section(inner, f"{prefix}{name}.")
        elif named is not None:
            yield from _named_section(named, f"{prefix}{name}.<name>.")


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


def _named_section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A section that may stand several times; keys that it has from another are not repeated."""
    (base,) = model.__bases__
    known = base.model_fields if issubclass(base, BaseModel) else {}
    yield f"## `{prefix.rstrip('.')}`\n\n{model.__doc__} Keys as in `data`, and:\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for name, field in model.model_fields.items():
        if name not in known:
            default = _default(field)
            yield f"| `{prefix}{name}` | {expected(field)} | `{default}` | {field.description} |"
    yield ""


def main() -> int:
    """Write the page, or check it."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.name} is not current; run: python scripts/reference_configuration.py")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
