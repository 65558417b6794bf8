"""The agent: protocol, tools, trajectory, loop."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.agent.loop import run_group, run_trajectory
    from searchr1.agent.settings import AgentSettings
    from searchr1.agent.tools import Tool, ToolResult
    from searchr1.agent.trajectory import Sample, Trajectory, Turn
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "loop": ["run_group", "run_trajectory"],
            "settings": ["AgentSettings"],
            "tools": ["Tool", "ToolResult"],
            "trajectory": ["Sample", "Trajectory", "Turn"],
        },
    )

__all__ = [
    "AgentSettings",
    "Sample",
    "Tool",
    "ToolResult",
    "Trajectory",
    "Turn",
    "run_group",
    "run_trajectory",
]
