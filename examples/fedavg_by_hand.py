"""FedAvg in plain loops: algorithm 1 of McMahan et al. 2017 (arXiv:1602.05629), on LoRA.

Ten clients hold handwritten digits, each of few classes (the paper's pathological split), and
fine-tune one CLIP by exchanging LoRA tensors. Everything that fedclip adds to this (named seeds,
checkpoints, mixed precision, other strategies) is left out.

    python examples/fedavg_by_hand.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from fedclip import create_clip_model

K = 10  # clients
C = 0.5  # fraction of clients that train in a round
E = 1  # local epochs
B = 32  # local batch size
ETA = 2e-3  # learning rate: sites of two classes each drift apart at a higher one
ROUNDS = 4
VISION = {"vision_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

random = np.random.default_rng(0)
torch.manual_seed(0)
model = create_clip_model(
    {"model_name": "tiny", "lora": {"r": 8, "lora_alpha": 16, "target_modules": VISION}},
    class_names=NAMES,
    templates=["a handwritten digit {}", "the number {}"],
)

digits = load_digits()
images = torch.from_numpy(model.to_pixels((digits.images * 255 / 16).astype(np.uint8)))
labels = torch.from_numpy(digits.target)
order = random.permutation(len(labels))
test, train = order[:360], order[360:]

# Sort by label, cut into two shards per client, and deal the shards out (section 3 of the paper).
shards = np.array_split(train[np.argsort(labels[train], kind="stable")], 2 * K)
dealt = random.permutation(2 * K).reshape(K, 2)
P = [np.concatenate([shards[s] for s in pair]) for pair in dealt]  # examples of client k: P[k]


def client_update(k, w):
    """Train w on client k's examples for E epochs of batches of B."""
    model.set_parameters(w)
    model.train()
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=ETA)
    for _ in range(E):
        shuffled = random.permutation(P[k])
        for b in np.array_split(shuffled, np.ceil(len(shuffled) / B)):
            optimizer.zero_grad()
            cross_entropy(model(images[b]), labels[b]).backward()
            optimizer.step()
    return model.get_parameters()


@torch.no_grad()
def accuracy(w):
    """Share of the test images that w classifies rightly."""
    model.set_parameters(w)
    model.eval()
    return (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()


w = model.get_parameters()
print(f"round  0: accuracy {accuracy(w):.3f}", flush=True)
for t in range(1, ROUNDS + 1):
    m = max(int(C * K), 1)
    S = random.choice(K, m, replace=False)
    updates = {k: client_update(k, w) for k in S}
    n = sum(len(P[k]) for k in S)
    w = {name: sum(len(P[k]) / n * updates[k][name] for k in S) for name in w}
    print(f"round {t:2d}: accuracy {accuracy(w):.3f}", flush=True)
