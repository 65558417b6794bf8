"""The demo's tokenizer: byte-level BPE in which every word of the world is one token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from searchr1.demo import names
from searchr1.demo.demonstrations import demonstrations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer", "access") for slash in ("", "/")]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}\n"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer on every machine; any text can be encoded, the world's words take one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Words are listed often enough that whole words win over fragments, whatever the demonstrations hold.
    words = [" " + word for pools in names.WORD_POOLS.values() for pool in pools for word in pool]
    rows = demonstrations(worlds=1, questions_per_world=400, seed=99, mediocre=False)
    text = ["".join(segment["text"] for segment in row["segments"]) for row in rows]
    for tag in TAGS:
        text = [piece.replace(tag, " ") for piece in text]
    tokenizer.train_from_iterator(words * 200 + text, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(out: Path) -> None:
    """Write the tokenizer where `AutoTokenizer` finds it."""
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save_pretrained(out)
