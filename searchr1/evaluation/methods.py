"""The ways to answer that are compared: the search loop, and the baselines of the Search-R1 paper on the same engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from searchr1.agent.settings import AgentSettings
from searchr1.config.schema import Config


@dataclass(frozen=True, slots=True)
class Method:
    """One way to answer."""

    name: str
    title: str
    template: str | None
    """Its prompt (searchr1/data/templates.py); None takes the prompts that `data` describes."""
    retrieves: bool = False
    """Passages for the question itself stand in the prompt."""

    @property
    def searches(self) -> bool:
        """Whether the policy may call tools; the others answer in one generation."""
        return self.template is None


METHODS = {
    method.name: method
    for method in (
        Method("direct", "direct inference", "direct"),
        Method("cot", "chain of thought", "cot"),
        Method("rag", "RAG, one retrieval", "rag", retrieves=True),
        Method("search", "search loop", None),
    )
}


def main_method(names: Sequence[str]) -> str:
    """Return the method whose numbers `eval.json` holds: the search loop if it is among them, else the first one."""
    return "search" if "search" in names else names[0]


def agent_settings(config: Config, method: Method) -> AgentSettings:
    """Return a method's limits and sampling: greedy, unless there are several rollouts or `algorithm.eval_sampling_params`.

    Methods without tools are one generation with the whole response for it, ended by an answer.
    """
    algorithm = config.algorithm
    if algorithm.group_size > 1 and algorithm.eval_sampling_params is None:
        config = replace(config, algorithm=replace(algorithm, eval_sampling_params=algorithm.sampling_params))
    settings = AgentSettings.from_config(config, "eval")
    if method.searches:
        return settings
    stops = tuple(stop for stop in settings.sampling.stop if "</search>" not in stop and "</access>" not in stop)
    return replace(
        settings,
        max_turns=0,
        force_final_turn=True,
        max_new_tokens_per_turn=None,
        toolcall_parser="tags",
        sampling=replace(settings.sampling, stop=stops),
    )


def sampling_note(settings: AgentSettings, rollouts: int) -> str:
    """Return how rollouts are sampled, as a phrase."""
    sampling = settings.sampling
    if sampling.temperature == 0:
        if rollouts == 1:
            return "greedy"
        return f"{rollouts} greedy rollouts: all of them are the same (algorithm.sampling_params.do_sample is False)"
    return f"{rollouts} rollout{'s' if rollouts > 1 else ''}, sampled at temperature {sampling.temperature:g}" + (
        f", top_p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    )
