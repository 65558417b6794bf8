"""Everything that is known before a run starts: checks across keys, and the memory plan."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.preflight.check import check_config, require_valid, warnings
    from searchr1.preflight.memory_plan import MemoryPlan, plan_memory
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "check": ["check_config", "require_valid", "warnings"],
            "memory_plan": ["MemoryPlan", "plan_memory"],
        },
    )

__all__ = [
    "MemoryPlan",
    "check_config",
    "plan_memory",
    "require_valid",
    "warnings",
]
