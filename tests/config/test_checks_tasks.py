"""The `tasks` section and the ways of sharing: what is taken over, and what is refused."""

import pytest

from fedclip.config.loading import config_from_dict, dump_config, load_config
from fedclip.errors import UsageError

TASKS = {"a": {"name": "digits"}, "b": {"name": "icons"}}


def sharing(mode, **keys):
    return {"sharing": {"mode": mode, **keys}}


def test_a_task_has_what_data_says_but_for_what_it_says_itself(tmp_path):
    config = config_from_dict(
        {
            "data": {"batch_size": 16, "partition": {"name": "dirichlet", "alpha": 0.3}},
            "tasks": {
                "a": {"partition": {"alpha": 2.0}},
                "b": {"name": "icons", "batch_size": 8, "num_clients": 3},
            },
        }
    )
    a, b = config.tasks["a"], config.tasks["b"]
    assert (a.name, a.batch_size, a.partition.name, a.partition.alpha) == (
        "digits",
        16,
        "dirichlet",
        2.0,
    )
    assert (b.name, b.batch_size, b.num_clients, b.partition.alpha) == ("icons", 8, 3, 0.3)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_a_task_s_keys_are_changed_on_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("tasks:\n  a: {name: digits}\n  b: {name: icons}\n")
    config = load_config(tmp_path / "c.yaml", ["tasks.a.num_clients=2", "data.batch_size=4"])
    assert config.tasks["a"].num_clients == 2
    assert config.tasks["b"].batch_size == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": {"a": {"nme": "x"}, "b": {}}}, r"unknown key tasks\.a\.nme; known keys under"),
        ({"tasks": {"a": {"name": "x"}, "b": {}}}, r"tasks\.a\.name must be one of digits, "),
        ({"tasks": {"a/b": {}, "c": {}}}, r"names under tasks are letters, .* got the text 'a/b'"),
        ({"tasks": {"One": {}, "one": {}}}, r"tasks\.One: another task is called so but for case"),
        ({"tasks": {"x" * 64: {}, "b": {}}}, r"names under tasks are letters"),
        ({"tasks": {"a": 3, "b": {}}}, r"tasks\.a must be a mapping of keys, got 3"),
        ({"tasks": ["a"]}, r"tasks must be a mapping of names to mappings, got \['a'\]"),
        (
            {"tasks": {"a": {"partition": {"alpha": 0}}, "b": {}}},
            r"tasks\.a\.partition\.alpha must",
        ),
        ({"tasks": {"a": {}}}, r"tasks names one task, a; name two or more, or use data"),
        ({"tasks": {**TASKS, "c": {"name": "hub"}}}, r"tasks\.c\.path must name a hub id"),
        (
            {"tasks": {**TASKS, "c": {"test_fraction": 0.95}}},
            r"tasks\.c\.validation_fraction .* and tasks\.c\.test_fraction .* leave nothing",
        ),
        ({"tasks": TASKS, "model": {"head": "linear"}}, r"every task has classes of its own"),
        ({"tasks": TASKS, "model": {"num_classes": 3}}, r"model\.num_classes makes one linear"),
        ({"tasks": TASKS, "model": {"lora": {"enabled": False}}}, r"tasks share adapters, but"),
        ({"tasks": TASKS, "federation": {"strategy": "centralised"}}, r"belongs to no task"),
        ({"tasks": TASKS, "evaluation": {"other_data": ["icons"]}}, r"measured on every task"),
        (
            {"tasks": {**TASKS, "c": {"train_classes": 0.5}}},
            r"tasks\.c\.train_classes: base-to-new",
        ),
        ({"federation": sharing("per_task")}, r"per_task needs several tasks; name them under"),
        (
            {"tasks": TASKS, "federation": sharing("per_task") | {"strategy": "fedsa"}},
            r"per_task makes a model for each group of clients, fedsa one for each client",
        ),
        (
            {"tasks": TASKS, "federation": sharing("per_task") | {"ditto_mu": 0.1}},
            r"per_task makes a model for each group of clients, federation\.ditto_mu one",
        ),
        (
            {
                "tasks": TASKS,
                "model": {"lora": {"use_dora": True}},
                "federation": sharing("per_task"),
            },
            r"ends with a merge of adapters, which DoRA's are not fit for",
        ),
        (
            {"tasks": TASKS, "federation": sharing("shared+task") | {"strategy": "flora"}},
            r"shared\+task goes with strategies that average tensors: fedavg, fedit; .* is flora",
        ),
        (
            {"tasks": TASKS, "federation": sharing("shared+task", shared_rank=8)},
            r"shared_rank must be less than it",
        ),
        (
            {"tasks": TASKS, "federation": sharing("per_task", shared_rank=4)},
            r"shared_rank belongs to federation\.sharing\.mode: shared\+task; the mode is per_task",
        ),
        ({"federation": sharing("shared", clusters=2)}, r"clusters belongs to .*mode: clusters"),
        (
            {"federation": sharing("clusters", cluster_round=10)},
            r"cluster_round \(10\) must come before the last round \(federation\.rounds: 10\)",
        ),
        (
            {
                "federation": sharing("clusters") | {"scaffold": True},
                "optimizer": {"name": "sgd"},
            },
            r"clusters does not go with federation\.scaffold",
        ),
        (
            {"federation": sharing("clusters"), "model": {"lora": {"enabled": False}}},
            r"clusters needs an adapter",
        ),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        config_from_dict(values)
