"""The questions of a run, as its YAML names them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from searchr1.agent.trajectory import Sample
from searchr1.config.schema import Config
from searchr1.data import model_source
from searchr1.data.dataset import LoadStats, load_dataset_files
from searchr1.data.paths import EVALUATION, TRAIN

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RunData:
    """Tokenized questions."""

    train: list[Sample]
    val: list[Sample]
    val_stats: LoadStats | None = None
    """What loading `val` left out; None if there was nothing to load."""


def load_tokenizer(config: Config) -> Any:
    """Return the model's tokenizer.

    Raises:
        UserError: the model's folder has none.
    """
    return model_source.load_tokenizer(config.rollout.model.model_path, "rollout.model.model_path")


def load_data(config: Config, training: bool = True, prompts: bool = True) -> RunData:
    """Read, render and tokenize the questions; an evaluation reads `data.val_data_paths` only.

    Args:
        config: of the run.
        training: read the training questions too.
        prompts: the rows' prompts are used, not only their questions.
    """
    tokenizer = load_tokenizer(config)
    data = config.data
    parts: dict[str, list[Sample]] = {"train": [], "val": []}
    stats: LoadStats | None = None
    for part, paths in (("train", data.train_data_paths), ("val", data.val_data_paths)):
        if not paths or (part == "train" and not training):
            continue
        loaded = load_dataset_files(
            paths,
            tokenizer=tokenizer,
            max_prompt_length=data.max_prompt_length,
            prompt_key=data.prompt_key,
            answer_key=data.answer_key,
            template=data.prompt_template,
            filter_by_length=data.filter_prompt_by_length,
            data_size=data.data_size,
            apply_chat_template=data.apply_chat_template,
            splits=TRAIN if part == "train" else EVALUATION,
            prompts=prompts,
        )
        for warning in loaded.warnings:
            logger.warning("data.%s_data_paths: %s", part, warning)
        logger.info("%s questions: %s", part, loaded.stats)
        parts[part], stats = loaded.samples, loaded.stats
    return RunData(parts["train"], parts["val"], stats if data.val_data_paths else None)
