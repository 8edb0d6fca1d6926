"""Values that can only be mistakes are refused; what somebody may mean is not."""

from __future__ import annotations

import time

import pytest

from fedclip.config.loading import config_from_dict, load_config
from fedclip.deploy.addresses import Address
from fedclip.errors import UsageError
from fedclip.lora.layer_patterns import pattern_regex

MISTAKES = (
    *("client.learning_rate=1.7e308", "optimizer.weight_decay=1.7e308", "client.proximal_mu=1e300"),
    *("data.batch_size=18446744073709551616", "federation.rounds=9223372036854775808"),
    *("client.local_epochs=1:30", "client.local_epochs=1000000000000", "seed=9223372036854775808"),
    *(f"data.partition.min_size=1{'0' * 60}", "deploy.address=x", "deploy.address=x:99999"),
    *("deploy.round_deadline=5e-324", "optimizer.learning_rate=2147483648", "seed=.nan"),
    *("client.learning_rate=5e-324", "federation.q=1e9", "data.partition.alpha=1e-300"),
    *("model.lora.lora_alpha=1e30", "deploy.largest_message_mb=1e300", "device=cuda:99999999"),
    *("federation.client_memory_mb={default: 1e300}", "optimizer.rate_pattern={q_proj: 1e300}"),
    *("federation.ditto_mu=1e200", "federation.server_optimizer.learning_rate=1e200"),
    *("engine.memory_gb=1e300", "evaluation.every=10000000000", "deploy.attempts=10000000000"),
    *('data.path="a\\0b"', "data.class_names=[[cat], dog]", "data.train_classes=[q, 5]"),
    *("data={name: [digits]}", "tasks={a: {name: [1]}}", "federation.client_ranks={a: [1]}"),
)


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_refused_by_key(typed: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config(None, [typed])
    assert typed.partition("=")[0] in str(error.value)
    assert typed[:40] in str(error.value)  # where it came from


@pytest.mark.parametrize(
    "typed",
    [
        *["client.learning_rate=10", "client.learning_rate=1e-9", "optimizer.max_grad_norm=1e6"],
        *["federation.rounds=100000", "data.batch_size=65536", "deploy.round_deadline=0.01"],
        *["data.partition.alpha=1000000", "seed=9223372036854775807", "deploy.address='[::1]:80'"],
        *["federation.clients_per_round=0.001", "client.proximal_mu=100", "deploy.quorum=1.0"],
    ],
)
def test_what_may_be_meant_is_taken(typed: str) -> None:
    load_config(None, [typed])


def test_a_crossed_bound_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"rounds must be a whole number >= 1 \(at most 1,000,000\)"
    ):
        load_config(None, ["federation.rounds=1000001"])
    with pytest.raises(UsageError, match=r"a number > 0 \(at least 1e-12\), got 1e-300"):
        load_config(None, ["client.learning_rate=1e-300"])


def test_a_file_of_nothing_but_mistakes_is_answered_briefly() -> None:
    values = {f"key{i}": i for i in range(2000)}
    with pytest.raises(UsageError, match="and 1950 more") as error:
        config_from_dict(values)
    assert len(str(error.value)) < 20_000


@pytest.mark.parametrize(
    "text", ["x", ":80", "a b:80", "a:0", "a:99999", "a/b:80", "::1:80", "a:²"]
)
def test_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="must be a host and a port"):
        Address.parse(text)
    assert str(Address.parse("[::1]:8000")) == "[::1]:8000"


PATH = "vision_model.encoder.layers.11.self_attn.out_proj" + "x" * 50


@pytest.mark.parametrize(
    "pattern",
    [
        *["(a+)+$", "((a*)*)*b", "(a|a)*b", "(.*)*x", "a?" * 30 + "a" * 30, ".*" * 8 + "z"],
        *["(a|a)" * 30, r"(\w+\.)*fc1", r"(\d+|x)+", "(?=a)b", "(?<!a)b", r"(a)(\2)", "(?i)x"],
        *["(?P<x>a)(?P=x)", "[", "x{99999999999999999999}", "x{1000000}", "(" * 500 + ")" * 500],
        "a" * 5000,
    ],
)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"ways|offered|regular expression|longer"):
        pattern_regex(pattern)
    with pytest.raises(UsageError, match="exclude_modules"):
        config_from_dict({"model": {"lora": {"exclude_modules": [pattern]}}})


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "vision_encoder.layers.0-999",
        r"vision_model\.encoder\.layers\.[0-3]\..*",
        r"layers\.(0|1|11)\.(.+\.)?q",
        r".*layers.*q_proj.*",
        ".*.*.*z",
        "(q|v)_proj",
        "(?>a+)b",
    ],
)
def test_patterns_that_are_taken_match_in_a_moment(pattern: str) -> None:
    started = time.process_time()
    for _ in range(10):
        pattern_regex(pattern).fullmatch(PATH)
    assert time.process_time() - started < 5  # for ever, were it not bounded
