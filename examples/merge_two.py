"""Two federations learn two tasks on one CLIP; their adapters are merged into one for both.

Digits and icons, each with its own classes and validation images. Every way to merge is tried with
its default weights, and one with weights that are searched. All of it is small, to be quick.

    python examples/merge_two.py
"""

import tempfile
from pathlib import Path

import fedclip
from fedclip.adapters.merge import merge
from fedclip.adapters.merge_search import Validation
from fedclip.lora.merge_methods import METHODS
from fedclip.models.adapter_updates import read_lora
from fedclip.reports.listener import Listener

COMMON = {
    "client": {"local_epochs": 2, "learning_rate": 3e-3},
    "federation": {"rounds": 2, "num_clients": 2},
}
place = Path(tempfile.mkdtemp())
runs = []
for name in ("digits", "icons"):
    data = {"name": name, "max_train_examples": 400, "validation_fraction": 0.2}
    runs.append(fedclip.run(COMMON | {"data": data}, output=place / name).folder)

adapters = [read_lora(run / "adapter") for run in runs]
tasks = [own for run in runs for own in Validation.of_run(run, adapters[0], Listener())]


def show(name, adapter):
    """Print the accuracy of the base with an adapter on both tasks."""
    digits, icons = (task.judge(adapter)[0] for task in tasks)
    print(f"{name:16} digits {digits:.3f}  icons {icons:.3f}", flush=True)


for run, adapter in zip(runs, adapters, strict=True):
    show(f"{run.name} alone", adapter)
for method in METHODS:
    merge(runs, place / method, method=method)
    show(method, read_lora(place / method))
facts = merge(runs, place / "searched", method="svd", search=runs)
show("svd, searched", read_lora(place / "searched"))
print("weights", facts["weights"])
