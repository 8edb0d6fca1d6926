#!/usr/bin/env bash
# All that is measured on a GPU, the most telling first: at most 8 minutes of an H100.
#
#     bash benchmarks/on_gpu.sh          writes benchmarks/results/*_gpu.json, prints one table last
#
# What fails, or runs into its limit, is told, and the rest is measured all the same. On a machine
# without the repository's history, FEDCLIP_COMMIT names the commit that is measured.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

measure() { # seconds at most, then the command
    local limit=$1
    shift
    echo "== $*"
    timeout "$limit" "$python" "$@" || echo "== failed or out of time ($?): $*"
}

measure 150 benchmarks/graphs.py
measure 70 benchmarks/floor.py
measure 80 benchmarks/scale.py
measure 120 benchmarks/peers.py --repeats 1
measure 50 benchmarks/prefix.py
measure 130 benchmarks/memory.py --repeats 1
"$python" - <<'END'
import json
from pathlib import Path

for path in sorted(Path("benchmarks/results").glob("*_gpu.json")):
    found = json.loads(path.read_text())
    gpu, commit = found["machine"].get("gpu"), str(found["commit"])[:8]
    print(f"{path.name}: {gpu}, torch {found['versions']['torch']}, {commit}, {found['date']}")
    for name, value in found["figures"].items():
        print(f"    {name:<48} {value:.4g}")
END
