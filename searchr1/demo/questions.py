"""Questions of one, two and three hops about a world."""

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
"""The question's text by its last relation; each hop before that reads "the <relation> of …"."""


@dataclass(slots=True)
class Question:
    """A question that follows a chain of relations from `start`; the last relation's value is the answer."""

    start: Entity
    relations: list[str]
    """Relations in the order in which they are looked up."""

    @property
    def hops(self) -> int:
        """Return the number of passages that an answer needs."""
        return len(self.relations)

    @property
    def chain(self) -> list[Entity]:
        """Return the entities along the chain, from `start` to the answer."""
        entities = [self.start]
        for relation in self.relations:
            entities.append(entities[-1].relations[relation])
        return entities

    @property
    def answer(self) -> Entity:
        """Return the gold answer."""
        return self.chain[-1]

    @property
    def text(self) -> str:
        """Return the question in English."""
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
    """Return `count` different questions about entities of `part`, with hops in the shares of `HOP_SHARES`.

    A chain contains no entity twice, so no hop can be skipped.
    """
    rng = random.Random(f"searchr1 questions {world.seed} {part} {seed}")
    starts = [e for e in world.entities if e.part == part]
    texts: set[str] = set()
    questions: list[Question] = []
    for hops, share in HOP_SHARES.items():
        wanted = len(questions) + round(count * share)
        while len(questions) < wanted:
            question = _draw(world, part, hops, rng, starts)
            chain = question.chain
            if question.text in texts or len({e.id for e in chain}) != len(chain):
                continue
            texts.add(question.text)
            questions.append(question)
    rng.shuffle(questions)
    return questions
