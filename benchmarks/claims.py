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
SIGNS = ("better", "worse", "equal", "more", "fewer")
Ends = tuple[float, float]


def fault(claim: Mapping[str, Any], level: float, results: Path = RESULTS) -> str | None:
    """Why a claim's interval does not bear it, or None.

    `level` is that of the interval, corrected for the claims that are read out of one file.
    """
    result = json.loads((results / claim["file"]).read_text(encoding="utf-8"))
    if "arm" in claim:
        return _fault_of_arm(claim, result, level)
    if "ratio" in claim:
        ours, theirs = (_values(result, path) for path in claim["ratio"])
        return _outside(claim, ratio_interval(ours, theirs, level))
    if "figure" in claim:
        figures, key = result["figures"], claim["figure"]
        return _outside(claim, (figures[f"{key}_low"], figures[f"{key}_high"]))
    return "it names neither arm, ratio nor figure"


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


def _fault_of_arm(claim: Mapping[str, Any], result: Any, level: float) -> str | None:
    arms = _at(result, claim.get("grid", "details.arms"))
    arm, reference, sign = arms[claim["arm"]], claim["reference"], claim["sign"]
    metric = claim.get("metric", "accuracy")
    if sign not in SIGNS:
        return f"sign is {sign!r}, not one of {', '.join(SIGNS)}"
    if metric == "accuracy":
        minus = arm["minus"][reference]
        if minus.get("excluded"):
            return f"it takes part in no claim: {minus['excluded']}"
        if "corrected_low" not in minus:
            return "its file has no corrected interval; run the grid again"
        ends = minus["corrected_low"], minus["corrected_high"]
    else:
        ends = _paired(arm, arms[reference], metric, level)
    low, high = ends
    if sign == "equal":
        margin = claim["margin"]
        held = -margin < low and high < margin
    else:
        held = low > 0 if sign in ("better", "more") else high < 0
    return None if held else f"the interval is {low:+.4f} to {high:+.4f}"


def _paired(
    arm: Mapping[str, Any], reference: Mapping[str, Any], metric: str, level: float
) -> Ends:
    theirs = {run["seed"]: run[metric] for run in reference["runs"]}
    apart = [run[metric] - theirs[run["seed"]] for run in arm["runs"] if run["seed"] in theirs]
    values = np.asarray(apart, dtype=float)  # a None becomes NaN, of which nothing holds
    half = float(stats.t.ppf(1 - level / 2, len(values) - 1)) * values.std(ddof=1)
    half /= math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _outside(claim: Mapping[str, Any], ends: Ends) -> str | None:
    low, high = ends
    held = low > claim.get("above", -math.inf) and high < claim.get("below", math.inf)
    return None if held else f"the interval is {low:.3f} to {high:.3f}"


def _values(result: Any, path: str) -> list[float]:
    """The repeats at a path; `a.b[].c` takes c of each entry of the list a.b."""
    head, _, key = path.partition("[].")
    found = _at(result, head)
    return [entry[key] for entry in found] if key else found


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
        changed = [room for room, digest in now.items() if then.get(room) != digest]
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
    files = [claim["file"] for claim in claims["claims"]]
    faults = [
        f"{claim['says']!r} does not hold: {why}"
        for claim in claims["claims"]
        if (why := fault(claim, LEVEL / files.count(claim["file"])))
    ]
    total = sum(len(list(comparative(text))) for text in texts.values())
    print(
        f"{total} comparative sentences on {len(texts)} pages; {len(files)} claims, "
        f"{len(files) - len(faults)} of them hold"
    )
    for line in stale_results():
        print(f"stale: {line}")
    problems = [f"neither claim nor listed as none: {line}" for line in without]
    problems += [f"no such sentence any more: {line}" for line in unused]
    print("\n".join([*problems, *faults]), end="\n" if problems or faults else "", file=sys.stderr)
    return 1 if problems or faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
