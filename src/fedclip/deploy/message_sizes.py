"""How many bytes the messages of a round have, by making ones of the same size."""

from __future__ import annotations

from fedclip.config import Config
from fedclip.deploy.messages import replies, requests
from fedclip.deploy.messages.requests import Ticket
from fedclip.federated.strategies import Setting, create_strategy
from fedclip.federated.strategies.wrappers import Scaffold
from fedclip.federated.traffic import Traffic
from fedclip.federated.updates import Updates
from fedclip.records import ClientReport, RunState, State, TrainRequest

_SITE, _SECONDS, _LOSS = "a-site-name", 12.345678901234567, 0.12345678901234567


class _Asked(Exception):
    """Holds what a strategy asks its clients for."""

    def __init__(self, request: TrainRequest) -> None:
        super().__init__()
        self.request = request


def expected_messages(config: Config, state: State) -> Traffic:
    """Bytes of one site's messages in the first round, up and down, as `fedclip coordinate` sends.

    Headers are in it; what TLS and Flower put around them is not. Later rounds of strategies that
    change frozen weights have more. Sites of lower ranks have less.
    """
    request, deploy = _first_request(config, state), config.deploy
    ticket = Ticket("0" * 16, "0" * 16, 1, "0" * 16, "0" * 64)
    sent, exchange = requests.train(request, _SITE, ticket, deploy.down, deploy.up)
    values = {field.name: exchange.start[field.name] for field in exchange.answer_layout}
    report = ClientReport(_SITE, 1000, _LOSS, 100, _SECONDS, _LOSS)
    answer, _ = replies.update(ticket, report, values, exchange, deploy.up)
    return Traffic(len(answer), len(sent))


def _first_request(config: Config, state: State) -> TrainRequest:
    federation = config.federation
    request = TrainRequest(1, (_SITE,), state, 0.0, 1 / federation.rounds)
    strategy = create_strategy(federation.strategy, Setting(seed=config.seed))
    if federation.scaffold:
        strategy = Scaffold(strategy, federation.num_clients)

    def train(asked: TrainRequest) -> Updates:
        raise _Asked(asked)

    try:
        strategy.round(RunState(state), request, train)
    except _Asked as asked:
        return asked.request
    return request
