"""How is a world described in one or two English sentences?

Writes a caption from the notes the families left in the builder. It never looks at pixels.
"""

from __future__ import annotations

import numpy as np

from lyra.training.worlds import layout as lo
from lyra.training.worlds.builder import Builder
from lyra.training.worlds.palettes import colour_name

_NUMBERS = ("no", "a", "two", "three", "four", "five", "six")


def _plural(thing: str, count: int) -> str:
    if count == 1:
        return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"
    if thing == "person":
        word = "people"
    elif thing.endswith(("sh", "ch", "x", "s")):
        word = thing + "es"
    elif thing.endswith("y"):
        word = thing[:-1] + "ies"
    elif thing.endswith("shelf"):
        word = thing[:-1] + "ves"
    else:
        word = thing + "s"
    return f"{_NUMBERS[count]} {word}" if count < len(_NUMBERS) else f"many {word}"


def _light(b: Builder) -> str:
    if b.indoor:
        return {
            "clear": "in bright daylight",
            "overcast": "in soft daylight",
            "golden": "in warm evening light",
            "night": "at night, lit by lamps",
        }[b.regime]
    cloud = b.sky[lo.S_CLOUD]
    words = {
        "clear": "on a sunny day under a " + ("clear blue sky" if cloud == 0 else "blue sky with clouds"),
        "overcast": "on an overcast day",
        "golden": "at golden hour with low warm sun",
        "night": "at night" + (" under stars" if cloud == 0 else "") + (", lit by lamps" if b.lamps else ""),
    }[b.regime]
    fog = b.sky[lo.S_FOG]
    return words + (" in thick mist" if fog > 0.015 else " with light haze" if fog > 0.005 else "")


def write_caption(b: Builder, seed: int) -> str:
    """One or two sentences: place, light, weather, dominant colours and materials, objects."""
    rng = np.random.default_rng([seed, 5])
    sentence = f"{b.place} {_light(b)}"
    sentence = sentence[0].upper() + sentence[1:]
    seen: dict[str, str] = {}
    for part, substance, colour in b.surfaces:
        seen.setdefault(part, f"{colour_name(np.asarray(colour))} {substance} {part}")
    surfaces = list(seen.values())[:3]
    if surfaces:
        sentence += ", with " + (
            " and ".join(surfaces) if len(surfaces) < 3 else f"{surfaces[0]}, {surfaces[1]} and {surfaces[2]}"
        )
    things = [(t, c) for t, c in b.objects.items() if t not in ("house",) or "houses" not in seen]
    rng.shuffle(things)
    things = sorted(things[:5], key=lambda tc: -tc[1])
    words = [_plural(str(t), int(c)) for t, c in things]
    if not words:
        return sentence + "."
    listed = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    return f"{sentence}. There are {listed}."
