"""Learning from captions: the loss, retrieval, and whole runs."""

import json
from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

import fedclip
from fedclip.adapters.inspect import evaluate, info
from fedclip.config.loading import config_from_dict
from fedclip.errors import FedclipWarning
from fedclip.evaluation.retrieval import before_match, find, recall
from fedclip.experiment.build import build
from fedclip.experiment.run import resume
from fedclip.federated.local_steps import LocalSettings, batches_of
from fedclip.federated.losses import contrastive_loss
from fedclip.models.clip import create_clip_model
from fedclip.models.pretrained import base_folder
from fedclip.reports.listener import Listener
from fedclip.seeding import seed_for
from tests.support.captions import picture, rows_of, write_pairs
from tests.support.runs import COMPARED, StopAfter
from tests.support.small import SMALL

BOTH = {"vision_encoder": ["q_proj"], "text_encoder": ["v_proj"]}
CONFIG = {
    "task": "contrastive",
    "model": {
        "model_name": SMALL,
        "lora": {"r": 2, "lora_dropout": 0.1, "target_modules": BOTH},
    },
    "client": {"learning_rate": 0.01},
    "data": {"name": "pairs", "batch_size": 8},
    "federation": {"rounds": 2, "num_clients": 2},
    "evaluation": {"keep_best": True},
}


def with_(**sections):
    merged = {
        name: CONFIG.get(name, {}) | keys if isinstance(keys, dict) else keys
        for name, keys in sections.items()
    }
    return CONFIG | merged


# --- the loss ---


def test_the_loss_of_two_pairs_by_hand():
    logits = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    images = (log(1 + np.exp(-2)) + log(2)) / 2  # rows: 2 against 0, 1 against 1
    captions = log(1 + np.exp(-1))  # columns: 2 against 1, 1 against 0
    loss = contrastive_loss(logits, torch.tensor([5, 3]))
    assert loss.item() == pytest.approx((images + captions) / 2, abs=1e-12)


def test_equal_captions_share_the_target_by_hand():
    # The first two pairs have the same caption, so their columns are the same.
    logits = torch.tensor([[2.0, 2, 4], [1, 1, 2], [1, 1, 6]], dtype=torch.float64).log()
    # Rows as probabilities: (1/4, 1/4, 1/2) twice, with half the target on each quarter; then
    # (1/8, 1/8, 3/4) with the target on the last.
    images = (2 * log(4) + log(4 / 3)) / 3
    # Columns: (1/2, 1/4, 1/4) twice, with half the target on the first and on the second; then
    # (1/3, 1/6, 1/2) with the target on the last.
    captions = (2 * (log(2) + log(4)) / 2 + log(2)) / 3
    loss = contrastive_loss(logits, torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx((images + captions) / 2, abs=1e-12)


def test_a_single_pair_teaches_nothing():
    logits = torch.tensor([[3.0]], requires_grad=True)
    loss = contrastive_loss(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.item() == 0


def test_without_duplicates_it_is_clips_own_loss():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = image_text_contrastive_loss(logits)
    ours = contrastive_loss(logits, torch.tensor([9, 4, 0, 1, 7, 2]))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.integers(0, 100))
def test_the_order_of_pairs_does_not_matter(captions, seed):
    generator = torch.Generator().manual_seed(seed)
    number = torch.tensor(captions)
    texts = torch.randn(4, 5, generator=generator, dtype=torch.float64)[number]
    logits = torch.randn(len(captions), 5, generator=generator, dtype=torch.float64) @ texts.T
    order = torch.randperm(len(captions), generator=generator)
    moved = contrastive_loss(logits[order][:, order], number[order])
    assert moved.item() == pytest.approx(contrastive_loss(logits, number).item(), rel=1e-9)


def test_a_last_pair_alone_joins_the_batch_before_it():
    pairs = LocalSettings(batch_size=4, smallest_batch=2)
    assert [len(batch) for batch in batches_of(np.arange(9), pairs)] == [4, 5]
    assert [len(batch) for batch in batches_of(np.arange(10), pairs)] == [4, 4, 2]
    assert [len(batch) for batch in batches_of(np.arange(1), pairs)] == [1]
    classes = LocalSettings(batch_size=4)
    assert [len(batch) for batch in batches_of(np.arange(9), classes)] == [4, 4, 1]
    assert np.concatenate(batches_of(np.arange(9), pairs)).tolist() == list(range(9))


# --- retrieval ---


def test_recall_by_hand():
    # Texts along the axes: an image's features are its similarities to the three captions.
    images = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.6, 0.0], [0.2, 0.7, 0.7]])
    found = find(images, torch.eye(3), (torch.arange(3), torch.arange(3)), scale=10.0)
    assert found.captions.tolist() == [0, 1, 1]  # a tie counts against the match
    assert found.images.tolist() == [0, 1, 0]  # for the second caption the third image is nearer
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.recalls() == {
        "image_to_text": {"recall_at_1": 1 / 3, "recall_at_5": 1.0, "recall_at_10": 1.0},
        "text_to_image": {"recall_at_1": 2 / 3, "recall_at_5": 1.0, "recall_at_10": 1.0},
    }
    theirs = cross_entropy(10 * images, torch.tensor([0, 1, 2]))
    assert found.loss == pytest.approx(theirs.item(), rel=1e-6)


def test_any_image_of_the_same_caption_is_a_match():
    images = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])  # the first is far from its own
    pairs = torch.arange(3), torch.tensor([0, 0, 1])
    found = find(images, torch.eye(2), pairs, scale=1.0)
    assert found.captions.tolist() == [1, 0, 0]
    assert found.images.tolist() == [0, 1]  # caption 0 finds image 1; caption 1 finds image 0 first


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 1000))
def test_recall_is_what_sorting_finds(queries, candidates, seed):
    random = np.random.default_rng(seed)
    similarity = torch.from_numpy(random.permutation(queries * candidates) * 1.0)
    similarity = similarity.reshape(queries, candidates)  # no two alike
    match = torch.from_numpy(random.random((queries, candidates)) < 0.4)
    match[:, 0] |= ~match.any(dim=1)
    before = before_match(similarity, match).numpy()
    order = similarity.argsort(dim=1, descending=True)
    for k in (1, 2, 3):
        hits = match.gather(1, order[:, :k]).any(dim=1).double().mean().item()
        assert recall(before, k) == pytest.approx(hits)


def test_recall_of_nothing_is_unknown():
    assert recall(np.empty(0, np.int64), 1) is None


@pytest.mark.parametrize("count", [2, 5])
def test_an_image_of_several_captions_is_searched_once(count):
    """Three images, each nearest to the last of its captions, and its first to another image."""
    image, text = torch.arange(3).repeat_interleave(count), torch.arange(3 * count)
    similarity = torch.zeros(3, 3 * count)
    similarity[image[count - 1 :: count], text[count - 1 :: count]] = 0.9
    similarity[(image[::count] + 1) % 3, text[::count]] = 0.5
    images = torch.eye(3)
    found = find(images, similarity.T, (image, text), scale=1.0)
    assert found.captions.tolist() == [0, 0, 0]  # any of its captions is a match
    first, *middle, last = found.images.reshape(3, count).T.tolist()
    assert first == [2, 2, 2]  # two others: one is nearer, one as near
    assert last == [0, 0, 0]
    assert all(row == [2, 2, 2] for row in middle)  # all equally far: ties count against it
    assert found.accuracy == 1.0
    assert found.recalls()["text_to_image"]["recall_at_1"] == pytest.approx(1 / count)
    own = torch.stack([similarity[i, i * count : (i + 1) * count] for i in range(3)]).exp().sum(1)
    expected = -(own / similarity.exp().sum(dim=1)).log().mean().item()
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_a_caption_of_two_images_of_several_captions_by_hand():
    images = torch.tensor([[0.9, 0.1, 0.4], [0.2, 0.8, 0.5]])
    pairs = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 2])  # both have caption 2
    found = find(images, torch.eye(3), pairs, scale=1.0)
    assert found.captions.tolist() == [0, 0]
    assert found.images.tolist() == [0, 0, 0]


def test_captions_of_one_picture_are_no_negatives_of_each_other():
    # Pairs (picture, caption): (0, 0), (0, 1), (1, 1), (2, 2). So picture 0 has captions 0 and 1,
    # wherever they stand; caption 1 belongs to pictures 0 and 1.
    captions, pictures = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2])
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    match = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).double()
    expected = 0.0
    for table, own in ((logits, match), (logits.T, match.T)):
        for row, wanted in zip(table.log_softmax(dim=1), own, strict=True):
            expected -= (row * wanted).sum().item() / wanted.sum().item() / 8
    assert contrastive_loss(logits, captions, pictures).item() == pytest.approx(expected, rel=1e-12)
    alone = contrastive_loss(logits, captions, torch.arange(4))
    assert alone.item() == pytest.approx(contrastive_loss(logits, captions).item(), rel=1e-12)


# --- runs ---


def test_texts_as_they_are_and_as_classes():
    pets = {"class_names": ["cat", "dog"], "templates": ["a {}"]}
    model = create_clip_model({"model_name": "tiny"}, **pets)
    texts = model.encode_texts(["a cat", "a dog"])
    assert torch.allclose(texts, model.text_features(), atol=1e-6)
    assert torch.allclose(texts.norm(dim=1), torch.ones(2))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), rows_of(48, sites=2))


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory):
    """A finished run on two sites' pairs, to be left as it is."""
    config = with_(
        data={"path": str(table)}, model={"model_name": "tiny"}, client={"local_epochs": 20}
    )
    return fedclip.run(config, output=tmp_path_factory.mktemp("captions") / "run").folder


def test_one_client_is_plain_contrastive_training(table, tmp_path):
    """A loop over transformers' CLIP and tokenizer, which knows only the named seeds."""
    rate, batch_size = 0.005, 8
    lora = {"r": 4, "lora_dropout": 0.0, "target_modules": BOTH}
    config = config_from_dict(
        {
            "task": "contrastive",
            "model": {"model_name": "tiny", "lora": lora},
            "client": {"local_epochs": 2, "learning_rate": rate},
            "data": {
                "name": "pairs",
                "path": str(table),
                "batch_size": batch_size,
                "partition": {"name": "iid"},
            },
            "federation": {"rounds": 1, "num_clients": 1},
        }
    )
    federated = fedclip.run(config, output=tmp_path / "run")

    context = build(config, Listener())
    model, data = context.model, context.data
    (client,) = data.clients
    assert len(client.train) % batch_size == 1  # the last pair is not left alone
    tokenizer = AutoTokenizer.from_pretrained(base_folder("tiny"))
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=rate, weight_decay=0.01)
    seed = seed_for(config.seed, "client", 1, client.client_id)
    for epoch in range(2):
        order = np.random.default_rng(seed_for(seed, "order", epoch)).permutation(client.train)
        cuts = [*range(0, len(order) - 1, batch_size), len(order)]
        for first, last in pairwise(cuts):
            batch = order[first:last]
            captions = [data.class_names[i] for i in data.labels[batch]]
            words = tokenizer(captions, return_tensors="pt", padding=True)
            pixels = model.normalised(torch.from_numpy(data.pixels[batch]))
            logits = model.clip(words["input_ids"], pixels, words["attention_mask"])
            loss = 0.0
            for rows in (logits.logits_per_image, logits.logits_per_text):
                for i, log_share in enumerate(rows.log_softmax(dim=1)):
                    same = [j for j, other in enumerate(captions) if other == captions[i]]
                    loss = loss - log_share[same].mean() / len(batch) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.trainable().values(), 1.0)
            optimizer.step()

    adapter = load_file(federated.adapter / "adapter_model.safetensors")
    expected = model.get_parameters()
    assert adapter.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (adapter[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_the_figures_of_a_run(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["task"] == "contrastive"
    assert summary["engine"] == "sequential"
    for when in ("", "zero_shot_"):
        recalls = summary[f"{when}retrieval"]
        assert summary[f"{when}accuracy"] == recalls["image_to_text"]["recall_at_1"]
        assert recalls["image_to_text"]["recall_at_5"] == 1.0  # there are four captions
    first, *_, last = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    assert first["retrieval"] == first["zero_shot_retrieval"] == summary["zero_shot_retrieval"]
    assert last["retrieval"] == summary["retrieval"]
    assert first["accuracy"] < last["accuracy"]
    assert last["accuracy"] == last["accuracy_by_client"]["site 0"] == 1.0  # colours are easy
    partition = json.loads((finished / "partition.json").read_text())
    assert partition["captions"] == 4
    assert "by_class" not in partition["test"]
    assert {client["client_id"] for client in partition["clients"]} == {"site 0", "site 1"}
    notes = json.loads((finished / "adapter/fedclip.json").read_text())
    assert (notes["head"], notes["class_names"], notes["templates"]) == ("text", [], ["{}"])


def test_the_table_at_the_end(fedclip, table, tmp_path):
    config = tmp_path / "captions.yaml"
    config.write_text(json.dumps(with_(data={"path": str(table)})), encoding="utf-8")
    code, out, err = fedclip("run", config, "--output", tmp_path / "run")
    assert code == 0, err
    assert "image to text @1" in out
    assert "text to image @10" in out
    assert "learning from captions is not stacked" in err


def test_what_comes_after_a_run(finished, fedclip, tmp_path):
    again = evaluate(finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert again["retrieval"] == summary["retrieval"]
    assert info(finished)["trainable_parameters"] == summary["trainable_parameters"]

    picture("red").save(tmp_path / "red.png")
    code, out, _ = fedclip(
        "predict", finished, tmp_path / "red.png", "--labels", "a blue square,a red square"
    )
    assert code == 0
    assert "a red square" in out
    code, _, err = fedclip("predict", finished, tmp_path / "red.png")
    assert code == 2
    assert "learned from captions" in err
    code, _, err = fedclip("evaluate", finished, "--full")
    assert code == 2
    assert "--full" in err
    merge = ("merge", finished, finished, "--output", tmp_path / "merged")
    code, _, err = fedclip(*merge, "--search", finished)
    assert code == 2
    assert "learned from captions" in err
    assert fedclip(*merge)[0] == 0
    assert fedclip("export", finished, "--to", "merged", "--output", tmp_path / "plain")[0] == 0
    code, card, _ = fedclip("card", finished)
    assert code == 0
    assert "| image to text @5 |" in card
    assert "image-to-text recall@1" in card


def test_a_served_run_takes_labels(finished):
    pytest.importorskip("fastapi")
    client = pytest.importorskip("starlette.testclient")
    from fedclip.adapters.predict import Predictor
    from fedclip.adapters.serve.app import create_app

    app = client.TestClient(create_app(Predictor.of_run(finished), max_bytes=10**6))
    body = finished.parent / "red.png"
    picture("red").save(body)
    sent = {"content": body.read_bytes(), "headers": {"content-type": "image/png"}}
    told = app.post("/predict?labels=a red square,a blue square", **sent)
    assert told.json()["label"] == "a red square"
    refused = app.post("/predict", **sent)
    assert refused.status_code == 422
    assert "learned from captions" in refused.json()["error"]


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("strategy", ["fedavg", "local"])
def test_a_run_on_images_of_several_captions(count, strategy, tmp_path):
    """Under one path, or copied: a model that knows the colours finds every caption's image."""
    words = ["a {} square", "something {}", "{} as can be", "{} all over", "painted {}"][:count]
    rows = []
    for number, row in enumerate(rows_of(32, sites=2)):
        colour = row["caption"].split()[1]
        for place, text in enumerate(words):
            caption = f"{text.format(colour)}, picture {number}"
            image = row["image"] if place % 2 else f"images/copy of {number}.png"
            rows.append(row | {"caption": caption, "image": image})
    path = write_pairs(tmp_path, rows)
    for number in range(32):
        (tmp_path / f"images/copy of {number}.png").write_bytes(
            (tmp_path / f"images/{number}.png").read_bytes()
        )
    config = config_from_dict(
        with_(
            data={"path": str(path), "test_fraction": 0.4},
            federation={"strategy": strategy, "rounds": 1},
            evaluation={"keep_best": False},
        )
    )
    done = fedclip.run(config, output=tmp_path / "run")
    data = build(config, Listener()).data
    sides = [set(data.pictures[part]) for client in data.clients
             for part in (client.train, client.validation, client.test)]  # fmt: skip
    assert sum(map(len, sides)) == len(set().union(*sides)) == 32
    metrics = [*map(json.loads, (done.folder / "metrics.jsonl").read_text().splitlines())]
    assert metrics[-1]["test_examples"] == len(set(data.pictures[data.test])) < len(data.test)
    assert done.summary["retrieval"]["text_to_image"]["recall_at_10"] > 0


def test_a_client_of_one_picture_has_nothing_to_learn(tmp_path):
    rows = rows_of(12, sites=1)
    rows += [rows[0] | {"caption": f"take {i}", "site": "lonely"} for i in range(4)]
    config = config_from_dict(with_(data={"path": str(write_pairs(tmp_path, rows))}))
    with pytest.warns(FedclipWarning, match="single training pair or picture .*: lonely"):
        data = build(config, Listener()).data
    assert [client.client_id for client in data.clients] == ["site 0"]


def test_a_stopped_run_goes_on_to_the_same_bytes(table, tmp_path):
    config = with_(data={"path": str(table)})
    whole = fedclip.run(config, output=tmp_path / "whole").folder
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(config, output=tmp_path / "halves", listener=StopAfter(1))
    halves = resume(tmp_path / "halves").folder
    for name in set(COMPARED) - {"predictions.json"}:  # a classifier's
        assert (halves / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    "change",
    [
        {"federation": {"strategy": "local"}},
        {"federation": {"strategy": "qfedavg"}},
        {"federation": {"strategy": "centralised"}},
        {"model": {"lora": {"enabled": False}}},
        {"data": {"name": "digits", "max_train_examples": 60}},
    ],
    ids=["personal", "start-loss", "centralised", "full", "classes"],
)
def test_it_goes_with(change, table, tmp_path):
    change = {"data": {"path": str(table)}, "evaluation": {"max_examples": 20}, **change}
    summary = fedclip.run(with_(**change), output=tmp_path / "run").summary
    assert 0 <= summary["accuracy"] <= 1
    assert summary["accuracy"] == summary["retrieval"]["image_to_text"]["recall_at_1"]
