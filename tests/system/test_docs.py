"""The documentation does what it says: commands, Python blocks, YAML blocks, links.

The blocks of a page are carried out in order in one folder, as a reader would. Runs are cut to one
round on few examples, and models from the hub are replaced by the embedded one; before that, every
command is checked as it is printed. `<!-- sketch -->` before a Python block says that it only has
to compile. A Chinese page has the same code as its English twin, which stands for it.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import shlex
import shutil
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import typer
from PIL import Image

from fedclip.cli import main as cli
from fedclip.config.loading import load_config
from fedclip.config.strict_yaml import parse_yaml

ROOT = Path(__file__).parents[2]
CODE = ("bash", "python", "yaml")
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TWINS = [page for page in PAGES if page.name.endswith(".zh-CN.md")]
CLIP = "openai/clip-vit-base-patch32"
# Programs that a page may call besides fedclip; they are not carried out.
OTHERS = {
    *("apt-get", "cd", "export", "hf", "ls", "make", "pip", "python", "scp", "source", "torchrun"),
    *("docker", "flower-superlink", "flwr", "ray", "ssh-keygen"),
}
# They ask a coordinator that runs; tests/system/test_flower_processes.py has one.
NEED_A_COORDINATOR = {"register", "revoke", "list"}
SMALL = [
    "federation.rounds=1",
    "client.local_epochs=1",
    "data.max_train_examples=80",
    "evaluation.max_examples=8",
]

# What stands in Chinese behind a link to an English page.
ENGLISH = "\N{FULLWIDTH LEFT PARENTHESIS}英文\N{FULLWIDTH RIGHT PARENTHESIS}"

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of libraries is not the pages' matter


class Block(NamedTuple):
    """A fenced block: its language, its text, and whether it is a sketch."""

    language: str
    text: str
    sketch: bool


def blocks(page: Path, *languages: str) -> list[Block]:
    found = re.findall(
        r"(<!-- sketch -->\n)?^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S
    )
    every = [Block(language, text, bool(sketch)) for sketch, language, text in found]
    return [block for block in every if block.language in languages]


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line]


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The names under which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def overrides_of(arguments: list[str]) -> list[str]:
    return [text for text in arguments if "=" in text]


# --- as printed ---


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_commands_are_known(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    group: Any = typer.main.get_command(cli.app)
    own = {
        match
        for block in blocks(page, "yaml")
        for match in re.findall(r"\A# (\S+\.yaml)", block.text)
    }
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(page, "bash"):
        for program, *words in commands(block.text):
            if program != "fedclip":
                assert program in OTHERS, program
                if program == "make":
                    assert all(re.search(rf"^{word}:", makefile, re.M) for word in words), words
                if program == "python" and words[0] != "-m":
                    assert (ROOT / words[0]).is_file(), words[0]
                continue
            if words[0].startswith("--"):
                continue
            name, *arguments = words
            command = group.commands[name]
            if isinstance(command, click.Group):
                name, *arguments = arguments
                command = command.commands[name]
            command.make_context(name, list(arguments), parent=click.Context(group))
            # Written by a command, or no configuration of a run.
            others = ("-o", "--output", "--grid", "--config")
            own |= {b for a, b in pairwise(arguments) if a in others}
            for file in arguments:
                if file.endswith(".yaml") and file not in own:
                    load_config(ROOT / file, overrides_of(arguments))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_python_and_json_and_yaml_blocks_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block.text)
    for block in blocks(page, "json"):
        json.loads(block.text)
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block.text, encoding="utf-8")
        load_config(file)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http", "#")):
            file, _, anchor = target.partition("#")
            assert (page.parent / file).exists(), target
            assert not anchor or anchor in anchors(page.parent / file), target
        elif target.startswith("#"):
            assert target[1:] in anchors(page), target


@pytest.mark.parametrize("index", ["README.md", "README.zh-CN.md"])
def test_every_page_is_in_the_index_of_its_language(index: str) -> None:
    """The Chinese one names English pages where there is no Chinese one, and says so."""
    text = (ROOT / "docs" / index).read_text("utf-8")
    linked = re.findall(rf"\]\(([\w.-]+\.md)\)({ENGLISH})?", text.partition("\n\n")[2])
    chinese = "zh-CN" in index
    names = {page.name for page in (ROOT / "docs").glob("*.md")}
    twins = {name for name in names if name.endswith(".zh-CN.md")}
    english = names - twins
    for name in english - {"README.md"}:
        twin = name.replace(".md", ".zh-CN.md")
        wanted = (twin, "") if chinese and twin in twins else (name, ENGLISH if chinese else "")
        assert wanted in linked, wanted


@pytest.mark.parametrize("page", TWINS, ids=title)
def test_twins_have_the_same_code(page: Path) -> None:
    twin = page.with_name(page.name.replace(".zh-CN", ""))
    for language, read in (
        ("bash", commands),
        ("python", lambda text: ast.dump(ast.parse(text))),
        ("yaml", parse_yaml),
    ):
        ours, theirs = ([read(b.text) for b in blocks(p, language)] for p in (page, twin))
        assert ours == theirs, language


# --- carried out ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages speak of: configurations, a finished run, images, pairs."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, place / name)
    random = np.random.default_rng(0)
    for site in ("hospital_a", "hospital_b"):
        for label in ("normal", "pneumonia"):
            folder = place / "my-images" / site / label
            folder.mkdir(parents=True)
            for number in range(10):
                pixels = random.integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.copytree(place / "my-images" / "hospital_a", place / "my-photos")
    pairs = [
        {"image": str(path), "caption": f"{path.parent.name} lungs", "site": path.parts[1]}
        for path in sorted(Path(p).relative_to(place) for p in place.glob("my-images/*/*/*.png"))
    ]
    # Images lie below the table: its cells name files of its own folder only.
    shutil.copytree(place / "my-images", place / "my-pairs" / "my-images")
    with (place / "my-pairs" / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["image", "caption", "site"])
        table.writeheader()
        table.writerows(pairs)
    shutil.copy(place / "my-images/hospital_a/normal/0.png", place / "digit.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        carry_out(["run", "configs/quickstart.yaml", "--output", "runs/first"], patch)
    return place


def carry_out(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Call `fedclip` with the words of a command, made small."""
    words = [word.replace(f"random:{CLIP}", "random:tiny").replace(CLIP, "tiny") for word in words]
    configs = [word for word in words[1:] if word.endswith(".yaml")]
    if words[0] == "run" and configs:
        words += SMALL
    if configs and words[0] in ("run", "info"):
        config = load_config(Path(configs[0]), overrides_of(words))
        if config.model.model_name == CLIP:
            words.append("model.model_name=tiny")
        if config.data.name in ("fashion_mnist", "hub"):
            words += ["data.name=digits", "data.path=null"]
        for task, data in config.tasks.items():
            words.append(f"tasks.{task}.max_train_examples=80")
            if data.name == "fashion_mnist":
                words.append(f"tasks.{task}.name=digits")
    if words[0] == "bench":  # hours of work; experiment/test_bench.py carries a small grid out
        words += ["--dry-run"]
    if words[0] == "audit":
        words += [*SMALL, *(() if "--membership" in words else ("--canaries", "20"))]
    if "configs/privacy.yaml" in configs:
        words += ["data.batch_size=4", "data.partition.min_size=8"]
    if words[0] == "keys" and words[1] in NEED_A_COORDINATOR:
        return
    patch.setattr(sys, "argv", ["fedclip", *words])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, " ".join(words)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in TWINS and blocks(page, *CODE)], ids=title
)
def test_a_page_can_be_followed(
    page: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text("utf-8")
    left_out = shutil.ignore_patterns("first") if "--output runs/first" in text else None
    shutil.copytree(finished, tmp_path / "here", ignore=left_out)
    monkeypatch.chdir(tmp_path / "here")
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, *CODE):
        if block.language == "python":
            if not block.sketch:
                if "flwr" in block.text:
                    pytest.importorskip("flwr")
                exec(compile(block.text.replace(CLIP, "tiny"), title(page), "exec"), scope)
        elif block.language == "yaml":
            for name in re.findall(r"\A# (\S+\.yaml)", block.text):
                Path(name).write_text(block.text, encoding="utf-8")
        else:
            for program, *words in commands(block.text):
                if "onnx" in words:
                    pytest.importorskip("onnxruntime", reason="ONNX is the extra 'onnx'")
                if program == "fedclip" and not words[0].startswith("--"):
                    carry_out(words, monkeypatch)


def keys(value: Any) -> set[str]:
    """Names at the top of a record and in the mappings right below it."""
    found = set(value)
    for name in ("client_accuracy", "versions", "best"):
        found |= set(value.get(name) or ())
    return found


def test_the_run_folder_page_lists_every_file_and_key(finished: Path) -> None:
    page = (ROOT / "docs/reference-run-folder.md").read_text("utf-8")
    run = finished / "runs/first"
    names = {path.name for path in (*run.iterdir(), *(run / "adapter").iterdir())}
    names |= keys(json.loads((run / "summary.json").read_text()))
    names |= set(json.loads((run / "partition.json").read_text()))
    for file in ("metrics.jsonl", "timing.jsonl"):
        for line in (run / file).read_text().splitlines():
            names |= keys(json.loads(line))
    missing = sorted(name for name in names if f"`{name}`" not in page and f"`{name}/`" not in page)
    assert not missing
