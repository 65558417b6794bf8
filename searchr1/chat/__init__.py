"""Ask a trained model with the agent loop of training, observed while it runs."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.chat.session import Answer, Chat, ChatError
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "session": ["Answer", "Chat", "ChatError"],
        },
    )

__all__ = [
    "Answer",
    "Chat",
    "ChatError",
]
