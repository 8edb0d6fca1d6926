"""The configuration tree: defaults, ranges, and keys that must fit together."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest

from fedclip.config import Config, LoraConfig, OptimizerConfig
from fedclip.config.loading import (
    Source,
    config_from_dict,
    dump_config,
    load_config,
    validate_model,
    validated,
)
from fedclip.config.section import Removed, Section
from fedclip.config.wording import known_keys, section_of
from fedclip.errors import FedclipWarning, UsageError


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def problem(key: str, value: Any) -> str:
    with pytest.raises(UsageError) as error:
        config_from_dict(nested(key, value), "a.yaml")
    assert error.value.exit_code == 2
    return str(error.value)


def test_every_key_has_a_default_and_a_description() -> None:
    assert config_from_dict({}) == Config()
    for key, field in known_keys(Config):
        assert field.description, key


def test_rank_gives_alpha_unless_it_is_named() -> None:
    assert Config().model.lora.lora_alpha == 16
    assert LoraConfig(r=4).lora_alpha == 8
    assert config_from_dict(nested("model.lora", {"r": 4, "lora_alpha": None})) == config_from_dict(
        nested("model.lora", {"r": 4, "lora_alpha": 8.0})
    )
    assert LoraConfig(r=4, lora_alpha=6.5).lora_alpha == 6.5


@pytest.mark.parametrize("alpha", [1, 7.9, 16.1, 64])
def test_unusual_alpha_is_a_warning_that_names_the_key(alpha: float) -> None:
    with pytest.warns(FedclipWarning, match=r"model\.lora\.lora_alpha is usually .* \(8 to 16\)"):
        config = config_from_dict(nested("model.lora.lora_alpha", alpha))
    assert config.model.lora.lora_alpha == alpha


def test_without_lora_alpha_does_not_matter() -> None:
    config_from_dict(nested("model.lora", {"enabled": False, "lora_alpha": 100}))


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("seed", -1),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("precision", "fp8"),
        ("model.type", "blip"),
        ("model.model_name", ""),
        ("model.num_classes", 0),
        ("model.lora.r", 0),
        ("model.lora.r", 65),
        ("model.lora.r", 8.0),
        ("model.lora.r", True),
        ("model.lora.r", "8"),
        ("model.lora.lora_alpha", 0),
        ("model.lora.lora_dropout", -0.1),
        ("model.lora.lora_dropout", 0.31),
        ("model.lora.enabled", 1),
        ("model.lora.target_modules.text_encoder", ["qproj"]),
        ("model.lora.target_modules.vision_encoder", "q_proj"),
        ("client.local_epochs", 0),
        ("client.local_epochs", 1.5),
        ("client.learning_rate", 0),
        ("client.learning_rate", math.inf),
        ("client.proximal_mu", -1),
        ("optimizer.name", "adam"),
        ("optimizer.learning_rate", -1e-3),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.max_grad_norm", 0),
        ("optimizer.max_grad_norm", math.nan),
        ("optimizer.schedule", "step"),
        ("data.name", "mnist"),
        ("data.batch_size", 0),
        ("data.accumulation_steps", 0),
        ("data.max_train_examples", 0),
        ("data.validation_fraction", 1.0),
        ("data.test_fraction", -0.1),
        ("data.on_bad_image", "ignore"),
        ("data.on_empty_site", True),
        ("data.memory_gb", -1),
        ("data.class_names", []),
        ("data.class_names", ["a", 3]),
        ("data.templates", ["a photo"]),
        ("data.partition.name", "random"),
        ("data.partition.alpha", 0),
        ("data.partition.min_size", 0),
        ("federation.strategy", "fedmean"),
        ("federation.rounds", 0),
        ("federation.num_clients", 0),
        ("federation.clients_per_round", 0),
        ("federation.clients_per_round", 1.0),
        ("federation.clients_per_round", "all"),
        ("engine.name", "parallel"),
        ("evaluation.every", 0),
        ("evaluation.max_examples", 0),
        ("evaluation.keep_best", "yes"),
    ],
)
def test_a_value_out_of_range_names_key_expectation_and_file(key: str, bad: Any) -> None:
    text = problem(key, bad)
    assert text.startswith(key)
    assert " must be " in text
    assert ", got " in text
    assert "(a.yaml" in text
    assert "\n" not in text


def test_messages_say_what_was_expected() -> None:
    assert problem("model.lora.r", 128) == (
        "model.lora.r must be a whole number from 1 to 64, got 128 (a.yaml)"
    )
    assert "model.lora.lora_dropout must be a number from 0 to 0.3, got 0.5" in problem(
        "model.lora.lora_dropout", 0.5
    )
    assert "data.class_names[1] must be text, got 3" in problem("data.class_names", ["a", 3])
    assert "must be one of constant, linear, cosine, got the text 'step'" in problem(
        "optimizer.schedule", "step"
    )
    assert "data.templates[0] must be text with {} in it once" in problem(
        "data.templates", ["a photo"]
    )


@pytest.mark.parametrize(
    "key", [key for key, field in known_keys(Config) if section_of(field) is not None]
)
@pytest.mark.parametrize("bad", [["q_proj"], 3, "text", None])
def test_a_section_must_be_a_mapping(key: str, bad: Any) -> None:
    assert f"{key} must be a mapping with the keys" in problem(key, bad)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.lora.lora_dropot", "model.lora.lora_dropout"),
        ("model.lora.alpha", "model.lora.lora_alpha"),
        ("lora", "model.lora"),
        ("client.lora", "model.lora"),
        ("federation.round", "federation.rounds"),
        ("client.learning_rat", "client.learning_rate"),
        ("evaluation.proximal_mu", "client.proximal_mu"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, meant: str) -> None:
    assert problem(key, 1) == f"unknown key {key}; did you mean {meant}? (a.yaml)"


def test_an_unknown_key_unlike_any_other_lists_the_known_ones() -> None:
    assert problem("engine.xyzzy", 1) == (
        "unknown key engine.xyzzy; known keys under engine: name, group_size, "
        "memory_gb, prefix_cache, prefix_dtype, graphs (a.yaml)"
    )


def test_a_removed_key_at_its_default_is_passed_over() -> None:
    for config in (
        config_from_dict({"engine": {"compile": False}}),
        load_config(None, ["engine.compile=false"]),
        Config(engine={"compile": False}),
    ):
        assert config == Config()
        assert "compile" not in dump_config(config)


@pytest.mark.parametrize("value", [True, None, 0, "false", [False], {"x": False}])
def test_another_value_of_a_removed_key_is_refused_with_what_replaces_it(value: object) -> None:
    text = problem("engine.compile", value)
    assert text.startswith(
        "engine.compile was removed: the eager engine is as fast; leave the key out (got "
    )
    assert text.endswith(" (a.yaml)")


def test_a_removed_key_is_told_with_the_other_errors() -> None:
    with pytest.raises(UsageError) as error:
        load_config(None, ["engine.compile=true", "federation.rounds=0"])
    assert "engine.compile was removed" in str(error.value)
    assert "federation.rounds must be" in str(error.value)
    assert "(command line: engine.compile=true)" in str(error.value)


def test_every_section_can_have_removed_keys() -> None:
    class Old(Section):
        removed_keys: ClassVar = {"share": Removed(1.5, "use `part`")}
        part: float = 1.0

    assert validated(Old, {"share": 1.5}, Source("a.yaml")) == Old()
    with pytest.raises(UsageError, match="share was removed: use `part`"):
        validated(Old, {"share": 2.5}, Source("a.yaml"))


def test_all_errors_come_at_once() -> None:
    with pytest.raises(UsageError) as error:
        config_from_dict(
            {
                "seed": "x",
                "model": {"lora": {"r": 99, "rank": 3}},
                "client": {"learning_rate": 0.1, "local_epochs": 0},
                "optimizer": {"learning_rate": 0.2},
                "data": {"test_fraction": 0.5, "validation_fraction": 0.5, "name": "hub"},
            }
        )
    text = str(error.value)
    assert text.startswith("7 problems:\n")
    for part in (
        "seed must be",
        "model.lora.r must be",
        "unknown key model.lora.rank",
        "client.local_epochs must be",
        "client.learning_rate is 0.1 and optimizer.learning_rate is 0.2",
        "leave nothing to train on",
        "data.path must name a hub id",
    ):
        assert part in text


@pytest.mark.parametrize("section", ["client", "optimizer"])
def test_one_learning_rate_speaks_for_both(section: str) -> None:
    config = config_from_dict({section: {"learning_rate": 0.01}})
    assert config.client.learning_rate == config.optimizer.learning_rate == 0.01


def test_the_same_learning_rate_twice_is_fine() -> None:
    config = config_from_dict(
        {"client": {"learning_rate": 0.0001}, "optimizer": {"learning_rate": 1e-4}}
    )
    assert config.client.learning_rate == 1e-4
    assert Config(optimizer=OptimizerConfig(learning_rate=0.5)).client.learning_rate == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"data": {"test_fraction": 0.6, "validation_fraction": 0.4}},
            r"data\.validation_fraction \(0\.4\) and data\.test_fraction \(0\.6\)",
        ),
        (
            {"federation": {"num_clients": 3, "clients_per_round": 4}},
            r"clients_per_round must be at most federation\.num_clients \(3\), got 4",
        ),
        ({"data": {"name": "imagefolder"}}, r"data\.path must name the folder of images"),
        (
            {"model": {"num_classes": 3}, "data": {"class_names": ["a", "b"]}},
            r"model\.num_classes is 3, but data\.class_names has 2 names",
        ),
        ({"data": {"class_names": ["a", "b", "a"]}}, "names a class twice: a"),
        ({"model": {"lora": {"target_modules": {}}}}, "target_modules names no layer"),
    ],
)
def test_parts_that_do_not_fit_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config_from_dict(values)


def test_natural_sites_say_how_many_clients_there_are() -> None:
    values = {"data": {"name": "icons"}, "federation": {"num_clients": 3, "clients_per_round": 9}}
    assert config_from_dict(values).federation.clients_per_round == 9


def test_text_tower_alone_is_possible() -> None:
    lora = validate_model(nested("lora.target_modules", {"text_encoder": ["q_proj"]})).lora
    assert lora.target_modules.vision_encoder == ()
    assert lora.target_modules.text_encoder == ("q_proj",)


def test_the_dictionary_of_the_guide() -> None:
    config = validate_model(
        {
            "model_name": "openai/clip-vit-base-patch32",
            "num_classes": 10,
            "lora": {
                "enabled": True,
                "r": 8,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "target_modules": {"vision_encoder": ["q_proj", "v_proj", "k_proj", "out_proj"]},
            },
        }
    )
    assert config.num_classes == 10
    assert config.lora.target_modules.text_encoder == ()
    with pytest.raises(UsageError, match=r"^lora\.r must be .* \(the model's configuration\)$"):
        validate_model({"lora": {"r": 0}}, "the model's configuration")
    with pytest.raises(UsageError, match=r"^a configuration must be a mapping of keys, got 3"):
        validate_model(3)  # type: ignore[arg-type]


def test_a_configuration_cannot_be_changed_and_shares_nothing() -> None:
    names = ["a", "b"]
    config = config_from_dict({"data": {"class_names": names}})
    names.append("c")
    assert config.data.class_names == ("a", "b")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_the_dump_reads_back_the_same(tmp_path: Any) -> None:
    config = config_from_dict(
        {
            "client": {"learning_rate": 1e-5},
            "data": {
                "class_names": ["1e-4", "yes", "3", "null", "猫", "a: b"],
                "templates": ["{}"],
            },
            "federation": {"clients_per_round": 0.3},
            "model": {"lora": {"r": 3}},
        }
    )
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert dump_config(again) == dump_config(config)
    assert "&" not in dump_config(config)  # no YAML anchors
