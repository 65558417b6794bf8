"""Questions of one, two and three hops over a world."""

from __future__ import annotations

import random
from dataclasses import dataclass

from searchr1.demo.world import RELATIONS, Entity, Part, World

HOP_NAMES = {1: "one_hop", 2: "two_hop", 3: "three_hop"}
HOP_SHARES = {1: 0.4, 2: 0.45, 3: 0.15}

NATURAL = {
    "birthplace": "Where was {} born?",
    "teacher": "Who taught {}?",
    "employer": "Which company does {} work for?",
    "region": "In which region does {} lie?",
    "mayor": "Who is the mayor of {}?",
    "capital": "Which town is the capital of {}?",
    "governor": "Who is the governor of {}?",
    "founder": "Who founded {}?",
    "headquarters": "Where is {} based?",
    "author": "Who wrote {}?",
    "setting": "Where is {} set?",
    "owner": "Which company owns {}?",
    "commander": "Who commands {}?",
}
"""How one asks for a relation; every inner hop reads "the <relation> of …"."""


@dataclass(slots=True)
class Question:
    """A chain of relations from `start`; the answer is the value of the last one."""

    start: Entity
    relations: list[str]
    """In the order in which they must be looked up."""

    @property
    def hops(self) -> int:
        """Number of passages that must be read."""
        return len(self.relations)

    @property
    def chain(self) -> list[Entity]:
        """The entities on the way, `start` first, the answer last."""
        entities = [self.start]
        for relation in self.relations:
            entities.append(entities[-1].relations[relation])
        return entities

    @property
    def answer(self) -> Entity:
        """The gold answer."""
        return self.chain[-1]

    @property
    def text(self) -> str:
        """The question in English."""
        subject = self.start.name
        for relation in self.relations[:-1]:
            subject = f"the {relation} of {subject}"
        return NATURAL[self.relations[-1]].format(subject)


def _draw(world: World, part: Part, hops: int, rng: random.Random, starts: list[Entity]) -> Question:
    start = rng.choice(starts)
    relations: list[str] = []
    kind = start.kind
    for _ in range(hops):
        relation = rng.choice(list(RELATIONS[kind]))
        relations.append(relation)
        kind = RELATIONS[kind][relation]
    return Question(start, relations)


def make_questions(world: World, part: Part, count: int, seed: int) -> list[Question]:
    """`count` different questions about entities of `part`, hops mixed by `HOP_SHARES`.

    A chain never comes back to an entity that it has visited, so no hop can be skipped.
    """
    rng = random.Random(f"searchr1 questions {world.seed} {part} {seed}")
    starts = [e for e in world.entities if e.part == part]
    seen: set[str] = set()
    questions: list[Question] = []
    for hops, share in HOP_SHARES.items():
        wanted = len(questions) + round(count * share)
        while len(questions) < wanted:
            question = _draw(world, part, hops, rng, starts)
            chain = question.chain
            if question.text in seen or len({e.id for e in chain}) != len(chain):
                continue
            seen.add(question.text)
            questions.append(question)
    rng.shuffle(questions)
    return questions
