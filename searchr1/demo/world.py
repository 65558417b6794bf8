"""Entities, their relations, and the text of the encyclopedia.

An entity belongs to the part "train" or to the part "test". Both ends of a relation are in the same part, so a chain of
relations that starts at a held-out entity contains held-out entities only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from searchr1.demo import names

Part = Literal["train", "test"]

ENTITY_COUNTS = {"person": 1100, "town": 320, "region": 48, "company": 240, "book": 480, "ship": 240}
TEST_SHARE = 0.3

RELATIONS: dict[str, dict[str, str]] = {
    "person": {"birthplace": "town", "teacher": "person", "employer": "company"},
    "town": {"region": "region", "mayor": "person"},
    "region": {"capital": "town", "governor": "person"},
    "company": {"founder": "person", "headquarters": "town"},
    "book": {"author": "person", "setting": "town"},
    "ship": {"owner": "company", "commander": "person"},
}
"""kind -> {relation -> kind of its value}; a relation of an entity has exactly one value."""


@dataclass(slots=True)
class Entity:
    """The subject of one passage of the encyclopedia."""

    id: int
    kind: str
    name: str
    part: Part
    occupation: str = ""
    year: int = 0
    relations: dict[str, Entity] = field(default_factory=dict)

    @property
    def aliases(self) -> list[str]:
        """Return other correct names: with an initial or the family name first for people, in another order for towns."""
        first, second = self.name.split(" ")
        if self.kind == "person":
            return [f"{first[0]}. {second}", f"{second}, {first}"]
        if self.kind == "town":
            return [f"{second} of {first}"]
        return []

    @property
    def url(self) -> str:
        """Return the address of the entity's page."""
        return f"https://encyclopedia.example/wiki/{self.name.replace(' ', '_')}"


@dataclass(slots=True)
class World:
    """All entities of one seed."""

    seed: int
    entities: list[Entity]

    def of(self, kind: str, part: Part | None = None) -> list[Entity]:
        """Return the entities of `kind` in `part`, or in both parts."""
        return [e for e in self.entities if e.kind == kind and part in (None, e.part)]


def make_world(seed: int) -> World:
    """Return the world of `seed`, which is the same on every machine."""
    rng = random.Random(f"searchr1 demo world {seed}")
    entities: list[Entity] = []
    for kind, count in ENTITY_COUNTS.items():
        pool = names.shuffled_names(kind, rng)
        for i in range(count):
            part: Part = "test" if i < count * TEST_SHARE else "train"
            entity = Entity(len(entities), kind, next(pool), part, year=rng.randint(1201, 1999))
            if kind == "person":
                entity.occupation = rng.choice(names.OCCUPATIONS)
            entities.append(entity)
    world = World(seed, entities)
    pools = {(kind, part): world.of(kind, part) for kind in ENTITY_COUNTS for part in ("train", "test")}
    for entity in entities:
        for relation, kind in RELATIONS[entity.kind].items():
            others = pools[kind, entity.part]
            value = rng.choice(others)
            while value is entity:
                value = rng.choice(others)
            entity.relations[relation] = value
    order = list(range(len(entities)))
    rng.shuffle(order)  # so that the corpus mixes passages of all kinds
    world.entities = [entities[i] for i in order]
    return world


def passage(entity: Entity) -> str:
    """Return the passage about `entity`: all its relations, nothing else."""
    r = {name: value.name for name, value in entity.relations.items()}
    match entity.kind:
        case "person":
            return (
                f"The {entity.occupation} {entity.name} was born in {r['birthplace']}, was taught by {r['teacher']}"
                f" and works for {r['employer']}."
            )
        case "town":
            return f"The town {entity.name} lies in the region {r['region']}. Its mayor is {r['mayor']}."
        case "region":
            return f"The region {entity.name} has the capital {r['capital']}. Its governor is {r['governor']}."
        case "company":
            return f"The company {entity.name} was founded by {r['founder']}. It is based in {r['headquarters']}."
        case "book":
            return f"The book {entity.name} was written by {r['author']}. It is set in {r['setting']}."
        case "ship":
            return f"The ship {entity.name} is owned by {r['owner']}. It is commanded by {r['commander']}."
    raise ValueError(f"unknown kind of entity: {entity.kind}")


def page_text(entity: Entity, mentioned_by: list[Entity]) -> str:
    """Return the page at `url`: the passage, other names, the year, and the entities that mention this one."""
    lines = [passage(entity)]
    if entity.aliases:
        lines.append("Also known as " + " or ".join(entity.aliases) + ".")
    lines.append(f"The first record of {entity.name} dates from {entity.year}.")
    if mentioned_by:
        lines.append("See also: " + ", ".join(other.name for other in mentioned_by) + ".")
    return "\n".join(lines)
