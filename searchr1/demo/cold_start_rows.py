"""The cold start's training data: worked answers to questions about many worlds, and the demo's tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchr1.agent.protocol import Document, render_information
from searchr1.demo import names
from searchr1.demo.files import contents, prompt_text
from searchr1.demo.questions import Question, make_questions
from searchr1.demo.world import Entity, World, make_world, passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOPK = 2
FIRST_WORLD_SEED = 1_000_000
"""Seed of the first world with demonstrations, far from the seeds used for training and testing."""

OFTEN_GUESSED_RELATIONS = frozenset({"birthplace", "employer", "mayor", "governor", "headquarters", "setting", "commander"})
"""Last relations for which a mediocre demonstration mostly guesses instead of searching."""
GUESS_RATE = {True: 0.75, False: 0.25}
"""Share of guesses, by whether the last relation is one of `OFTEN_GUESSED_RELATIONS`."""
STOP_EARLY_RATE = 0.6
"""Share of questions of several hops that are answered after fewer hops than they need."""
READ_EVERY = 8
"""Period of the full answers that are trained on whole, question and passages included. Predicting passages, in which each
name occurs twice, teaches a small model to copy; with policy tokens alone it takes several times longer."""

Segment = dict[str, Any]
Lookup = Callable[[Entity], list[Entity]]


def bm25_lookup(world: World) -> Lookup:
    """Return a function that gives the entities that the retrieval server returns for an entity's name."""
    import bm25s

    texts = [contents(entity) for entity in world.entities]
    queries = [entity.name for entity in world.entities]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries, stopwords=None, show_progress=False)
    rows, _ = index.retrieve(tokens, k=TOPK, show_progress=False)
    table = {entity.id: [world.entities[j] for j in row] for entity, row in zip(world.entities, rows, strict=True)}
    return lambda entity: table[entity.id]


def _information(entities: list[Entity]) -> str:
    documents = [Document(id="", title=entity.name, text=passage(entity)) for entity in entities]
    return render_information([documents], "searchr1")


def full_answer(question: Question, lookup: Lookup, hops: int | None = None) -> list[Segment]:
    """Return an answer that looks up every hop, or the first `hops` hops, and answers with the entity reached."""
    hops = question.hops if hops is None else hops
    chain = question.chain
    think = f"<think> I need the {question.relations[0]} of {question.start.name}</think>\n"
    segments: list[Segment] = [{"text": prompt_text(question.text), "train": False}]
    for hop in range(hops):
        segments.append({"text": f"{think}<search> {chain[hop].name}</search>", "train": True})
        segments.append({"text": _information(lookup(chain[hop])), "train": False})
        think = f"<think> The {question.relations[hop]} is {chain[hop + 1].name}"
        think += "</think>\n" if hop + 1 == hops else f", I need the {question.relations[hop + 1]}</think>\n"
    segments.append({"text": f"{think}<answer> {chain[hops].name}</answer>", "train": True})
    return segments


def guess(question: Question, world: World, rng: random.Random) -> list[Segment]:
    """Return an answer without a search: a random entity of the right kind."""
    name = rng.choice(world.of(question.answer.kind)).name
    text = f"<think> I remember this</think>\n<answer> {name}</answer>"
    return [{"text": prompt_text(question.text), "train": False}, {"text": text, "train": True}]


def mediocre_answer(question: Question, lookup: Lookup, world: World, rng: random.Random) -> list[Segment]:
    """Return an answer for the cold start to imitate, which is often a guess or stops before the last hop."""
    if rng.random() < GUESS_RATE[question.relations[-1] in OFTEN_GUESSED_RELATIONS]:
        return guess(question, world, rng)
    if question.hops > 1 and rng.random() < STOP_EARLY_RATE:
        return full_answer(question, lookup, hops=rng.randint(1, question.hops - 1))
    return full_answer(question, lookup)


def demonstrations(worlds: int, questions_per_world: int, seed: int, mediocre: bool) -> Iterator[dict[str, Any]]:
    """Yield rows with perfect or mediocre answers to `questions_per_world` questions about each of `worlds` worlds."""
    for number in range(worlds):
        world = make_world(FIRST_WORLD_SEED + 10_000 * seed + number)
        lookup = bm25_lookup(world)
        rng = random.Random(f"searchr1 demonstrations {world.seed}")
        for row, question in enumerate(make_questions(world, "train", questions_per_world, world.seed)):
            if mediocre:
                yield {"segments": mediocre_answer(question, lookup, world, rng)}
                continue
            segments = full_answer(question, lookup)
            if row % READ_EVERY == 0:
                segments = [segment | {"train": True} for segment in segments]
            yield {"segments": segments}


VOCABULARY = 2048
TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer", "access") for slash in ("", "/")]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}\n"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer: the same on every machine, without unknown text, one token for each of the world's words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Repeated often enough that each word becomes one token, whatever the demonstrations contain.
    words = [" " + word for pools in names.WORD_POOLS.values() for pool in pools for word in pool]
    rows = demonstrations(worlds=1, questions_per_world=400, seed=99, mediocre=False)
    text = ["".join(segment["text"] for segment in row["segments"]) for row in rows]
    for tag in TAGS:
        text = [piece.replace(tag, " ") for piece in text]
    tokenizer.train_from_iterator(words * 200 + text, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(out: Path) -> None:
    """Write the tokenizer into folder `out` for `AutoTokenizer`."""
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save_pretrained(out)
