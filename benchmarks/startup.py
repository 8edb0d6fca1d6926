"""How long `fedclip --help` takes, from the shell's point of view.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result

REPEATS = 15


def main() -> None:
    """Times the command and writes the median."""
    command = [str(Path(sys.executable).with_name("fedclip")), "--help"]
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    print(f"fedclip --help: {median:.3f} s (median of {REPEATS}, slowest {max(seconds):.3f} s)")
    details = {"seconds": seconds, "command": "python benchmarks/startup.py"}
    write_result("startup", {"help_seconds": median}, details)


if __name__ == "__main__":
    main()
