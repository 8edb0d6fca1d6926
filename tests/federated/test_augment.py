"""Small affine maps: seeded, within their bounds, each image its own."""

import numpy as np

from fedclip.federated.augment import affine


def pictures(count):
    """A grey square on black, in the middle."""
    pixels = np.zeros((count, 3, 32, 32), dtype=np.uint8)
    pixels[:, :, 12:20, 12:20] = 200
    return pixels


def test_the_same_seed_draws_the_same_maps_and_every_image_its_own():
    once, again, other = affine(pictures(4), 1), affine(pictures(4), 1), affine(pictures(4), 2)
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()
    assert (once[0] != once[1]).any()
    assert once.dtype == np.uint8
    assert once.shape == (4, 3, 32, 32)


def test_an_image_does_not_depend_on_those_after_it():
    np.testing.assert_array_equal(affine(pictures(1), 3)[0].shape, (3, 32, 32))
    flat = np.full((2, 3, 32, 32), 77, dtype=np.uint8)
    np.testing.assert_array_equal(affine(flat, 3), flat)  # the edge is repeated, nothing is black


def test_the_square_stays_near_the_middle_and_keeps_its_size():
    moved = affine(pictures(64), 5)[:, 0].astype(float)
    rows, columns = np.mgrid[:32, :32]
    mass = moved.sum(axis=(1, 2))
    for axis in (rows, columns):
        centre = (moved * axis).sum(axis=(1, 2)) / mass
        # At most 2.5 pixels of shift, zoomed; the turn is about the middle.
        assert np.abs(centre - 15.5).max() <= 2.6 * 1.15
        assert centre.std() > 0.5
    assert np.all((mass / (64 * 200) > 1 / 1.4) & (mass / (64 * 200) < 1.4))
