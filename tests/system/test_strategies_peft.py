"""What each strategy trains opens in plain PEFT with the logits that the run measured."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import CLIPModel

from fedclip import base_folder
from fedclip.catalog import STRATEGIES
from fedclip.config.loading import config_from_dict
from fedclip.experiment.build import build
from fedclip.experiment.engine import create_engine
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.save_adapters import save_adapters
from fedclip.experiment.strategy import choose_strategy
from fedclip.federated.rounds import run_rounds
from fedclip.models.clip import create_clip_model
from fedclip.models.pretrained import load_base
from fedclip.records import RunState
from fedclip.reports.listener import Listener
from tests.support.runs import with_

TARGETS = {"vision_encoder": ["q_proj", "fc1"], "text_encoder": ["v_proj"]}
ALL = sorted(set(STRATEGIES) - {"fedavg", "qfedavg", "centralised"})
EXTRAS = {
    "dynamic": {"strategy": "flexlora", "dynamic_ranks": {"enabled": True, "cooldown": 0.5}},
    "mixed": {"strategy": "flora", "client_ranks": (1, 2, 4)},
}


def built(federation):
    config = with_(
        model={
            "model_name": "tiny",
            "lora": {"r": 4, "target_modules": TARGETS, "lora_dropout": 0.0},
        },
        data={"max_train_examples": 60},
        federation={"rounds": 2, "clients_per_round": 3, **federation},
    )
    return build(config_from_dict(config), Listener())


def train(context):
    strategy = choose_strategy(context)
    loop = run_rounds(
        RunState(context.model.get_parameters()),
        create_engine(context),
        strategy,
        clients=context.clients,
        rounds=2,
        clients_per_round=3,
        seed=0,
    )
    return list(loop)[-1].state, strategy.personal


@torch.no_grad()
def logits_in_peft(folder, context, pixels):
    tokens = load_base("tiny").tokens
    prompts = [context.model.templates[0].format(name) for name in context.model.class_names]
    input_ids = tokens.pad(tokens.encode(prompts))
    peft = PeftModel.from_pretrained(CLIPModel.from_pretrained(base_folder("tiny")), folder)
    return peft(input_ids=input_ids, pixel_values=context.model.normalised(pixels)).logits_per_image


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", [*ALL, *EXTRAS])
def test_saved_adapters_give_the_same_logits_in_peft(name, tmp_path):
    context = built(EXTRAS.get(name, {"strategy": name}))
    context.model.set_classes(context.model.class_names, context.model.templates[:1])
    state, personal = train(context)
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 255, (3, 3, 32, 32), dtype=np.uint8))
    context.put(state)
    client = next(iter(state.private), None) if personal else None
    if client is not None:
        context.model.set_parameters(state.of(client))
    context.model.eval()
    with torch.no_grad():
        ours = context.model(pixels)
    folder = RunFolder(tmp_path)
    save_adapters(context, state, folder, "adapter")
    path = tmp_path / "adapter" if client is None else tmp_path / "adapter_of" / client
    theirs = logits_in_peft(path, context, pixels)
    largest = ours.abs().max()
    assert (theirs - ours).abs().max() <= 1e-5 * largest
    # The model is as it was, and fedclip itself reads what it wrote.
    context.put(state)
    fresh = create_clip_model(context.config.model, class_names=context.model.class_names)
    fresh.set_classes(context.model.class_names, context.model.templates)
    fresh.load_adapter(path)
    fresh.eval()
    with torch.no_grad():
        assert (fresh(pixels) - ours).abs().max() <= 1e-5 * largest
