"""Sites held out for the test set, and few images of each class."""

from __future__ import annotations

import numpy as np
import pytest

from fedclip.data.datasets import load_source
from fedclip.data.roles import HELD_OUT, OWN, TEST, UNUSED, VALIDATION, with_shots, with_test_sites
from fedclip.data.source import ArrayImages, ImageSource
from fedclip.errors import FedclipWarning, UsageError
from tests.support.data import all_unique, everything, load

ICONS = load_source("icons")


def source_of(labels, **more) -> ImageSource:
    labels = np.asarray(labels, dtype=np.int64)
    images = ArrayImages(np.zeros((len(labels), 2, 2), np.uint8), "toy")
    names = tuple(f"class {i}" for i in range(labels.max() + 1))
    return ImageSource("toy", images, labels, names, ("{}",), **more)


# --- held-out sites ---


def test_the_last_sites_are_the_test_set():
    data = load(name="icons", test_sites=0.25)
    held = ICONS.site_names[-9:]  # a quarter of 34, rounded up
    assert [client.client_id for client in data.clients] == list(ICONS.site_names[:-9])
    sizes = {name: int((ICONS.sites == i).sum()) for i, name in enumerate(ICONS.site_names)}
    assert len(data.test) == sum(sizes[name] for name in held)
    assert all_unique(data.test, *map(everything, data.clients))
    # A client is still tested on the data set's own test images of its site, but for drawings
    # that are held out.
    groups = ICONS.groups[np.isin(ICONS.sites, np.arange(25, 34))]
    own = ICONS.is_test & (ICONS.sites == 0) & ~np.isin(ICONS.groups, groups)
    assert len(data.clients[0].test) == own.sum() > 200


def test_nobody_trains_on_a_held_out_drawing():
    moved = with_test_sites(ICONS, ["octicon", "fe"])
    held = np.isin(ICONS.sites, [ICONS.site_names.index(name) for name in ("octicon", "fe")])
    assert ((moved.roles == HELD_OUT) == held).all()
    twins = np.isin(ICONS.groups, ICONS.groups[held]) & ~held
    assert twins.any()  # families copy from each other
    assert (moved.roles[twins] == UNUSED).all()
    assert set(ICONS.groups[moved.roles == OWN]).isdisjoint(ICONS.groups[held])


def test_sites_are_held_out_of_other_partitions_too():
    data = load(num_clients=3, name="icons", test_sites=["fe"], partition={"name": "iid"})
    assert len(data.clients) == 3
    assert len(data.test) == int((ICONS.sites == ICONS.site_names.index("fe")).sum())
    assert all_unique(data.test, *map(everything, data.clients))


def test_test_sites_that_do_not_fit():
    with pytest.raises(UsageError, match=r"data\.test_sites: fi is no site of the data"):
        with_test_sites(ICONS, ["fi"])
    with pytest.raises(UsageError, match="leaves none of the 34 sites to train on"):
        with_test_sites(ICONS, list(ICONS.site_names))
    with pytest.raises(UsageError, match="needs a data set with sites, which digits does not have"):
        load(name="digits", test_sites=0.5)


# --- few shots ---


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_as_many_of_each_class_as_asked_for(shots):
    data = load(num_clients=3, name="digits", shots=shots, partition={"name": "iid"})
    trained = np.concatenate([client.train for client in data.clients])
    assert data.counts(trained) == [shots] * 10
    assert data.counts(data.validation) == [min(shots, 4)] * 10
    assert sum(data.counts(data.test)) == round(0.2 * 1797)
    assert all_unique(trained, data.validation, data.test)
    assert not any(len(client.test) or len(client.validation) for client in data.clients)


def test_the_same_seed_draws_the_same_shots():
    one, same, other = (
        load(seed=seed, num_clients=2, name="digits", shots=2, partition={"name": "iid"})
        for seed in (0, 0, 1)
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_own_splits_are_kept_whole_or_cut_to_the_shots():
    labels = np.arange(60) % 3
    place = np.arange(60) // 20  # 20 to train, 20 to validate, 20 to test
    source = source_of(labels, is_validation=place == 1, is_test=place == 2)
    roles = with_shots(source, 5, 0.5, seed=0).roles
    assert ((roles == TEST) == (place == 2)).all()
    assert (place[roles == OWN] == 0).all()
    assert (place[roles == VALIDATION] == 1).all()
    assert np.bincount(labels[roles == OWN]).tolist() == [5, 5, 5]
    assert np.bincount(labels[roles == VALIDATION]).tolist() == [4, 4, 4]


def test_variants_of_one_drawing_stay_together():
    groups = np.arange(80) // 4
    source = source_of(np.arange(80) // 40, groups=groups)
    for seed in range(5):
        roles = with_shots(source, 6, 0.25, seed=seed).roles
        assert np.bincount(source.labels[roles == OWN]).tolist() == [6, 6]
        sides = [set(groups[roles == role]) for role in (OWN, VALIDATION, TEST)]
        assert all(sides)
        assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


def test_small_classes_keep_what_they_have():
    source = source_of([0] * 30 + [1] * 3, is_test=np.arange(33) % 10 == 9)
    with pytest.warns(FedclipWarning, match="1 classes have fewer than 8 .*: class 1"):
        roles = with_shots(source, 8, 0.2, seed=0).roles
    assert np.bincount(source.labels[roles == OWN]).tolist() == [8, 3]
    assert np.bincount(source.labels[roles == VALIDATION], minlength=2).tolist() == [4, 0]


def test_shots_go_with_held_out_sites_and_natural_clients():
    with pytest.warns(FedclipWarning):  # of classes and sites that are small
        data = load(name="icons", shots=2, test_sites=0.25, on_empty_site="skip")
    trained = np.concatenate([client.train for client in data.clients])
    assert max(data.counts(trained)) == 2
    assert sum(data.counts(trained)) > 200
    assert {client.client_id for client in data.clients} <= set(ICONS.site_names[:-9])
    assert any(len(client.test) for client in data.clients)


def test_shots_of_base_classes_alone():
    data = load(num_clients=2, name="digits", shots=3, train_classes=0.5, partition={"name": "iid"})
    trained = np.concatenate([client.train for client in data.clients])
    assert data.counts(trained) == [3] * 5
    assert data.new_classes is not None
    assert len(data.new_classes.test) > 100
