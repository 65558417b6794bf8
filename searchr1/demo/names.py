"""Words and names of the fictional world.

The word pools are the same for every world, so one small tokenizer serves all worlds. A name is two words; the
world's seed determines the names and the relations between entities.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

_ONSETS = "b br c d dr f g gl h k l m n p qu r s sh st t th v w y z".split()
_VOWELS = "a e i o u ae ia or el".split()
_CODAS = "l m n r s th nd rk st x ld".split()


def _invented_words(count: int, seed: int, ending: tuple[str, ...]) -> list[str]:
    """Return `count` different invented words of two syllables, each with a last part from `ending`."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        word = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) + rng.choice(ending)
        words[word.capitalize()] = None
    return list(words)


GIVEN_NAMES = _invented_words(90, 1, ("a", "en", "is", "o", "wyn"))
FAMILY_NAMES = _invented_words(140, 2, ("ack", "ert", "ume", "oy", "insk"))
PLACE_STEMS = _invented_words(110, 3, ("mar", "by", "gate", "dun", "wick"))
PLACE_KINDS = "Bay Bridge Cross Falls Ferry Heath Hill Hollow Landing Market Quay Ridge Sands Vale".split()
REGION_STEMS = _invented_words(40, 4, ("ia", "land", "mark"))
REGION_KINDS = "Coast Highlands Lowlands March Plains".split()
FIRM_STEMS = _invented_words(70, 5, ("co", "tek", "lux"))
FIRM_KINDS = "Brewery Foundry Looms Mills Press Shipyard Works".split()
TITLE_FIRST = (
    "Amber Ancient Bitter Blue Broken Bright Burning Copper Crimson Crooked Distant Empty Endless Faded Fallen Frozen "
    "Gentle Golden Green Hidden Hollow Iron Ivory Last Little Lonely Lost Midnight Northern Pale Patient Quiet Restless "
    "Scarlet Second Secret Seventh Silent Silver Sleeping Stolen Stone Sudden Velvet Wandering White Wild Winter"
).split()
TITLE_SECOND = (
    "Anchor Arrow Bell Cage Candle Castle Clock Compass Crown Door Echo Engine Feather Fire Fountain Garden Ghost "
    "Harbor Horse House Island Journey Key Kingdom Lantern Letter Lighthouse Map Mirror Moon Mountain Ocean Orchard "
    "Page Path Piano Promise River Road Rose Shadow Song Star Storm Stranger Summer Tower Train Valley Voice Wheel"
).split()
SHIP_FIRST = (
    "Bold Brave Calm Clever Daring Eager Fair Fearless Free Gallant Grand Happy Jolly Loyal Merry Mighty Noble Proud "
    "Rapid Royal Steady Swift True Valiant Wise"
).split()
SHIP_SECOND = (
    "Albatross Badger Dolphin Dragon Eagle Falcon Gull Hawk Heron Lion Lynx Marlin Osprey Otter Pelican Petrel Raven "
    "Seal Shark Sparrow Swallow Swan Tern Tiger Walrus"
).split()
OCCUPATIONS = (
    "actor baker botanist captain carpenter chemist doctor farmer gardener glazier judge lawyer mason merchant miller "
    "painter pilot poet potter printer sailor singer smith soldier tailor teacher weaver writer"
).split()

WORD_POOLS: dict[str, tuple[list[str], list[str]]] = {
    "person": (GIVEN_NAMES, FAMILY_NAMES),
    "town": (PLACE_STEMS, PLACE_KINDS),
    "region": (REGION_STEMS, REGION_KINDS),
    "company": (FIRM_STEMS, FIRM_KINDS),
    "book": (TITLE_FIRST, TITLE_SECOND),
    "ship": (SHIP_FIRST, SHIP_SECOND),
}


def shuffled_names(kind: str, rng: random.Random) -> Iterator[str]:
    """Return all two-word names of `kind`, each once, in an order drawn from `rng`."""
    first, second = WORD_POOLS[kind]
    names = [f"{a} {b}" for a, b in itertools.product(first, second)]
    rng.shuffle(names)
    return iter(names)
