"""Chinese pages say what their English twins say: the same numbers, links and words."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TWINS = sorted([*DOCS.glob("*.zh-CN.md"), ROOT / "README.zh-CN.md"])
# What the engineer of a site needs; each must be there in Chinese.
NEEDED = [
    "README",
    "how-to-plan",
    "how-to-your-images",
    "how-to-machines",
    "how-to-keys",
    "how-to-masked-sums",
    "how-to-serve",
    "how-to-report",
    "how-to-merge-and-export",
    "how-to-compare",
    "how-to-privacy",
    "how-to-python",
    "how-to-trackers",
    "explanation-trust",
    "explanation-strategies",
    "reference-configuration",
    "tutorial-first-run",
]
# Shorter than the English page, and says so.
SHORTER = {"explanation-speed.zh-CN.md"}
# Words that pages had, or could have, for what the table of words calls otherwise.
OTHER_WORDS = [
    "适配层器",
    "适配模块",
    "汇聚",
    "基座模型",
    "字幕",
    "图说",
    "客户机",
    "协调者",
    "协调器",
    "差异隐私",
    "全量微调",
    "全模型微调",
    "掩蔽求和",
    "运行目录",
    "站台",
    "方略",
    "零次",
    "零射",
    "提示语",
    "提示模板",
    "中心测试集",
    "鲁棒",
    "秘钥",
]


def english(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh-CN", ""))


def prose(page: Path) -> str:
    """A page without its code and the targets of its links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    return re.sub(r"\]\([^)]*\)", "]", text)


def numbers(page: Path) -> Counter[str]:
    found = re.findall(r"(?<![\w.])\d[\d.,]*", prose(page))
    return Counter(number.rstrip(".,").replace(",", "") for number in found)


def test_what_a_site_needs_is_there_in_chinese() -> None:
    assert [name for name in NEEDED if not (DOCS / f"{name}.zh-CN.md").is_file()] == []


@pytest.mark.parametrize("page", TWINS, ids=lambda page: page.name)
def test_numbers_are_those_of_the_english_page(page: Path) -> None:
    ours, theirs = numbers(page), numbers(english(page))
    assert ours - theirs == Counter()
    assert page.name in SHORTER or theirs - ours == Counter()


@pytest.mark.parametrize("page", TWINS, ids=lambda page: page.name)
def test_links_lead_to_chinese_pages_where_there_are_any(page: Path) -> None:
    text = page.read_text("utf-8").partition("\n\n[English]")[2].partition("\n")[2]
    for target in re.findall(r"\]\(([^)#]+\.md)", text):
        twin = page.parent / target.replace(".md", ".zh-CN.md")
        assert target.endswith(".zh-CN.md") or not twin.exists(), target


def test_one_word_for_one_thing() -> None:
    table = (DOCS / "README.zh-CN.md").read_text("utf-8").partition("## 用语")[2]
    terms = re.findall(r"^\| ([a-z -]+) \| (\S+) \|$", table, re.M)
    assert len(terms) == 14
    for page in TWINS:
        theirs, ours = prose(english(page)).lower(), prose(page)
        for term, word in terms:
            word_of = rf"(?<![`\w./-]){term.replace('y', '(?:y|ies)')}s?(?![\w`/-])"
            assert page.name in SHORTER or not re.search(word_of, theirs) or word in ours, (
                f"{page.name}: {term} is {word}"
            )
        assert [word for word in OTHER_WORDS if word in ours] == [], page.name
