"""Everything that strategies ask of an engine, by either engine: the same tensors."""

import pytest
import torch

from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.strategies import Setting, create_strategy
from fedclip.federated.strategies.dynamic_ranks import DynamicRanks, RankPlan
from fedclip.federated.strategies.wrappers import Ditto, Scaffold
from fedclip.models.peft_lora import scalings
from tests.support.engines import BOTH, rounds

ADAMW = LocalSettings(batch_size=8, learning_rate=1e-3)
SGD = LocalSettings(batch_size=8, learning_rate=0.1, optimizer="sgd", proximal_mu=0.01)
SIZES = {"a": 5, "b": 12, "c": 1}
RANKS = {"a": 1, "b": 3, "c": 2}


def setting(model, **kw):
    options = {"q": 1.0, "ridge": 1.0}
    return Setting(seed=1, scalings=scalings(model.network), options=options, **kw)


def plain(name, **kw):
    return lambda model: create_strategy(name, setting(model, **kw))


def scaffold(model):
    return Scaffold(create_strategy("fedit", setting(model)), sum(SIZES.values()))


CASES = {
    "fedit": (plain("fedit"), ADAMW),
    "frozen A": (plain("ffa"), ADAMW),
    "turns": (plain("rolora"), ADAMW),
    "own starts": (plain("fedsa"), ADAMW),
    "shifted weights": (plain("fedex"), ADAMW),
    "cores in a frame": (plain("fed_sb"), ADAMW),
    "cores in a frame, sgd": (plain("fed_sb"), SGD),
    "loss before training": (plain("qfedavg"), SGD),
    "ranks": (plain("flora", ranks=RANKS), ADAMW),
    "ranks that start anew": (plain("flexlora", ranks=RANKS), ADAMW),
    "offsets": (scaffold, SGD),
    "an anchor": (lambda model: Ditto(create_strategy("fedit", setting(model)), 0.5), ADAMW),
    "zero rows": (
        lambda model: DynamicRanks(
            setting(model), RankPlan(2, energy=0.5, warmup=0, cooldown=0), exact=False
        ),
        ADAMW,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_engines_agree_on_what_strategies_ask(case):
    """In float64, two rounds; both towers, clients of unequal sizes, groups of two."""
    strategy, settings = CASES[case]
    kw = {"count": 2, "sizes": SIZES, "strategy": strategy, "targets": BOTH, "dtype": torch.float64}
    one = rounds("sequential", settings, **kw)
    other = rounds("batched", settings, group_size=2, **kw)
    ours, theirs = one.state.flat(), other.state.flat()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-8, atol=1e-11)
    for ours, theirs in zip(one.reports, other.reports, strict=True):
        assert ours.rate_sum == pytest.approx(theirs.rate_sum, rel=1e-12)
        assert ours.start_loss == pytest.approx(theirs.start_loss, rel=1e-9, nan_ok=True)
    assert (one.bytes_up, one.bytes_down) == (other.bytes_up, other.bytes_down)
