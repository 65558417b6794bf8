"""`searchr1.json` in a model folder: the prompt, the agent settings and the sampling that the model was trained with.

It has the keys of a run's YAML, of those parts that a question's tokens and the loop depend on; paths, addresses and code
are left out. What it holds comes from wherever the model comes from, so it is read as data and checked key by key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchr1.config.load import Problem, build_config, leaves
from searchr1.config.schema import Config, SamplingParams
from searchr1.data.templates import TEMPLATES, template_file
from searchr1.errors import UserError

FILE = "searchr1.json"
FORMAT = 1
LEFT_OUT = ("generate_fn",)
"""Keys of `agentloop` that are left out: code is not passed on with a model."""
TEMPLATE, EVAL_SAMPLING = "data.prompt_template", "algorithm.eval_sampling_params"
WHOLE = ("agentloop", "algorithm.sampling_params", EVAL_SAMPLING)
"""Sections that are always written whole: a key that one lacks is newer than the file, and counts with its default."""
_MOST_BYTES = 1 << 20
_POSITIVE = ("runner.seq_length", "data.max_prompt_length", "agentloop.max_tool_response_length", "tools.search.topk")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The settings of one model."""

    values: dict[str, Any]
    """By dotted key of the configuration; a key that is missing is not known."""
    text: str | None = None
    """The prompt template, if it is the user's own."""
    own_loop: str | None = None
    """What `agentloop.generate_fn` was. Never imported from here."""
    path: Path | None = None
    """The file that they were read from."""

    @classmethod
    def of(cls, config: Config) -> ModelSettings:
        """Return the settings of a run.

        Raises:
            UserError: its template is a file that cannot be read.
        """
        name, text = config.data.prompt_template, None
        if name is not None and name not in TEMPLATES:
            text, name = template_text(name), Path(name).with_suffix(".txt").name
        values = _values_of(config) | {TEMPLATE: name}
        return cls(values, text, config.agentloop.generate_fn)

    @classmethod
    def read(cls, path: Path) -> ModelSettings:
        """Read and check a file.

        Raises:
            UserError: not readable, of another format, or with a key or value that does not belong there.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES} bytes")
            tree = json.loads(data.decode(), parse_constant=_reject_constant)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable ({error}); remove it, or convert the model again") from error
        if not isinstance(tree, dict) or type(tree.get("format")) is not int:
            raise UserError(f'{path}: has no "format"; remove it, or convert the model again')
        if tree.pop("format") != FORMAT:
            raise UserError(f"{path}: is of a format that this version does not know (it knows {FORMAT}); update searchr1")
        text, own_loop = tree.pop("template_text", None), tree.pop("own_loop", None)
        problems = list(_problems(tree, text, own_loop))
        if problems:
            listed = "".join(f"\n  - {problem}" for problem in problems)
            raise UserError(f"{path}: cannot be used; remove it, or convert the model again:{listed}")
        return cls(_completed(leaves(tree)), text, own_loop, path)

    @classmethod
    def of_model(cls, model_path: str) -> ModelSettings | None:
        """Return the settings of a model folder, or of a hub model in the local cache; None if it has none.

        Raises:
            UserError: the file cannot be used.
        """
        folder = Path(model_path)
        path: Path | None = folder / FILE
        if model_path and not folder.is_dir():
            path = _from_hub(model_path)
        return cls.read(path) if model_path and path is not None and path.is_file() else None

    def write(self, folder: Path) -> None:
        """Write the file into a folder that exists."""
        tree: dict[str, Any] = {"format": FORMAT}
        for key, value in self.values.items():
            *sections, name = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
        for name, value in (("template_text", self.text), ("own_loop", self.own_loop)):
            if value is not None:
                tree[name] = value
        (folder / FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")

    def apply(self, config: Config, given: Set[str] = frozenset()) -> None:
        """Set the configuration's keys that are not `given`; of a given section no part is set."""
        sampling = {key for key in given if key.startswith(f"{EVAL_SAMPLING}.")}
        given = given | {EVAL_SAMPLING} if sampling else given
        for key, value in self.values.items():
            if not any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in given):
                if key == TEMPLATE and self.text is not None and self.path is not None:
                    value = str(self.path)  # `template_text` takes the text from there
                _set(config, key, value)

    def differences(self, config: Config) -> Iterator[str]:
        """Yield every key in which a configuration differs, with both values."""
        if self.own_loop is not None and config.agentloop.generate_fn != self.own_loop:
            ours = _shown(config.agentloop.generate_fn)
            yield f"agentloop.generate_fn is {ours}; the model's is {_shown(self.own_loop)} (not run unless it is given)"
        here = _values_of(config)
        sampled = any(key.startswith(EVAL_SAMPLING) and value is not None for key, value in self.values.items())
        if sampled if EVAL_SAMPLING in here else EVAL_SAMPLING in self.values:
            theirs = "a section of its own" if sampled else "null, that is greedy"
            ours = "null, that is greedy" if EVAL_SAMPLING in here else _shown(_section(here, EVAL_SAMPLING))
            yield f"{EVAL_SAMPLING} is {ours}; the model's is {theirs}"
        for key, value in self.values.items():
            if key == TEMPLATE:
                if not self._same_template(config):
                    yield f"{key} is {_shown(here[key])}; the model's is {_shown(value)}"
            elif key in here and here[key] != value:
                yield f"{key} is {_shown(here[key])}; the model's is {_shown(value)}"

    def described(self) -> str:
        """Return the settings that matter most, in a line."""
        values = self.values
        parts = []
        if TEMPLATE in values:
            name = values[TEMPLATE] or "of the training rows' own (not known)"
            parts.append(f"template {name}" + (" as a chat message" if values.get("data.apply_chat_template") else ""))
        else:
            parts.append("template not known")
        if "agentloop.max_turns" in values:
            parts.append(f"{values['agentloop.max_turns']} tool turns")
        if "runner.seq_length" in values:
            parts.append(f"{values['runner.seq_length']} tokens")
        if "tools.search.topk" in values:
            parts.append(f"top {values['tools.search.topk']}")
        if "algorithm.sampling_params.stop" in values:
            parts.append(f"{len(values['algorithm.sampling_params.stop'])} stop strings")
        if values.get("tools.access.enabled"):
            parts.append("reads pages")
        return ", ".join(parts)

    def _same_template(self, config: Config) -> bool:
        """Return whether the template is the same text; what training rows carried themselves cannot be compared."""
        name, here = self.values.get(TEMPLATE), config.data.prompt_template
        if name in (None, "none"):
            return True
        return here is not None and template_text(here) == (self.text if self.text is not None else template_text(name))


def warn_of_differences(settings: ModelSettings, config: Config) -> None:
    """Print a line for each key in which a configuration is not what the model was trained with."""
    for difference in settings.differences(config):
        print(f"warning: {difference} ({settings.path})", file=sys.stderr)


def own_template(path: Path) -> str:
    """Return the template text in a file of settings.

    Raises:
        UserError: it cannot be used, or has none.
    """
    text = ModelSettings.read(path).text
    if text is None:
        raise UserError(f"{path}: has no template of its own")
    return text


def template_text(name: str | None) -> str | None:
    """Return the text of a template: one of `TEMPLATES`, or a user's own `.txt` file with `{question}` in it.

    Raises:
        UserError: no such template; a file that is missing, not UTF-8, or without `{question}`.
    """
    if name is None or name in TEMPLATES:
        return TEMPLATES[name or "none"]
    if name.endswith(".txt"):
        return template_file(name)
    if Path(name).name == "searchr1.json":
        return own_template(Path(name))
    raise UserError(
        "data.prompt_template",
        f"{name!r} is not known; use one of {', '.join(TEMPLATES)}, or a .txt file of your own with {{question}} in it",
    )


def _values_of(config: Config) -> dict[str, Any]:
    agent = dataclasses.asdict(config.agentloop)
    sampling = config.algorithm.eval_sampling_params
    tree = {
        "data": {
            "prompt_template": config.data.prompt_template,
            "apply_chat_template": config.data.apply_chat_template,
            "max_prompt_length": config.data.max_prompt_length,
        },
        "agentloop": {name: value for name, value in agent.items() if name not in LEFT_OUT},
        "algorithm": {
            "sampling_params": dataclasses.asdict(config.algorithm.sampling_params),
            "eval_sampling_params": None if sampling is None else dataclasses.asdict(sampling),
        },
        "runner": {"seq_length": config.runner.seq_length},
        "tools": {"search": {"topk": config.tools.search.topk}, "access": {"enabled": config.tools.access.enabled}},
    }
    return leaves(tree)


def _known() -> dict[str, Any]:
    """Return every key that the file may have, with its default."""
    sampled = Config()
    sampled.algorithm.eval_sampling_params = SamplingParams()
    return _values_of(sampled)


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values, with the defaults of keys that whole sections lack."""
    whole = tuple(f"{one}." for one in WHOLE if any(key.startswith(f"{one}.") for key in values))
    found = {key: values.get(key, default) for key, default in _known().items() if key in values or key.startswith(whole)}
    return found | {key: value for key, value in values.items() if value != {}}


def _problems(tree: dict[str, Any], text: object, own_loop: object) -> Iterator[Problem]:
    """Yield what is wrong with a file's keys and values."""
    known = _known()
    sections = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    values = leaves(tree)
    unknown = [
        key for key, value in values.items()
        if key not in known and not (key in sections and value == {}) and not (key == EVAL_SAMPLING and value is None)
    ]  # fmt: skip
    if unknown:
        yield from (Problem(ascii(key)[1:-1], "unknown key") for key in unknown)
        return
    for name, value in (("template_text", text), ("own_loop", own_loop)):
        if value is not None and not isinstance(value, str):
            yield Problem(name, "must be text")
            return
    config, problems = build_config(tree)
    if problems:
        yield from problems
        return
    for key, value in values.items():
        if (key in _POSITIVE and value <= 0) or (key == "agentloop.max_turns" and value < 0):
            yield Problem(key, f"{value} is too small")
        elif isinstance(value, float) and not 0 <= value < math.inf:
            yield Problem(key, f"{value} must be a number from 0 on")
    template = config.data.prompt_template
    if isinstance(text, str) and "{question}" not in text:
        yield Problem("template_text", "has no {question}")
    elif isinstance(text, str) and (template is None or template in TEMPLATES):
        yield Problem("template_text", f"does not belong to {TEMPLATE}: {template}")
    elif text is None and template is not None and template not in TEMPLATES:
        yield Problem(TEMPLATE, f"{template!r} is not known, and no template_text comes with it")
    if template is not None and (not template.isprintable() or "/" in template or len(template) > 100):
        yield Problem(TEMPLATE, f"{template[:100]!r} is not a template's name")


def _set(config: Config, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    place: Any = config
    for section in sections:
        if getattr(place, section) is None:  # eval_sampling_params
            setattr(place, section, SamplingParams())
        place = getattr(place, section)
    setattr(place, name, list(value) if isinstance(value, list) else value)


def _section(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(f"{prefix}."): value for key, value in values.items() if key.startswith(f"{prefix}.")}


def _shown(value: Any) -> str:
    """Format a value for people, without control characters and not too long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _from_hub(name: str) -> Path | None:
    """Find the file of a hub model, in the cache or on the hub; None if it has none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        cached = try_to_load_from_cache(name, FILE)
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(name, FILE, etag_timeout=5)) if cached is None else None
    except LocalEntryNotFoundError:
        print(f"{name}: whether it has a {FILE} is not known, the hub cannot be reached", file=sys.stderr)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        pass  # a model that does not exist is reported when it is loaded
    except (OSError, ValueError) as error:
        print(f"{name}: whether it has a {FILE} is not known ({type(error).__name__})", file=sys.stderr)
    return None
