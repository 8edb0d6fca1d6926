"""Class names and prompt templates: what each data set calls its classes when nobody says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedclip.errors import UsageError


@dataclass(frozen=True)
class Prompts:
    """Names of a data set's classes (None: the data says) and the templates around them."""

    class_names: tuple[str, ...] | None
    templates: tuple[str, ...]


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple; each must hold `{}` once, where the class name goes."""
    wrong = [template for template in templates if template.count("{}") != 1]
    if not templates or wrong:
        got = ", ".join(repr(template) for template in wrong) or "an empty list"
        raise UsageError(
            f"data.templates: every template must hold {{}} exactly once, where the class name "
            f'goes (for example "a photo of a {{}}"), got {got}'
        )
    return tuple(templates)


PHOTO_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}")

PROMPTS = {
    "digits": Prompts(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        (
            "the digit {}",
            "a handwritten digit {}",
            "a photo of the number {}",
            "the number {}",
        ),
    ),
    "fashion_mnist": Prompts(
        (
            "t-shirt",
            "trousers",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        ("a photo of a {}", "a picture of a {}", "{}", "an icon of a {}"),
    ),
    "icons": Prompts(None, ("an icon of a {}", "a drawing of a {}", "{}", "a {}")),
    "imagefolder": Prompts(None, PHOTO_TEMPLATES),
    "hub": Prompts(None, PHOTO_TEMPLATES),
    "pairs": Prompts(None, ("{}",)),  # captions are sentences already
}
