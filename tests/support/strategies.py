"""A federation without a model: clients that move their tensors by draws of their own."""

import torch

from fedclip.federated.rounds import run_rounds
from fedclip.federated.strategies import Setting, create_strategy
from fedclip.lora.names import at_rank
from fedclip.records import ClientReport, Cohort, RunState
from fedclip.seeding import seed_for

SIDES = {"vision_model.encoder.layers.0.mlp.fc1": (7, 12), "text_model.q_proj": (9, 9)}
RANK = 3
SCALING = 2.0
SIZES = {"a": 30, "b": 10, "c": 20}
RATE_SUM = 0.5


def names(layer):
    stem = f"base_model.model.{layer}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def start(rank=RANK, dtype=torch.float64, head=False):
    """An adapter as at the start of a run: A drawn, B zero."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer, (inner, outer) in SIDES.items():
        a, b = names(layer)
        state[a] = torch.randn(rank, inner, generator=generator, dtype=dtype)
        state[b] = torch.zeros(outer, rank, dtype=dtype)
    if head:
        state["head.weight"] = torch.randn(4, 6, generator=generator, dtype=dtype)
    return state


class DrawingEngine:
    """Moves each trained tensor by a draw that its client, round and name decide."""

    def __init__(self, size=0.3):
        self.size = size
        self.requests = []
        self.sent = {}

    def train(self, request):
        self.requests.append(request)
        for client_id in request.client_ids:
            state = request.start(client_id)
            if client_id in request.ranks:
                state = at_rank(state, request.ranks[client_id])
            update = {}
            for name in request.state:
                if request.trained is not None and name not in request.trained:
                    continue
                seed = seed_for(1, request.purpose, request.server_round, client_id, name)
                generator = torch.Generator().manual_seed(seed)
                change = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
                moved = state[name] + self.size * change.to(state[name])
                update[name] = moved
            rank = request.ranks.get(client_id)
            update = update if rank is None else at_rank(update, rank)
            self.sent[request.server_round, client_id] = update
            report = ClientReport(client_id, SIZES[client_id], 0.7, 5, 0.0, RATE_SUM, 1.5)
            yield Cohort((report,), {name: tensor[None] for name, tensor in update.items()})


def setting(**kw):
    options = {"q": 1.0}
    given = {"seed": 3, "scalings": dict.fromkeys(SIDES, SCALING), "options": options}
    return Setting(**given | kw)


def rounds(strategy, *, count=1, state=None, engine=None, total=None, **kw):
    """All results of a few rounds, and the engine that was asked."""
    if isinstance(strategy, str):
        strategy = create_strategy(strategy, setting(**kw.pop("setting", {})))
    engine = engine or DrawingEngine()
    state = state if isinstance(state, RunState) else RunState(state or start())
    loop = run_rounds(
        state,
        engine,
        strategy,
        clients=SIZES,
        rounds=total or count,
        clients_per_round=len(SIZES),
        seed=3,
        **kw,
    )
    results = []
    for result in loop:
        results.append(result)
        if len(results) == count:
            break
    return results, engine


def model_update(state, layer):
    """What a layer of the model adds to its frozen weight: s B A and the shift."""
    a, b = (state.shared[name] for name in names(layer))
    return SCALING * b @ a + state.shift.get(layer, 0)


def exact_mean(engine, layer, server_round=1, scalings=None):
    """The examples-weighted mean of s_i B_i A_i, in plain loops."""
    total = sum(SIZES.values())
    a, b = names(layer)
    found = 0
    for client, size in SIZES.items():
        sent = engine.sent[server_round, client]
        scaling = SCALING if scalings is None else scalings[client]
        found = found + size / total * scaling * sent[b] @ sent[a]
    return found
