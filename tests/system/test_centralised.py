"""One client is plain centralised training: a loop over PyTorch that knows only the named seeds."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import fedclip
from fedclip.config.loading import config_from_dict
from fedclip.experiment.build import build
from fedclip.reports.listener import Listener
from fedclip.seeding import seed_for
from tests.support.small import SMALL

ROUNDS, EPOCHS, BATCH, RATE = 2, 2, 16, 0.005
VISION = {"vision_encoder": ["q_proj", "v_proj"]}
BOTH = VISION | {"text_encoder": ["k_proj"]}


@pytest.mark.parametrize(
    ("head", "targets"), [("text", VISION), ("text", BOTH), ("linear", VISION)]
)
def test_one_client_is_centralised_training(tmp_path, head, targets):
    lora = {"r": 4, "lora_dropout": 0.1, "target_modules": targets}
    config = config_from_dict(
        {
            "model": {"model_name": SMALL, "head": head, "lora": lora},
            "client": {"local_epochs": EPOCHS, "learning_rate": RATE},
            "data": {"name": "digits", "max_train_examples": 60, "batch_size": BATCH},
            "federation": {"rounds": ROUNDS, "num_clients": 1},
            "engine": {"name": "sequential"},
        }
    )
    federated = fedclip.run(config, output=tmp_path / "run")

    context = build(config, Listener())
    model, data = context.model, context.data
    (client,) = data.clients
    model.train()
    for server_round in range(1, ROUNDS + 1):
        # The documented default: every round starts with a fresh optimizer.
        trained = list(model.trainable().values())
        groups = [  # a bias does not decay
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE)
        seed = seed_for(config.seed, "client", server_round, client.client_id)
        step = 0
        for epoch in range(EPOCHS):
            order = np.random.default_rng(seed_for(seed, "order", epoch)).permutation(client.train)
            for first in range(0, len(order), BATCH):
                batch = order[first : first + BATCH]
                model.set_dropout_key(seed_for(seed, "dropout", step, 0))
                logits = model(torch.from_numpy(data.pixels[batch]))
                loss = cross_entropy(logits, torch.from_numpy(data.labels[batch]))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.trainable().values(), 1.0)
                optimizer.step()
                step += 1

    adapter = load_file(federated.adapter / "adapter_model.safetensors")
    if head == "linear":
        adapter |= load_file(federated.adapter / "head.safetensors")
    expected = model.get_parameters()
    assert adapter.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (adapter[name] - tensor).norm() <= 1e-6 * tensor.norm(), name
