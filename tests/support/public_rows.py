"""Small files in the exact shapes of the public sets. The contents are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from searchr1.data.prepare.sources import SETS


def flashrag_row(name: str, split: str, number: int) -> dict[str, Any]:
    """A row of `{name}/{split}.jsonl` in FlashRAG's repository."""
    row: dict[str, Any] = {
        "id": f"{split}_{number}",
        "question": f"who founded the {name} {split} company number {number}",
        "golden_answers": [f"Founder {number}", f"F. {number}"],
    }
    context = {"title": ["A", "B"], "sentences": [["One.", "Two."], ["Three."]]}
    facts = {"title": ["A"], "sent_id": [0]}
    if name == "hotpotqa":
        row["question"] += "?"
        row["metadata"] = {"type": "bridge", "level": "hard", "supporting_facts": facts, "context": context}
    elif name == "2wikimultihopqa":
        row["golden_answers"] = ["no"]
        row["metadata"] = {"supporting_facts": facts, "context": context, "type": "comparison"}
    elif name == "musique":
        steps = [{"id": 1, "question": "x >> y", "answer": "z", "paragraph_support_idx": None}]
        row["metadata"] = {"answerable": True, "question_decomposition": steps}
    elif name == "popqa":
        row["metadata"] = {"subj": "x", "prop": "founder", "obj": "y", "s_pop": 12, "o_pop": 3400}
    elif name == "triviaqa":
        row["question"] = f"Which of the founders in {split} comes as number {number}?"
        row["golden_answers"] = [f"Founder {number}", f"FOUNDER {number}", f"Founder {number} (person)"]
    elif name == "bamboogle":
        row["metadata"] = {}
    return row


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_flashrag(folder: Path, rows: int = 4) -> Path:
    """The repository's layout with every set and split."""
    for found in SETS.values():
        for split in found.splits:
            made = [flashrag_row(found.name, split, number) for number in range(rows)]
            write_jsonl(folder / found.name / f"{split}.jsonl", made)
    return folder
