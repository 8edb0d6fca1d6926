"""Which images are held out: every class in its share, at every client, whatever its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from fedclip.config import DataConfig
from fedclip.data.datasets import load_source
from fedclip.data.loading import load_federated
from fedclip.data.rounding import round_row, round_table, spread
from fedclip.data.source import ArrayImages, ImageSource
from fedclip.data.sources.site import site_source
from fedclip.data.splits import allocate, cap, split
from fedclip.errors import FedclipWarning
from fedclip.experiment.class_coverage import Coverage
from fedclip.seeding import seed_for
from tests.support.data import load, to_pixels


def unbiased(observed, expected, variance) -> bool:
    """Chi-square over classes; only a draw in ten thousand of an unbiased rule is refused."""
    known = np.asarray(variance) > 0
    z2 = (np.asarray(observed) - expected)[known] ** 2 / np.asarray(variance)[known]
    return stats.chi2.sf(z2.sum(), known.sum()) > 1e-4


def rounding_variance(expected: np.ndarray) -> np.ndarray:
    rest = expected - np.floor(expected)
    return rest * (1 - rest)


# --- rounding ---


def test_a_table_is_rounded_without_bias():
    expected = np.array([[2.1, 0.3, 0.6]] * 6 + [[0.7, 0.1, 0.2]] * 3 + [[3.5, 0.5, 1.0]])
    rng = np.random.default_rng(0)
    tables = np.array([round_table(expected, rng) for _ in range(500)])
    assert (np.abs(tables - expected) < 1).all()
    assert (tables.sum(axis=2) == np.rint(expected.sum(axis=1))).all()
    assert (np.abs(tables.sum(axis=1) - expected.sum(axis=0)) < 1).all()
    assert unbiased(tables.sum(axis=0), 500 * expected, 500 * rounding_variance(expected))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
    st.floats(0, 0.45),
    st.floats(0, 0.45),
    st.integers(0, 2**32),
)
def test_any_table_is_rounded_to_neighbours(sizes, validation, test, seed):
    expected = np.array(sizes)[:, None] * np.array([1 - validation - test, validation, test])
    table = round_table(expected, np.random.default_rng(seed))
    assert (np.abs(table - expected) < 1 + 1e-6).all()
    assert (table >= 0).all()
    assert (table.sum(axis=1) == sizes).all()
    assert (np.abs(table.sum(axis=0) - expected.sum(axis=0)) < 1 + 1e-6).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.integers(0, 200),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
def test_any_total_is_shared_out(sizes, total, at_least, seed):
    sizes = np.array(sizes)
    shares = allocate(sizes, total, np.random.default_rng(seed), at_least)
    total = min(total, sizes.sum())
    assert shares.sum() == total
    assert ((shares >= 0) & (shares <= sizes)).all()
    least = np.minimum(sizes, at_least)
    if least.sum() <= total:
        assert (shares >= least).all()
    elif not at_least and total:
        assert (np.abs(shares - sizes * total / sizes.sum()) < 1).all()


def test_a_row_is_rounded_without_bias():
    expected = np.array([0.2] * 5 + [1.5] * 4 + [3.0])
    rng = np.random.default_rng(0)
    rows = np.array([round_row(expected, 10, rng) for _ in range(500)])
    assert (rows.sum(axis=1) == 10).all()
    assert (np.abs(rows - expected) < 1).all()
    assert unbiased(rows.sum(axis=0), 500 * expected, 500 * rounding_variance(expected))


def test_equal_distances_favour_no_place():
    rng = np.random.default_rng(0)
    chosen = np.array([spread(3, 7, rng) for _ in range(500)])
    assert (chosen.sum(axis=1) == 3).all()
    expected = np.full(7, 3 / 7)
    assert unbiased(chosen.sum(axis=0), 500 * expected, 500 * rounding_variance(expected))


# --- many federations ---


def split_of(sizes, seed, validation=0.1, test=0.2, names=None):
    """Sizes by class to the numbers by class that are for training, validation and the test."""
    labels = np.repeat(np.arange(len(sizes)) if names is None else names, sizes)
    parts = split(
        np.arange(len(labels)),
        labels,
        None,
        validation_fraction=validation,
        test_fraction=test,
        seed=seed,
    )
    return np.array([np.bincount(labels[part], minlength=len(sizes)) for part in parts])


def test_over_200_federations_every_class_is_held_out_in_its_share():
    """Of any number of clients and images; classes by number, by size and by place in the names."""
    rng = np.random.default_rng(0)
    by_number = np.zeros((3, 2, 12))  # observed, expected, variance; validation, test; class
    by_size = np.zeros((3, 2, 8))
    for federation in range(200):
        classes = int(rng.integers(2, 13))
        validation, test = rng.uniform(0.02, 0.4, size=2)
        for client in range(int(rng.integers(1, 12))):
            sizes = rng.integers(0, 8, size=classes)
            if sizes.sum() * (1 - validation - test) < 1:
                continue  # such a client keeps its only image to train on
            _, *held = split_of(sizes, seed_for(federation, str(client)), validation, test)
            for part, (counts, fraction) in enumerate(zip(held, (validation, test), strict=True)):
                expected = sizes * fraction
                assert (np.abs(counts - expected) < 1).all()
                assert abs(counts.sum() - expected.sum()) < 1
                figures = np.array([counts, expected, rounding_variance(expected)])
                by_number[:, part, :classes] += figures
                for size in range(8):
                    by_size[:, part, size] += figures[:, sizes == size].sum(axis=1)
    for observed, expected, variance in (by_number, by_size):
        for part in range(2):
            assert unbiased(observed[part], expected[part], variance[part])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=10).filter(any),
    st.randoms(use_true_random=False),
    st.integers(0, 2**62),
)
def test_another_order_of_the_classes_holds_out_the_same_images(sizes, random, seed):
    names = list(range(len(sizes)))
    random.shuffle(names)
    labels, renamed = np.repeat(np.arange(len(sizes)), sizes), np.repeat(names, sizes)
    rows = np.arange(len(labels))
    fractions = {"validation_fraction": 0.15, "test_fraction": 0.3, "seed": seed}
    for groups in (None, rows // 2):
        parts = split(rows, labels, groups, **fractions)
        again = split(rows, renamed, groups, **fractions)
        assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    kept = cap(labels, None, len(rows) // 2, seed)
    assert (kept == cap(renamed, None, len(rows) // 2, seed)).all()


def test_a_capped_pool_keeps_every_class_in_its_share():
    labels, sites = np.tile(np.repeat(np.arange(20), 3), 6), np.repeat(np.arange(6), 60)
    found = np.zeros(20)
    for seed in range(200):
        kept = cap(labels, sites, 100, seed)
        assert len(kept) == 100
        assert set(np.bincount(sites[kept])) <= {16, 17}
        found += np.bincount(labels[kept], minlength=20)
    assert np.abs(found / 200 - 5).max() < 0.5


def toy(sites: int, classes: int, images: int) -> ImageSource:
    """So many sites with all classes, each with so many images."""
    n = sites * classes * images
    pixels = np.random.default_rng(0).integers(0, 255, (n, 2, 2), dtype=np.uint8)
    return ImageSource(
        name="toy",
        images=ArrayImages(pixels, "toy"),
        labels=np.tile(np.repeat(np.arange(classes), images), sites),
        class_names=tuple(f"class {i:02}" for i in range(classes)),
        templates=("{}",),
        sites=np.repeat(np.arange(sites), classes * images),
        site_names=tuple(f"site {i:02}" for i in range(sites)),
    )


@pytest.mark.parametrize(("sites", "classes"), [(6, 20), (20, 50)])
def test_small_sites_of_many_classes_test_and_validate_all_or_say_which_not(sites, classes):
    source, seeds = toy(sites, classes, 3), 2
    counts = np.zeros((2, classes))
    for seed in range(seeds):
        data = load_federated(DataConfig(), 0, seed, to_pixels, "key", source=source)
        found = Coverage.of_data(data, None, seed)
        assert found.classes == classes
        for part, (name, missing) in enumerate(
            {"validation": found.not_validated, "test": found.not_tested}.items()
        ):
            by_class = data.counts(getattr(data, name))
            counts[part] += by_class
            empty = [data.class_names[i] for i in range(classes) if not by_class[i]]
            assert list(missing) == empty
        assert all((len(c.test), len(c.validation)) == (classes * 3 // 5, round(classes * 0.3))
                   for c in data.clients)  # fmt: skip
        if found.not_validated:
            with pytest.warns(FedclipWarning, match="have no validation image") as told:
                found.warn_of_validation("the best round is")
            assert all(name in str(told[0].message) for name in found.not_validated[:12])
    for held, fraction in zip(counts, (0.1, 0.2), strict=True):
        variance = rounding_variance(np.full(classes, 3 * fraction)) * sites * seeds
        assert unbiased(held, np.full(classes, 3 * fraction * sites * seeds), variance)


def test_classes_without_a_test_image_are_named():
    data = load_federated(DataConfig(), 0, 1, to_pixels, "key", source=toy(1, 30, 2))
    found = Coverage.of_data(data, None, 1)
    assert 30 - len(found.not_tested) == np.count_nonzero(data.counts(data.test)) <= 12
    with pytest.warns(FedclipWarning) as told:
        found.warn_of_tests()
    words = str(told[0].message)
    assert words.startswith(f"{len(found.not_tested)} of 30 classes have no test image")
    assert f"{found.not_tested[0]}, {found.not_tested[1]}" in words
    assert "data.test_fraction" in words
    assert f"and {len(found.not_tested) - 12} more" in words  # all in summary.json


def test_a_draw_of_the_test_set_may_miss_classes_too():
    data = load_federated(DataConfig(), 0, 0, to_pixels, "key", source=toy(4, 5, 20))
    assert Coverage.of_data(data, None, 0).not_tested == ()
    assert len(Coverage.of_data(data, 2, 0).not_tested) >= 3


def test_icons_are_validated_in_every_class_over_the_seeds():
    source = load_source("icons")
    pool = np.flatnonzero(~source.is_test)
    families = [pool[source.sites[pool] == family] for family in range(len(source.site_names))]
    observed, expected, variance = np.zeros((3, len(source.class_names)))
    for rows in families:
        drawings, first = np.unique(source.groups[rows], return_index=True)
        labels = source.labels[rows[first]]
        cells = np.bincount(labels, minlength=len(observed)) * 0.1
        for seed in range(4):
            _, held, test = split(
                rows,
                source.labels,
                source.groups,
                validation_fraction=0.1,
                test_fraction=0.0,
                seed=seed,
            )
            assert not len(test)
            chosen = np.isin(drawings, source.groups[held])
            assert abs(chosen.sum() - 0.1 * len(drawings)) < 1
            observed += np.bincount(labels[chosen], minlength=len(observed))
        expected += 4 * cells
        variance += 4 * rounding_variance(cells)
    assert unbiased(observed, expected, variance)


def test_small_and_large_groups_are_held_out_alike():
    groups = np.repeat(np.arange(60), [1, 5] * 30)
    rows = np.arange(len(groups))
    found = np.zeros(60)
    for seed in range(300):
        _, _, test = split(
            rows,
            np.zeros_like(rows),
            groups,
            validation_fraction=0.1,
            test_fraction=0.2,
            seed=seed,
        )
        assert abs(len(test) - 36) <= 5  # as near as whole groups come
        found += np.isin(np.arange(60), groups[test])
    assert unbiased(found, np.full(60, 60.0), np.full(60, 300 * 0.16))


# --- sites ---


def write_site(root: Path, site: str, classes: dict[str, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        for i in range(count):
            path = root / site / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(path)


def roles(root: Path, data, client, folder: str = "") -> dict[str, set[bytes]]:
    """The images of each role, by content."""
    return {
        part: {(root / folder / data.places[i]).read_bytes() for i in getattr(client, part)}
        for part in ("train", "validation", "test")
    }


SITES = {
    "bonn": {"cat": 3, "dog": 7, "emu": 1},
    "oslo": {"cat": 5, "dog": 2, "emu": 4},
    "rome": {"cat": 1, "emu": 1},
}


@pytest.fixture
def sites(tmp_path):
    for seed, (site, classes) in enumerate(SITES.items()):
        write_site(tmp_path / "sites", site, classes, seed)
    return tmp_path / "sites"


@pytest.mark.filterwarnings("ignore:.*(no training|one class):fedclip.errors.FedclipWarning")
@pytest.mark.parametrize("seed", range(5))
def test_a_deployed_site_holds_the_same_images_in_each_role(sites, seed):
    """Also where the run has its classes in another order, and a site its own word for one."""
    together = load(seed=seed, name="imagefolder", path=str(sites))
    for client in together.clients:
        path = sites / client.client_id
        folders = {}
        if (path / "dog").exists():
            (path / "dog").rename(path / "a hound")
            folders = {"a hound": "dog"}
        own = site_source(str(path), client.client_id, ("emu", "dog", "cat"), folders)
        config = DataConfig(name="imagefolder", partition={"name": "natural"}, test_fraction=0.2)
        alone = load_federated(config, 1, seed, to_pixels, "key", source=own, needs_tests=False)
        there = roles(path, alone, alone.clients[0])
        if folders:
            (path / "a hound").rename(path / "dog")
        assert there == roles(sites, together, client)


@pytest.mark.filterwarnings("ignore:.*(no training|one class):fedclip.errors.FedclipWarning")
def test_other_names_of_classes_hold_out_the_same_images(sites):
    before = load(name="imagefolder", path=str(sites))
    expected = [roles(sites, before, client) for client in before.clients]
    for site in SITES:
        for old, new in {"cat": "zebra", "dog": "yak", "emu": "ant"}.items():
            if (sites / site / old).exists():
                (sites / site / old).rename(sites / site / new)
    after = load(name="imagefolder", path=str(sites))
    assert [roles(sites, after, client) for client in after.clients] == expected


def test_the_record_names_the_images_of_each_role(sites):
    data = load(name="imagefolder", path=str(sites), num_clients=2, partition={"name": "iid"})
    record = data.partition_record()
    assert record["split"] == 2
    named = record["examples"]["clients"]
    assert named.keys() == {"client-00", "client-01"}
    everything = [path for own in named.values() for paths in own.values() for path in paths]
    assert sorted(everything) == sorted(str(p.relative_to(sites)) for p in sites.rglob("*.png"))
    assert record["examples"]["test"] == [data.places[i] for i in data.test]
    rows = load(name="digits", num_clients=2, max_train_examples=40).partition_record()
    digits = rows["examples"]["clients"]["client-00"]
    assert len(digits["train"]) == rows["clients"][0]["train"]["num_examples"]
    labels = load_source("digits").labels[digits["train"]]
    assert np.bincount(labels, minlength=10).tolist() == rows["clients"][0]["train"]["by_class"]


def test_a_single_class_is_a_warning(tmp_path):
    write_site(tmp_path, "", {"cat": 12}, 0)
    with pytest.warns(FedclipWarning, match="a single class, cat, so every answer is right"):
        load(name="imagefolder", path=str(tmp_path), num_clients=2, layout="classes")
