"""Render the reference pages of docs/ from the code: configuration, commands, errors and Python.

python scripts/reference.py          # writes the pages
python scripts/reference.py --check  # exits with 1 where one is not current
"""

from __future__ import annotations

import sys
from pathlib import Path

import reference_commands
import reference_configuration
import reference_python

DOCS = Path(__file__).resolve().parents[1] / "docs"


def pages() -> dict[str, str]:
    """Every generated page by its name."""
    return {
        "reference-configuration.md": reference_configuration.page(),
        "reference-configuration.zh-CN.md": reference_configuration.page("zh-CN"),
        "reference-commands.md": reference_commands.page(),
        "reference-python.md": reference_python.page(),
    }


def main() -> int:
    """Write the pages, or check them."""
    old = []
    for name, text in pages().items():
        file = DOCS / name
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            old.append(name)
    if old:
        print(f"not current: {', '.join(old)}; run: python scripts/reference.py")
    return bool(old)


if __name__ == "__main__":
    raise SystemExit(main())
