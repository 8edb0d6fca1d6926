"""Build the documentation site into site/: the pages of docs/, and the files that they link to.

python scripts/site.py          # exits with 1 on a warning, or on a link that leads nowhere
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"  # beside docs/, so that links out of docs/ are links out of it
LINK = re.compile(r'\b(?:href|src)="?([^"#?>\s]+)')


def main() -> int:
    """Build, copy what pages link to outside docs/, and look at every link of the result."""
    shutil.rmtree(SITE, ignore_errors=True)
    program = Path(sys.executable).with_name("zensical")
    command = [program, "build", "--clean", "--strict"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        return 1
    missing = [fault for page in sorted(SITE.rglob("*.html")) for fault in _finish(page)]
    print("\n".join(missing) or f"{SITE.relative_to(ROOT)}/index.html")
    return bool(missing)


def _finish(page: Path) -> list[str]:
    """Mend a page's links and its language; the links that lead nowhere."""
    missing = []

    def mended(found: re.Match[str]) -> str:
        target = _target(page, found[1])
        if target is None or (target.exists() and target.is_relative_to(SITE)):
            return found[0]
        if target.is_file() and target.is_relative_to(ROOT):
            copy = SITE / "files" / target.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, copy)
            return found[0].replace(found[1], os.path.relpath(copy, page.parent))
        missing.append(f"{page.relative_to(SITE)}: {found[1]} leads nowhere")
        return found[0]

    text = LINK.sub(mended, page.read_text("utf-8"))
    if page.parent.name.endswith(".zh-CN"):
        text = text.replace('<html lang="en"', '<html lang="zh-CN"', 1)
    page.write_text(text, encoding="utf-8")
    return missing


def _target(page: Path, link: str) -> Path | None:
    """The file that a link of a page names; None where it is an address."""
    if re.match(r"\w+:|//", link):
        return None
    start = SITE / link.lstrip("/") if link.startswith("/") else page.parent / link
    return Path(unquote(str(start))).resolve()


if __name__ == "__main__":
    raise SystemExit(main())
