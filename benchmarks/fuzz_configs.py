"""Damaged configurations: files, overrides, grids of `bench` and files of sites."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fuzz_damage import Damaged
from fedclip.config import Config
from fedclip.config.loading import dump_config, load_config
from fedclip.config.section import lookup
from fedclip.config.wording import known_keys
from fedclip.deploy.site.config import load_site
from fedclip.experiment.bench.plan import make_plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KEYS = [key for key, _ in known_keys(Config)]
WORDS = (
    *("yes", "no", "on", "off", "Yes", "NO", "y", "n", "1:30", "1:30:00", "010", "0o10", "1_000"),
    *("0x1F", "0b11", "2024-01-01", "2024-01-01T00:00:00Z", "190:20:30.15", "+.5_1", "=", "<<"),
)
"""Words that readers of YAML 1.1 and 1.2 take for different things: texts, or nothing."""
NUMBERS = (
    *("0", "-1", "1", "2", "64", "65", "0.5", "1.0", "-0.0", "1e-4", "1e400", "5e-324", "1.7e308"),
    *("2147483648", "18446744073709551616", "9" * 40, "9" * 400, "9" * 5000, "1" + "0" * 60),
    *(".inf", "-.inf", ".nan", "1e999999999", "0.30000000000000004", "1e-320"),
)
TEXTS = (
    *("null", "~", "true", "false", "''", '""', "[]", "{}", "[1, 2]", "{a: 1}", "[[]]", "[{}]"),
    *("a", "cat", "auto", "fedavg", "digits", "imagefolder", "hub", "pairs", "icons", "x.py:Y"),
    *("../..", "/dev/zero", "/", ".", "''' '", "'\\0'", '"\\0"', '"\\uD800"', '"\\UFFFFFFFF"'),
    *("!!int ''", "!!timestamp abc", "!!bool maybe", "!!python/object:os.system x", "!x y"),
    *("!!binary '='", "!!set {a}", "!!omap [a]", "&a [*a]", "*nothing", "&a {b: *a}", "|\n  x"),
    *("(a+)+$", "((a*)*)*b", "(a|a)*b", "{'(.*)*x': 1}", "{'(?P<a': 2}", "{q_proj: 4}", "${seed}"),
    *("{client-0: 4}", "{4: 0.5, 8: 0.5}", "{4: .nan}", "{0: 1.0}", "[4, 8]", "[[4], 8]", "${x}"),
    *("a: b", "a #1", "- a", "? a", "%TAG", "@a", "`a`", "\ta", "é", "类", "\u202e", "\U0001f600"),
    "x" * 5000,
    "[" * 200 + "]" * 200,
    "{a: " * 100 + "}" * 100,
)


@dataclass(frozen=True)
class Case:
    """What is read, and how: a file, overrides, and values that must be texts if accepted."""

    how: str  # config, grid, site
    file: Path | None
    overrides: tuple[str, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()  # key, word

    def __str__(self) -> str:
        content = self.file.read_bytes()[:3000] if self.file else b""
        return f"{self.how} {self.overrides}\n{content.decode(errors='backslashreplace')}"


def make(rng: random.Random, place: Path) -> Case:
    """One damaged configuration."""
    kinds: tuple[Callable[[random.Random, Path], Case], ...]
    kinds = (_values, _values, _values, _text, _text, _overrides, _overrides, _grid, _site)
    return rng.choice(kinds)(rng, place)


def read(case: Case) -> None:
    """Reads a configuration as the commands do; Damaged where it comes out otherwise."""
    if case.how == "grid":
        assert case.file is not None
        plan = make_plan(case.file)
        for arm in plan.arms:
            plan.problem(arm)
        return
    if case.how == "site":
        assert case.file is not None
        load_site(case.file, case.overrides)
        return
    config = load_config(case.file, case.overrides)
    again = (case.file or Path("fuzz.yaml")).with_suffix(".again.yaml")
    if case.file is not None:
        again.write_text(dump_config(config), encoding="utf-8")
        if load_config(again) != config:
            raise Damaged("what is written is read back as something else")
    tree = config.model_dump(mode="json")
    for key, word in case.texts:
        found = lookup(tree, key)
        if found is not None and isinstance(found, bool | int | float):
            raise Damaged(f"{key}: {word} became {found!r}")
    for key, value in _leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise Damaged(f"{key} is {value}")
        if isinstance(value, int | float) and abs(value) >= 2**63:
            raise Damaged(f"{key} is {value}")


def _values(rng: random.Random, place: Path) -> Case:
    """A shipped configuration with damaged values, keys and structure."""
    tree = yaml.safe_load(rng.choice(sorted(CONFIGS.glob("*.yaml"))).read_text(encoding="utf-8"))
    lines = []
    for _ in range(rng.randint(1, 3)):
        where = rng.choice(list(_mappings(tree)))
        key = rng.choice([*where, *rng.sample(KEYS, 2)])
        match rng.randrange(7):
            case 0:
                where[_mangled(rng, str(key))] = where.pop(key, 1)
            case 1:
                where[key] = [where.get(key)]
            case 2:
                where[key] = {str(key): where.get(key)}
            case 3:
                where[key] = rng.choice([None, True, 0, -1, 1.5, "", "x", [], {}, [None], {"": 1}])
            case 4:
                other = rng.choice(list(_mappings(tree)))
                other[key] = copy.deepcopy(where.pop(key, {}))
            case _:
                lines.append((rng.choice(KEYS), _junk(rng)))
    text, texts = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), []
    if lines:  # in the place of the tree, with the values as they are typed
        text = ""
        for name, value in dict(lines).items():
            *above, last = name.split(".")
            opened = "".join("  " * i + f"{part}:\n" for i, part in enumerate(above))
            text += opened + "  " * len(above) + f"{last}: {value}\n"
            if value in WORDS:
                texts.append((name, value))
    return Case("config", _written(place, text.encode("utf-8", "replace")), (), tuple(texts))


def _text(rng: random.Random, place: Path) -> Case:
    """A shipped configuration with damaged bytes."""
    data = bytearray(rng.choice(sorted(CONFIGS.glob("*.yaml"))).read_bytes())
    bits = [b"\0", b"\t", b"\xff", b"{", b"[", b"}", b"]", b": ", b"- ", b"&a ", b"*a", b"!!int "]
    bits += [
        b"'",
        b'"',
        b"|",
        b">",
        b"%YAML 1.1\n",
        b"---\n",
        b"...\n",
        b"<<: ",
        b"? ",
        b"\xef\xbb\xbf",
    ]
    bits += [b"\\", b"#", b"\r", b"\xc2\x85", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"\xed\xa0\x80"]
    bits += [value.encode() for value in (*WORDS, *NUMBERS[:8])]
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        size = rng.choice([1, 2, 10, 100])
        match rng.randrange(6):
            case 0:
                data[at:at] = rng.choice(bits)
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
            case 4:
                other = rng.randrange(len(data) + 1)
                data[at : at + size] = data[other : other + size]
            case 5:
                del data[at:]
    return Case("config", _written(place, bytes(data)))


def _overrides(rng: random.Random, place: Path) -> Case:
    """Damaged overrides, over the defaults or a shipped configuration."""
    given, texts = [], []
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(KEYS)
        value = _junk(rng)
        if rng.random() < 0.15:
            key = _mangled(rng, key)
        elif value in WORDS:
            texts.append((key, value))
        given.append(rng.choice([f"{key}={value}"] * 9 + [f"{key}{value}"]))
    file = rng.choice([None, CONFIGS / "quickstart.yaml"])
    file = file and _written(place, file.read_bytes())
    return Case("config", file, tuple(given), tuple(texts))


def _grid(rng: random.Random, place: Path) -> Case:
    """A damaged grid of `fedclip bench`."""
    file = rng.choice(sorted((CONFIGS / "bench").glob("*.yaml")))
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["config"] = str(CONFIGS / "quickstart.yaml")
    for _ in range(rng.randint(1, 2)):
        where = rng.choice(list(_mappings(tree)))
        key = rng.choice(list(where) or ["arms"])
        match rng.randrange(5):
            case 0:
                where[_mangled(rng, str(key))] = where.pop(key, 1)
            case 1:
                where[key] = [where.get(key)]
            case 2:
                where[key] = {str(key): where.get(key)}
            case 3:
                where[key] = rng.choice(
                    [None, True, 0, -1, 2**70, "", "a=b", [], {}, [None], 1e308]
                )
            case 4:
                where["overrides"] = [f"{rng.choice(KEYS)}={_junk(rng)}"]
    return Case("grid", _written(place, yaml.safe_dump(tree).encode("utf-8", "replace")))


def _site(rng: random.Random, place: Path) -> Case:
    """A damaged file of a site."""
    keys = ("name", "coordinator", "keys", "state", "device", "model", "port", "resident", "data")
    more = ("free_disk_gb", "data.path", "data.classes", "data.memory_gb", "policy", "policy.x")
    lines = [f"{key}: {_junk(rng)}" for key in rng.sample(keys, rng.randint(1, 3))]
    changes = tuple(f"{key}={_junk(rng)}" for key in rng.sample(more, rng.randint(0, 2)))
    return Case("site", _written(place, "\n".join(lines).encode("utf-8", "replace")), changes)


def _junk(rng: random.Random) -> str:
    value = rng.choice(rng.choice((WORDS, NUMBERS, TEXTS)))
    if rng.random() < 0.1:
        return f"[{value}, {rng.choice(WORDS)}]"
    return value


def _mangled(rng: random.Random, key: str) -> str:
    at = rng.randrange(len(key) + 1)
    added = rng.choice(["x", ".", "", " ", "..", "[0]", "é", "\0", "=", "__class__", "a." * 200])
    return key[:at] + added + key[at + rng.randint(0, 1) :]


def _mappings(tree: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from _mappings(value)


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _leaves(value, key)
    elif not isinstance(tree, bool):
        yield key, tree


def _written(place: Path, data: bytes) -> Path:
    file = place / "fuzz.yaml"
    file.write_bytes(data)
    return file
