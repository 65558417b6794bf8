"""Worker groups on Ray, started through RLinf's scheduler; no algorithm lives here."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.cluster.launch import EvaluationCluster, TrainingCluster, evaluation_cluster, training_cluster
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "launch": ["EvaluationCluster", "TrainingCluster", "evaluation_cluster", "training_cluster"],
        },
    )

__all__ = [
    "EvaluationCluster",
    "TrainingCluster",
    "evaluation_cluster",
    "training_cluster",
]
