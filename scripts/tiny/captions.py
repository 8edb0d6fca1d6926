"""Captions: from an icon's name to the words a person would use, and back to one key a concept."""

from __future__ import annotations

import random
import re


def _words(text: str) -> list[str]:
    """The words of a table, one a blank apart."""
    return text.split()


# Words that name a drawing's style or size, not the thing drawn.
STYLE = frozenset(
    _words("""
outline outlined solid filled fill line linear bold thin light regular duotone twotone two tone
duo rounded round sharp baseline flat color mono broken bulk mini micro stroke alt o f fine 24px
16px xs sm md lg xl 01 02 03 04 05 06 07 08 09 10 12 14 15 16 18 20 24 28 30 32 36 40 48 64 icon
icons emoji v variant
""")
)
_KEEP_LIGHT = {"traffic", "flash", "street", "head", "stop", "night", "spot", "highlight"}
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT = re.compile(r"(?:number|numeric|digit|numero)? ?(\d)")
_EMOJI_SKIN = re.compile(r"skin-tone|-(light|medium|dark|medium-light|medium-dark)$")

# Words for one thing. The first is the class name that a prompt would use; a caption may take any.
SYNONYMS = tuple(
    tuple(word.strip() for word in line.split(","))
    for line in """
house, home
envelope, mail, email, letter
trash can, trash, bin, garbage, delete, wastebasket, rubbish bin
gear, settings, setting, cog, cogwheel, preferences
magnifying glass, search, magnifier, find, zoom
person, user, account, profile
people, users, group, team
map pin, location, map marker, marker, place, location pin
speech bubble, chat, message, comment, chat bubble, conversation
funnel, filter
document, file, page, paper
picture, image, photo, photograph, landscape picture
telephone, phone, call, handset
speaker, volume, sound, volume up, audio
chain link, link, chain
light bulb, bulb, lightbulb, idea, lamp bulb
price tag, tag, label
shopping cart, cart, trolley
shopping bag, bag, handbag
airplane, plane, flight, aeroplane
paper plane, send
lightning bolt, bolt, lightning, zap, flash
thumbs up, thumb up, like, thumbsup
trophy, cup trophy, award cup
bell, notification, notifications, alarm bell
pencil, edit, pen
bar chart, chart bar, bar graph, chart
pie chart, chart pie
clock, time, watch face
calendar, date, schedule
credit card, card, bank card, payment card
gift, present, gift box
briefcase, work, suitcase, business
globe, world, earth, planet earth
microphone, mic
headphones, headphone, headset
monitor, desktop, computer screen, display, screen
book, open book
padlock, lock, locked
key, password key
eye, view, visibility, visible
heart, favorite, favourite, love
star, rating star
paperclip, attachment, attach, clip
printer, print
bookmark, ribbon
compass, navigation compass
car, automobile
truck, lorry, delivery truck
video camera, videocam, camcorder
camera, photo camera
t shirt, shirt, tshirt, tee, t shirt top
shoe, sneaker, trainers, sports shoe
ankle boot, boot
trousers, pants, jeans
pullover, sweater, jumper
coat, jacket
sandal, flip flop, slipper
dress, gown
cross, close, x mark, multiply, times
check mark, check, checkmark, tick
plus, add
minus, remove, subtract
fire, flame
water drop, drop, droplet
""".strip().splitlines()
)
CANONICAL = {word: group[0] for group in SYNONYMS for word in group}
_GROUP_OF = {word: group for group in SYNONYMS for word in group}

TEMPLATES = (
    "{}", "{}", "{}", "{}", "{} icon", "a {}", "the {}", "an icon of a {}", "an icon of the {}",
    "a drawing of a {}", "a picture of a {}", "a simple icon of a {}", "a photo of a {}",
    "a black and white icon of a {}", "a symbol of a {}", "a line drawing of a {}", "{} symbol",
    "a sketch of a {}", "a small picture of a {}",
)  # fmt: skip


def words(name: str) -> list[str]:
    """The parts of an icon's name, lower-case, style and size words left out."""
    parts = [p for p in re.split(r"[-_:\s]+", name.lower()) if p]
    kept = [
        p
        for i, p in enumerate(parts)
        if p not in STYLE or (p == "light" and i and parts[i - 1] in _KEEP_LIGHT)
    ]
    kept = [re.sub(r"(?<=[a-z]{3})\d{1,2}$", "", p) for p in kept] or parts
    # A trailing "2" is a second drawing of the same thing; a number alone is the number.
    if len(kept) > 1 and re.fullmatch(r"\d", kept[-1]) and kept[-2] not in NUMBER_WORDS:
        kept = kept[:-1]
    return kept


NUMBER_WORDS = {"number", "numeric", "digit", "counter", "looks", "dice", "filter", "n", "hexagon"}


def is_skin_variant(name: str) -> bool:
    """Whether an emoji is another skin tone of one that is kept."""
    return bool(_EMOJI_SKIN.search(name))


def key_of(name: str) -> str:
    """One text that all names of one concept share, to tell positives from negatives."""
    phrase = " ".join(words(name))
    digit = _DIGIT.fullmatch(phrase)
    if digit:
        return f"digit {DIGIT_NAMES[int(digit[1])]}"
    return CANONICAL.get(phrase, phrase)


def phrase_variants(key: str, aliases: tuple[str, ...] = ()) -> list[str]:
    """Ways of saying a key: itself, its synonyms, its first word's synonyms, the icon's aliases."""
    variants = [key]
    group = _GROUP_OF.get(key)
    if group:
        variants += list(group)
    else:
        parts = key.split(" ")
        if len(parts) > 1 and parts[0] in _GROUP_OF:
            variants.append(" ".join([_GROUP_OF[parts[0]][0], *parts[1:]]))
    variants += [" ".join(words(a)) for a in aliases[:3]]
    return list(dict.fromkeys(variants))


def caption(rng: random.Random, variants: list[str]) -> str:
    """One caption drawn from the variants and the templates."""
    first = rng.random() < 0.4
    return rng.choice(TEMPLATES).format(variants[0] if first else rng.choice(variants))
