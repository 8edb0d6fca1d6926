"""Holds the pages to their figures: every comparative sentence has a row in claims.yaml.

    python benchmarks/claims.py            says what holds, and which figures are stale
    python benchmarks/claims.py --list     rows for the sentences that have none

A row under `claims` names a result file, what is compared in it, and which way. One under
`no claim` is a sentence that compares, but says nothing about figures of ours.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sentences import ROOT, comparative, pages
from fedclip.experiment.bench.digest import code_digests, input_digests

CLAIMS = ROOT / "benchmarks" / "claims.yaml"
RESULTS = ROOT / "benchmarks" / "results"
LEVEL = 0.05
Ends = tuple[float, float]


def fault(claim: Mapping[str, Any], level: float, results: Path = RESULTS) -> str | None:
    """Why a claim's interval does not bear it, or None.

    `level` is that of the interval, corrected for the claims that are read out of one file.
    """
    result = json.loads((results / claim["file"]).read_text(encoding="utf-8"))
    if (reason := excluded(claim, result)) is not None:
        return reason
    ends, bounds = interval(claim, result, level), bounds_of(claim)
    if bounds[0] < ends[0] and ends[1] < bounds[1]:
        return None
    return f"the interval is {ends[0]:.4f} to {ends[1]:.4f}"


def excluded(claim: Mapping[str, Any], result: Any) -> str | None:
    """Why an arm takes part in no claim, or None."""
    if "arm" not in claim:
        return None
    minus = _minus(claim, _arms(claim, result))
    return f"it takes part in no claim: {minus['excluded']}" if minus.get("excluded") else None


def _minus(claim: Mapping[str, Any], arms: Mapping[str, Any]) -> Any:
    """An arm's difference to another, which of a product (`over:`) is named without its factors."""
    found, reference = arms[claim["arm"]]["minus"], claim["reference"]
    return found[reference if reference in found else reference.partition(".")[0]]


def interval(claim: Mapping[str, Any], result: Any, level: float) -> Ends:
    """The interval of what a claim measures."""
    if "ratio" in claim:
        ours, theirs = (_values(result, path) for path in claim["ratio"])
        return ratio_interval(ours, theirs, level)
    if "figure" in claim:
        figures, key = result["figures"], claim["figure"]
        return figures[f"{key}_low"], figures[f"{key}_high"]
    if "pairs" in claim:
        ours, theirs = (_values(result, path) for path in claim["pairs"])
        return _paired(ours, theirs, level)
    arms, metric = _arms(claim, result), claim.get("metric", "accuracy")
    arm, reference = arms[claim["arm"]], arms[claim["reference"]]
    if metric == "accuracy":  # corrected by Holm over its table
        minus = _minus(claim, arms)
        return minus["corrected_low"], minus["corrected_high"]
    by_seed = {run["seed"]: run[metric] for run in reference["runs"]}
    both = [run for run in arm["runs"] if run["seed"] in by_seed]
    return _paired([r[metric] for r in both], [by_seed[r["seed"]] for r in both], level)


def levels(claims: Sequence[Mapping[str, Any]]) -> list[float]:
    """Each claim's level: 0.05 over the number of things that are claimed out of its file."""
    told = ("says", "pages", "above", "below", "sign", "margin", "en", "zh")
    what = [json.dumps({k: v for k, v in c.items() if k not in told}) for c in claims]
    files = [claim["file"] for claim in claims]
    each = {file: len({w for w, f in zip(what, files, strict=True) if f == file}) for file in files}
    return [LEVEL / each[file] for file in files]


def bounds_of(claim: Mapping[str, Any]) -> Ends:
    """Where the interval must lie for the claim to hold."""
    sign = claim.get("sign")
    if sign is None:
        return claim.get("above", -math.inf), claim.get("below", math.inf)
    if sign == "equal":
        return -claim["margin"], claim["margin"]
    known = {"better": (0.0, math.inf), "more": (0.0, math.inf)}
    known |= {"worse": (-math.inf, 0.0), "fewer": (-math.inf, 0.0)}
    return known[sign]


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], level: float) -> Ends:
    """Interval of a ratio of two means of positive repeats, by Welch's t on the logarithms."""
    x, y = np.log(ours), np.log(theirs)
    if min(len(x), len(y)) < 2:
        raise ValueError("an interval needs two repeats at least")
    parts = [float(v.var(ddof=1)) / len(v) for v in (x, y)]
    error = math.sqrt(sum(parts))
    mean = float(x.mean() - y.mean())
    if error == 0:
        return math.exp(mean), math.exp(mean)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (x, y), strict=True))
    half = float(stats.t.ppf(1 - level / 2, freedom)) * error
    return math.exp(mean - half), math.exp(mean + half)


def _paired(ours: Sequence[float], theirs: Sequence[float], level: float) -> Ends:
    """Student's t on differences; a None among them becomes NaN, of which nothing holds."""
    apart = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    half = float(stats.t.ppf(1 - level / 2, len(apart) - 1)) * apart.std(ddof=1)
    half /= math.sqrt(len(apart))
    return float(apart.mean() - half), float(apart.mean() + half)


def _arms(claim: Mapping[str, Any], result: Any) -> Any:
    return _at(result, claim.get("grid", "details"))["arms"]


def _values(result: Any, path: str) -> list[float]:
    """The repeats at a path; `a.b[].c` takes c of each entry of a.b, the mean of its values."""
    head, _, key = path.partition("[].")
    found = _at(result, head)
    each = [_at(entry, key) for entry in found] if key else found
    return [fmean(value.values()) if isinstance(value, Mapping) else value for value in each]


def _at(result: Any, path: str) -> Any:
    for key in path.split("."):
        result = result[key]
    return result


def uncovered(claims: Mapping[str, Any], texts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Comparative sentences without a row, and rows without a sentence, each by its page."""
    without, unused = [], []
    for page, text in texts.items():
        rows = [c["says"] for c in claims["claims"] if page in c["pages"]]
        rows += claims["no claim"].get(page, [])
        sentences = list(comparative(text))
        without += [f"{page}: {s}" for s in sentences if not any(row in s for row in rows)]
        unused += [f"{page}: {row}" for row in rows if not any(row in s for s in sentences)]
    return without, unused


def stale_results(results: Path = RESULTS, root: Path = ROOT) -> list[str]:
    """Result files whose code or inputs have changed since, with what has; they are reported."""
    now, found = code_digests(), []
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        then = result.get("code")
        if then is None:
            found.append(f"{file.name}: measured before results carried digests")
            continue
        cleared = result.get("cleared", {}).get("code", then)  # by benchmarks/cleared.py
        changed = [room for room, digest in now.items() if cleared.get(room) != digest]
        inputs = result["details"].get("inputs", {})
        present = input_digests([root / name for name in inputs if (root / name).exists()], root)
        changed += [name for name, digest in inputs.items() if present.get(name) != digest]
        if changed:
            found.append(f"{file.name}: changed since: {', '.join(changed)}")
    return found


def main(arguments: list[str]) -> int:
    """Prints what holds; 1 where a sentence has no row, or a claim does not hold."""
    claims = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}
    without, unused = uncovered(claims, texts)
    if "--list" in arguments:
        for line in without:
            page, _, sentence = line.partition(": ")
            print(f"  {page}:\n    - {json.dumps(sentence[:90], ensure_ascii=False)}")
        return 0
    rows = claims["claims"]
    faults = [
        f"{row['says']!r} does not hold: {why}"
        for row, level in zip(rows, levels(rows), strict=True)
        if (why := fault(row, level))
    ]
    total = sum(len(list(comparative(text))) for text in texts.values())
    print(
        f"{total} comparative sentences on {len(texts)} pages; {len(rows)} claims, "
        f"{len(rows) - len(faults)} of them hold"
    )
    for line in stale_results():
        print(f"stale: {line}")
    problems = [f"neither claim nor listed as none: {line}" for line in without]
    problems += [f"no such sentence any more: {line}" for line in unused]
    print("\n".join([*problems, *faults]), end="\n" if problems or faults else "", file=sys.stderr)
    return 1 if problems or faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
