"""The concepts of the `icons` data set, and which icon names count as each."""

from __future__ import annotations

import re

# Class name: the names that icons of it carry. Concrete things with one common way to draw them.
CONCEPTS = {
    "folder": "folder",
    "heart": "heart favorite love",
    "house": "home house",
    "envelope": "mail email envelope",
    "speaker": "volume speaker sound volume-up volume-down volume-high volume-low volume-high",
    "calendar": "calendar date-calendar",
    "clock": "clock time",
    "pencil": "pencil pen edit",
    "map pin": "map-pin location map-marker location-pin marker pin-map geo-alt",
    "microphone": "mic microphone",
    "bell": "bell",
    "printer": "printer print",
    "bookmark": "bookmark bookmarks",
    "funnel": "filter funnel",
    "document": "file document file-text file-lines",
    "eye": "eye view visibility",
    "padlock": "lock padlock lock-closed lock-on",
    "magnifying glass": "search magnifier magnifying-glass zoom-in zoom-out zoom",
    "star": "star",
    "person": "user person account profile",
    "paperclip": "paperclip attachment attach paper-clip clip",
    "book": "book book-open open-book",
    "light bulb": "bulb lightbulb light-bulb idea lightbulb-on",
    "camera": "camera",
    "cloud": "cloud",
    "trash can": "trash trash-can bin trash-bin delete-bin",
    "globe": "globe world earth globe-earth",
    "moon": "moon",
    "flag": "flag",
    "gear": "gear cog settings setting",
    "shield": "shield",
    "shopping cart": "cart shopping-cart",
    "picture": "image picture photo",
    "telephone": "phone call telephone",
    "price tag": "tag price-tag tags label",
    "speech bubble": "chat comment message chat-bubble message-circle message-square speech-bubble",
    "gift": "gift present gift-box",
    "key": "key",
    "sun": "sun",
    "monitor": "monitor desktop display computer",
    "headphones": "headphones headphone headset",
    "trophy": "trophy",
    "bar chart": "bar-chart chart-bar chart-bar-vertical bar-graph graph-bar stats-bars",
    "credit card": "credit-card card bank-card",
    "clipboard": "clipboard",
    "compass": "compass",
    "battery": "battery battery-full battery-half battery-low",
    "briefcase": "briefcase",
    "pie chart": "pie-chart chart-pie",
    "scissors": "scissors cut scissor",
    "chain link": "link chain",
    "code brackets": "code",
    "thumbtack": "pin pushpin thumbtack push-pin",
    "paper plane": "send paper-plane paperplane paper-airplane",
    "lightning bolt": "bolt lightning flash zap thunder lightning-bolt",
    "people": "users people group persons",
    "floppy disk": "save floppy floppy-disk disk diskette",
    "video camera": "video video-camera camera-video",
    "hash sign": "hash hashtag number",
    "box": "box package",
    "bug": "bug",
    "keyboard": "keyboard",
    "layers": "layers layer stack",
    "map": "map",
    "musical note": "music music-note note-music",
    "archive box": "archive",
    "qr code": "qrcode qr-code qr",
    "shopping bag": "bag shopping-bag handbag shop-bag bag-shopping",
    "thumbs down": "thumbs-down thumb-down dislike hand-thumbs-down hand-thumb-down",
    "thumbs up": "thumbs-up thumb-up like hand-thumbs-up hand-thumb-up",
    "calculator": "calculator",
    "inbox": "inbox",
    "server": "server",
    "database": "database",
    "paintbrush": "brush paintbrush paint-brush",
    "terminal": "terminal console command-line",
    "three lines": "menu hamburger",
    "wallet": "wallet",
    "wifi": "wifi",
    "alarm clock": "alarm alarm-clock",
    "car": "car",
    "rocket": "rocket",
    "crop tool": "crop",
    "hourglass": "hourglass",
    "mobile phone": "smartphone mobile phone-mobile device-mobile mobile-phone",
    "tablet": "tablet",
    "bluetooth": "bluetooth",
    "processor": "cpu chip processor microchip",
    "drop of water": "drop droplet water-drop water",
    "fire": "fire flame",
    "laptop": "laptop",
    "ticket": "ticket",
    "building": "building office buildings office-building",
    "smiling face": "smile smiley emoji mood-smile face-smile emoji-smile",
    "toggle switch": "toggle toggle-on toggle-off switch",
    "target": "target bullseye",
    "wrench": "wrench spanner tool",
    "coffee cup": "coffee cup mug",
    "airplane": "plane airplane",
    "id card": "id-card identity id badge",
    "eye dropper": "eyedropper eye-dropper dropper pipette color-picker",
    "mouse pointer": "cursor mouse-pointer pointer",
    "list": "list",
    "power button": "power power-off",
    "store": "store shop storefront",
    "umbrella": "umbrella",
    "anchor": "anchor",
    "film strip": "film movie",
    "git branch": "git-branch branch code-branch",
    "quotation marks": "quote quotes",
}
CLASS_NAMES = tuple(CONCEPTS)


def _words(text: str) -> list[str]:
    """The words of a table, one a blank apart."""
    return text.split()


_STYLE = frozenset(
    _words("""
outline outlined solid filled fill line linear bold thin light regular duotone twotone rounded
round sharp o f alt s m l r sm lg small big large flat icon 12 16 24 32 48 96
""")
)
_STATE = frozenset(
    _words("""
plus minus add remove off check checked checkmark tick x xmark cross slash slashed lock unlock
arrow up down left right question exclamation alert edit delete star heart settings search
cancel disable disabled block clock sync refresh info warning error done pause play empty full
dot dots badge badged alerted open closed user text download upload share simple fall rise cog
2-line stop forward
""")
)
_BY_NAME = {name: c for c, names in CONCEPTS.items() for name in names.split()}


def read_name(name: str) -> tuple[str, str] | None:
    """The concept that an icon's name gives, and the drawing's name without style or state.

    `trash-2-solid` gives ("trash can", "trash-2"): a numbered drawing is a drawing of its own,
    while `trash-plus` is a variant of `trash`.
    """
    parts = [p for p in re.split(r"[-_]+", name.lower()) if p]
    for length in (3, 2, 1):
        for start in range(len(parts) - length + 1):
            concept = _BY_NAME.get("-".join(parts[start : start + length]))
            rest = parts[:start] + parts[start + length :]
            numbers = [p for p in rest if re.fullmatch(r"\d", p)]
            others = [p for p in rest if p not in numbers]
            # The thing leads the name: `cloud-lock` is a cloud, and no padlock.
            stateless = start == 0 or all(p in _STYLE for p in parts[:start])
            few = len(numbers) < 2 and len(others) < 3
            known = all(p in _STYLE or p in _STATE for p in others)
            if concept and stateless and few and known:
                return concept, "-".join(parts[start : start + length] + numbers)
    return None
