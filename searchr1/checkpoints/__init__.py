"""Model shapes, tensor names, checkpoint files and Hugging Face folders, and the conversions between them."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.checkpoints.manifest import latest_checkpoint, verify_checkpoint
    from searchr1.checkpoints.to_hf import fsdp2hf, mg2hf
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "manifest": ["latest_checkpoint", "verify_checkpoint"],
            "to_hf": ["fsdp2hf", "mg2hf"],
        },
    )

__all__ = [
    "fsdp2hf",
    "latest_checkpoint",
    "mg2hf",
    "verify_checkpoint",
]
