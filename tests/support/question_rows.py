"""Write files of question rows, and load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from searchr1.data.dataset import LoadedData, load_dataset_files

RLINF = {"prompt": "Who?", "solutions": ["Ann", "Anna"]}


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def load(*paths: Path, tokenizer: Any, **options: Any) -> LoadedData:
    return load_dataset_files(paths, tokenizer=tokenizer, **({"max_prompt_length": 1000} | options))
