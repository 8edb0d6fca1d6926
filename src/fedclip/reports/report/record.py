"""What a report is made of: a run's files as records, of which nothing is believed unchecked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
ByName = dict[str, Number | None]


class Record(BaseModel):
    """Checked fields of a file; fields that a report does not show are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Spread(Record):
    """A figure over clients."""

    mean: Number
    min: Number
    max: Number


class LeftOut(Record):
    """A client that a round did without."""

    client: str
    reason: str


class RoundLine(Record):
    """A line of `metrics.jsonl`."""

    server_round: Count
    loss: Number | None = None
    test_loss: Number | None = None
    accuracy: Number | None = None
    test_examples: Count | None = None
    zero_shot_accuracy: Number | None = None
    client_accuracy: Spread | None = None
    accuracy_by_client: ByName = {}
    bytes_up: Number = 0
    bytes_down: Number = 0
    epsilon: Number | None = None
    left_out: list[LeftOut] = []


class TimeLine(Record):
    """A line of `timing.jsonl`."""

    server_round: Count
    seconds: Number
    training_seconds: Number


class Worst(Record):
    """A class and its recall."""

    name: str
    recall: Number


class Best(Record):
    """The best round by validation."""

    server_round: Count
    validation_accuracy: Number
    accuracy: Number | None = None


class Privacy(Record):
    """What a private run promises."""

    guarantee: bool
    unit: str
    epsilon: Number
    delta: Number
    clip_norm: Number


class Summary(Record):
    """What a report shows of `summary.json`; older versions have written less."""

    rounds: Count
    stopped_by: str | None = None
    personal: bool = False
    zero_shot_accuracy: Number | None
    accuracy: Number | None
    majority_class_rate: Number | None = None
    macro_f1: Number | None = None
    zero_shot_macro_f1: Number | None = None
    worst_class: Worst | None = None
    zero_shot_worst_class: Worst | None = None
    best: Best | None = None
    base_parameters: Count | None = None
    trainable_parameters: Count
    bytes_up_per_client_round: Number
    bytes_down_per_client_round: Number
    engine: str
    device: str = ""
    precision: str
    bad_images: Count = 0
    retrieval: dict[str, dict[str, Number | None]] | None = None
    zero_shot_retrieval: dict[str, dict[str, Number | None]] | None = None
    adapters: dict[str, ByName] = {}
    privacy: Privacy | None = None
    versions: dict[str, str]
    seconds: Number | None = None


class Examples(Record):
    """Numbers of a site's examples of one role."""

    num_examples: Count
    by_class: list[Count] = []


class Site(Record):
    """A site of `partition.json`."""

    client_id: str
    train: Examples


class Partition(Record):
    """Who has what, of one data set."""

    class_names: list[str] = []
    clients: list[Site]


class Sample(Record):
    """A test image with its true and its predicted class, by number, and its file or row."""

    image: str = Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}$")
    label: Count
    predicted: Count
    confidence: Number
    place: str = ""


class LastPredictions(Record):
    """The last predictions on a test set: counts `[true, predicted, n]`, and some images."""

    class_names: list[str]
    confusion: list[tuple[Count, Count, Count]]
    samples: list[Sample] = []

    def model_post_init(self, _: Any) -> None:
        """Checks that every number names a class."""
        named = [c for row in self.confusion for c in row[:2]]
        named += [c for one in self.samples for c in (one.label, one.predicted)]
        if max(named, default=-1) >= len(self.class_names):
            raise ValueError("a number of a class that there is not")


@dataclass(frozen=True)
class Layer:
    """An adapted layer: its path, its rank, and the Frobenius norm of its update."""

    path: str
    rank: int
    norm: float


@dataclass(frozen=True)
class RunRecord:
    """All that a report shows of a run; tasks are `{"": ...}` where there is only one."""

    name: str
    config: Mapping[str, Any]
    config_text: str
    rounds: Sequence[RoundLine]
    times: Sequence[TimeLine] = ()
    summary: Summary | None = None
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    tested: Mapping[str, LastPredictions] = field(default_factory=dict)
    layers: Sequence[Layer] = ()
