"""searchr1: reinforcement learning of language models that reason and search."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.agent.loop import run_trajectory
    from searchr1.agent.tools import Tool, ToolResult
    from searchr1.agent.trajectory import Sample, Trajectory, Turn
    from searchr1.chat.session import Answer, Chat, ChatError
    from searchr1.config.load import ConfigError, load_config
    from searchr1.config.schema import Config
    from searchr1.errors import UserError, WorkerDied
    from searchr1.evaluation.evaluate import evaluate
    from searchr1.retrieval.client.client import SearchClient, SearchUnavailable
    from searchr1.retrieval.documents import RetrievedDocument
    from searchr1.rewards.answers import answer_of, exact_match, f1_score, substring_match
    from searchr1.training.train import train
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "agent.loop": ["run_trajectory"],
            "agent.tools": ["Tool", "ToolResult"],
            "agent.trajectory": ["Sample", "Trajectory", "Turn"],
            "chat.session": ["Answer", "Chat", "ChatError"],
            "config.load": ["ConfigError", "load_config"],
            "config.schema": ["Config"],
            "errors": ["UserError", "WorkerDied"],
            "evaluation.evaluate": ["evaluate"],
            "retrieval.client.client": ["SearchClient", "SearchUnavailable"],
            "retrieval.documents": ["RetrievedDocument"],
            "rewards.answers": ["answer_of", "exact_match", "f1_score", "substring_match"],
            "training.train": ["train"],
        },
    )

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Chat",
    "ChatError",
    "Config",
    "ConfigError",
    "RetrievedDocument",
    "Sample",
    "SearchClient",
    "SearchUnavailable",
    "Tool",
    "ToolResult",
    "Trajectory",
    "Turn",
    "UserError",
    "WorkerDied",
    "__version__",
    "answer_of",
    "evaluate",
    "exact_match",
    "f1_score",
    "load_config",
    "run_trajectory",
    "substring_match",
    "train",
]
