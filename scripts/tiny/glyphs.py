"""Letters, digits and words, drawn in the fonts that matplotlib ships."""

from __future__ import annotations

import random
import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .captions import DIGIT_NAMES
from .render import SIZE, interior

_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral",
    "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmb10", "cmr10", "cmss10",
    "cmtt10", "cmmi10",
)  # fmt: skip
_OLD_STYLE = {"cmmi10"}  # its digits are old-style figures: letters only

DIGIT_CAPTIONS = (
    "{}", "{n}", "the digit {}", "digit {}", "digit {n}", "the number {}", "number {n}",
    "the digit {n}", "the number {n}", "a {}", "a drawing of the digit {}", "a written {}",
    "a picture of the digit {}", "a photo of the digit {}", "a photo of the number {}",
    "an image of the digit {n}", "a handwritten digit {}", "a handwritten {}",
    "a photo of the digit {n}", "the handwritten digit {n}", "a black and white digit {}",
)  # fmt: skip
LETTER_CAPTIONS = (
    "{}", "letter {}", "the letter {}", "{} letter", "a drawing of the letter {}",
    "a picture of the letter {}", "{case} {}", "the {case} letter {}", "a written letter {}",
)  # fmt: skip


def font_files() -> list[Path]:
    """The text fonts in matplotlib's package data."""
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    return [folder / f"{name}.ttf" for name in _FONTS]


def draw(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """The text as an ink mask that fills a square of `SIZE`, its proportions kept."""
    left, top, right, bottom = font.getbbox(text)
    if right - left < 2 or bottom - top < 2:
        return None
    picture = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(picture).text((-left, -top), text, fill=255, font=font)
    scale = (SIZE - 2) / max(picture.size)
    w, h = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("L", (SIZE, SIZE))
    canvas.paste(picture.resize((w, h), Image.Resampling.BOX), ((SIZE - w) // 2, (SIZE - h) // 2))
    return np.asarray(canvas)


def build(common_words: list[str], seed: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Every glyph and some words in every font: ink masks, enclosed areas and what they show."""
    rng = random.Random(seed)
    masks, rows = [], []
    for path in font_files():
        font = ImageFont.truetype(str(path), 96)
        texts = [] if path.stem in _OLD_STYLE else list(string.digits)
        texts += list(string.ascii_letters)
        if path.stem not in _OLD_STYLE:
            texts += rng.sample(common_words, min(40, len(common_words)))
            texts += [str(rng.randint(10, 99)) for _ in range(10)]
        for text in texts:
            mask = draw(text, font)
            if mask is not None:
                masks.append(mask)
                rows.append(describe(text))
    inner = [interior(m) for m in masks]
    return np.stack(masks), np.stack(inner), rows


def describe(text: str) -> dict:
    """The kind of a glyph, its key among captions and every caption that suits it."""
    if len(text) == 1 and text.isdigit():
        name = DIGIT_NAMES[int(text)]
        every = [c.format(name, n=text) for c in DIGIT_CAPTIONS]
        return {"kind": "digit", "key": f"digit {name}", "captions": every}
    if len(text) == 1:
        case = "capital" if text.isupper() else "small"
        every = [c.format(text.lower(), case=case) for c in LETTER_CAPTIONS]
        return {"kind": "letter", "key": f"letter {text.lower()}", "captions": every}
    every = [text, f"the word {text}", f"the text {text}", f"text saying {text}"]
    return {"kind": "word", "key": f"word {text}", "captions": every}
