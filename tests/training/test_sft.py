"""Supervised fine-tuning: row shapes, masks, and a model that gets better."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import make_model

from searchr1.commands.sft import parse
from searchr1.data.model_settings import ModelSettings
from searchr1.errors import UserError
from searchr1.training.sft import trainer_config
from searchr1.training.sft_data import batches, load_rows, segments_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    from searchr1.demo.cold_start_rows import train_tokenizer

    return train_tokenizer()


def trained_text(row, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [t], too_long = load_rows([path], tokenizer, 4096)
    assert too_long == 0
    ids = [*t.sample.prompt_ids, *t.response_ids.tolist()]
    return tokenizer.decode(ids), tokenizer.decode([i for i, m in zip(ids[1:], t.loss_mask, strict=True) if m])


def test_segments_are_trained_where_they_say_so(tokenizer, tmp_path):
    parts = [("Question: who?\n", False), ("<search> x</search>", True), ("Doc 1", False), ("<answer> y</answer>", True)]
    row = {"segments": [{"text": text, "train": train} for text, train in parts]}
    whole, trained = trained_text(row, tokenizer, tmp_path)
    assert whole == "".join(text for text, _ in parts)
    assert trained == "<search> x</search><answer> y</answer>"


def test_response_and_its_end_are_trained(tokenizer, tmp_path):
    _, trained = trained_text({"prompt": "Question: who?\n", "response": "me"}, tokenizer, tmp_path)
    assert trained == "me<|im_end|>"


def test_only_assistant_messages_are_trained(tokenizer, tmp_path):
    messages = [
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "me"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "you"},
    ]
    whole, trained = trained_text({"messages": messages}, tokenizer, tmp_path)
    assert whole == "Question: who?\nmeQuestion: and?\nyou"
    assert trained == "meyou"


@pytest.mark.parametrize(
    "row",
    [{}, {"prompt": "a"}, {"segments": [{"text": "a", "train": False}]}, {"messages": [{"role": "user", "content": "a"}]}],
)
def test_rows_without_anything_to_train_on_are_reported(row, tokenizer):
    with pytest.raises(UserError):
        segments_of(row, tokenizer)


USER = {"role": "user", "content": "who?"}


def parts(text):
    return [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": parts("who?")}, {"role": "assistant", "content": parts("me")}]},
        {"messages": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]},
        {"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]},
        {"messages": json.dumps([USER, {"role": "assistant", "content": "me"}])},
        {"messages": [USER, {"role": "assistant", "content": "me", "tool_calls": None}], "prompt": "who?", "response": None},
    ],
)
def test_messages_of_other_dialects(row, tokenizer, tmp_path):
    assert trained_text(row, tokenizer, tmp_path) == ("Question: who?\nme", "me")


def test_a_weight_of_0_leaves_a_message_out_of_the_loss(tokenizer, tmp_path):
    messages = [USER, {"role": "assistant", "content": "me", "weight": 0}, USER, {"role": "assistant", "content": "you"}]
    whole, trained = trained_text({"messages": messages}, tokenizer, tmp_path)
    assert whole == "Question: who?\nmeQuestion: who?\nyou"
    assert trained == "you"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, "hello"]}, r"messages\[1\]: is 'hello'"),
        ({"messages": ["q", "a"]}, r"messages\[0\]: is 'q'"),
        ({"messages": "hello"}, "messages: is 'hello'"),
        ({"messages": [{"content": "q"}]}, r"messages\[0\]: has no role, only content"),
        ({"messages": [{"from": "robot", "value": "q"}]}, r"messages\[0\]\.from: is 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "the user's message has no content"),
        ({"messages": [{"role": "user", "content": 7}]}, r"messages\[0\]\.content: holds 7"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "a part of type image_url"),
        ({"messages": [USER, {"role": "assistant", "content": "me", "weight": 0.5}]}, r"messages\[1\]\.weight: is 0\.5"),
        ({"segments": [{"text": "a", "train": "false"}]}, r"segments\[0\]"),
        ({"segments": [{"text": None, "train": True}]}, r"segments\[0\]"),
        ({"prompt": "a", "response": 7}, "response: is 7"),
        ({"prompt": [USER], "response": "a"}, "prompt: is .*belong into messages"),
        ({"prompt": "a", "response": " "}, "nothing to train on"),
        ({"prompt": "q \ud83d", "response": "a"}, "surrogate"),
        (
            {"prompt": "a", "response": "b", "segments": [{"text": "c", "train": True}]},
            "has segments and prompt and response",
        ),
        ({"instruction": "a", "output": "b"}, "the row's columns are instruction, output"),
    ],
)
def test_what_cannot_be_trained_on_is_rejected_by_file_line_and_name(row, message, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        load_rows([path], tokenizer, 100)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "search", "arguments": "{}"}}]}
LOSES = {
    "texts": "{% for m in messages %}{{ m.role }}{{ m.content if m.content is not string }}{% endfor %}",
    "tools": "{% for m in messages if m.role != 'tool' %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "calls": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "thoughts": "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}",
    "roles": "{% for m in messages %}{{ raise_exception('no tools') if m.role == 'tool' }}{{ m.content }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("texts", [USER, {"role": "assistant", "content": "me"}], "leaves out .* the user's 'who"),
        (
            "tools",
            [USER, CALL, {"role": "tool", "content": "r!"}, {"role": "assistant", "content": "b"}],
            "'search'|tool's 'r!'",
        ),
        ("calls", [USER, CALL], "the assistant's 'search'"),
        ("thoughts", [USER, {"role": "assistant", "content": "<think>x</think>me"}], "the assistant's '<think>"),
        ("roles", [USER, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "b"}], "refuses .*no tools"),
    ],
)
def test_a_chat_template_that_leaves_something_out_is_rejected(template, messages, message, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = LOSES[template]
    with pytest.raises(UserError, match=message):
        segments_of({"messages": messages}, other)


def test_a_tools_answer_may_be_written_as_json(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.content | tojson if m.role == 'tool' else m.content }}\n{% endfor %}"
    messages = [USER, {"role": "tool", "content": 'a\n"b"'}, {"role": "assistant", "content": "c"}]
    assert [segment.text for segment in segments_of({"messages": messages}, other)] == ['who?\n"a\\n\\"b\\""\n', "c\n"]


@pytest.mark.skipif(not (CASES := ROOT.parent / "shared/cases/sft").is_dir(), reason="the reported inputs are not here")
@pytest.mark.parametrize(
    ("name", "trained"),
    [("parts_qwen3", "Tisttek Shipyard"), ("missing_role", "a"), ("messages_str", None), ("surrogate", None)],
)
def test_reported_rows(name, trained, tokenizer):
    path = CASES / f"{name}.jsonl"
    if trained is None:
        with pytest.raises(UserError, match=rf"{name}\.jsonl:1: "):
            load_rows([path], tokenizer, 4096)
        return
    [row], _ = load_rows([path], tokenizer, 4096)
    assert tokenizer.decode(row.response_ids[row.loss_mask.astype(bool)]) == trained


def test_bad_row_is_named_by_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + '\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        load_rows([path], tokenizer, 100)


def test_every_row_is_used_once_an_epoch(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "response": "b" * (i + 1)}) + "\n" for i in range(40)))
    rows, _ = load_rows([path], tokenizer, 4096)
    seen = []
    for batch in batches(rows, 60, seed=0):
        seen += [t.sample.id for t in batch]
        if len(seen) >= 36:
            break
    assert len(set(seen[:36])) == 36


def test_a_batch_larger_than_the_data_reaches_into_the_next_epoch(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    rows, _ = load_rows([path], tokenizer, 4096)
    assert len(next(batches(rows, 30, seed=0))) == 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fresh_model_learns_and_loads(tokenizer, tmp_path):
    rows = [{"prompt": f"Question: {i}?\n", "response": " Silver Harbor"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [sys.executable, "-m", "searchr1.cli", "sft", "--fresh", str(ROOT / "examples/demo/fresh_model"), "--tokenizer"]
    words += [str(tmp_path / "tokenizer"), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    words += ["--lr", "3e-3", "--tokens-per-batch", "200", "--max-steps", "40", "--device", "cpu"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-2000:]
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert losses[-1] < losses[0]
    assert "searchr1.json: template demo" in result.stdout
    assert ModelSettings.of_model(str(tmp_path / "out")).values["data.prompt_template"] == "demo"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = found("Question: 7?\n", return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert found.decode(answer) == " Silver Harbor<|im_end|>"
    again = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert again.returncode == 2
    assert "not empty" in again.stderr


RANK = """
import os, sys, torch
from searchr1.commands.sft import parse
from searchr1.training.sft import train
torch.set_num_threads(1)
losses = train(parse(sys.argv[2:]))
if os.environ["RANK"] == "0":
    torch.save(losses, sys.argv[1])
"""


def run_ranks(world, losses, flags):
    """`searchr1 sft` in `world` processes. Returns every step's loss."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(losses), *flags]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return torch.load(losses)


STEPS, LR = 4, 3e-3


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """A model, its tokenizer and uneven rows."""
    folder = tmp_path_factory.mktemp("start")
    model = make_model("qwen2", True, folder / "model", num_hidden_layers=2, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    rows = [{"prompt": f"Question: {i}?\n", "response": " Silver Harbor" * (1 + i % 5)} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags_of(start, output, *more):
    flags = ["--model", start / "model", "--data", start / "rows.jsonl", "--output", output, "--device", "cpu"]
    flags += [
        "--lr",
        LR,
        "--tokens-per-batch",
        120,
        "--max-tokens-per-mbs",
        60,
        "--max-steps",
        STEPS,
        "--save-dtype",
        "fp32",
    ]
    # A large epsilon, so that rounding in tiny gradients is not blown up to whole steps.
    return list(map(str, [*flags, "--adam-eps", 1e-3, "--warmup", 2, *more]))


def by_hand(start):
    """The same with transformers and torch.optim alone, a row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    model = AutoModelForCausalLM.from_pretrained(start / "model", dtype=torch.float32, attn_implementation="eager")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-3)
    rows, _ = load_rows([start / "rows.jsonl"], tokenizer, 4096)
    losses = []
    for step, batch in zip(range(STEPS), batches(rows, 120, seed=0), strict=False):
        count = sum(int(t.loss_mask.sum()) for t in batch)
        losses.append(0.0)
        for t in batch:
            ids = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])[None]
            each = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            loss = (each * torch.tensor(t.loss_mask)).sum() / count
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        for group in optimizer.param_groups:
            group["lr"] = LR * warm
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--backend", "fsdp"),
        ("--backend", "megatron", "--tensor-parallel", "2"),
        ("--backend", "megatron", "--pipeline-parallel", "2", "--gradient-checkpointing"),
    ],
    ids=["fsdp2", "tensor-parallel", "pipeline-parallel"],
)
def test_two_ranks_of_either_backend_equal_a_plain_loop(start, tmp_path, more):
    from transformers import AutoModelForCausalLM

    expected, weights = by_hand(start)
    losses = run_ranks(2, tmp_path / "losses.pt", flags_of(start, tmp_path / "out", *more))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in model.named_parameters():
        assert torch.allclose(tensor, weights[name], atol=1e-5), name


@pytest.mark.slow
def test_random_weights_on_megatron_are_those_of_a_plain_loop(start, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)  # the command's own
    shape = AutoConfig.from_pretrained(start / "model")
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(start / "model" / name, tmp_path / "model")
    shutil.copy(start / "rows.jsonl", tmp_path)
    expected, weights = by_hand(tmp_path)
    flags = flags_of(start, tmp_path / "out", "--backend", "megatron", "--tensor-parallel", "2")
    flags[flags.index("--model")] = "--fresh"
    losses = run_ranks(2, tmp_path / "losses.pt", [*flags, "--tokenizer", str(start / "model")])
    assert losses == pytest.approx(expected, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in model.named_parameters():
        assert torch.allclose(tensor, weights[name], atol=1e-5), name
    assert not (tmp_path / ".out.fresh").exists()


def test_adapters_are_merged_into_the_output(start, tmp_path):
    from transformers import AutoModelForCausalLM

    losses = run_ranks(1, tmp_path / "losses.pt", flags_of(start, tmp_path / "out", "--lora-rank", "4", "--lr", "0.05"))
    assert losses[-1] < losses[0] - 0.05
    after, before = (
        dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
        for path in (tmp_path / "out", start / "model")
    )
    assert set(after) == set(before)
    for name, tensor in after.items():
        change = tensor - before[name]
        if name.endswith("proj.weight"):
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 4, name
        else:
            assert not change.any(), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tensor-parallel", "2"], "need --backend megatron"),
        (["--backend", "megatron", "--lora-rank", "4"], "needs --backend fsdp"),
        (["--backend", "megatron", "--pipeline-parallel", "3"], "does not divide the 4 processes"),
    ],
)
def test_flags_that_exclude_each_other_are_reported(start, tmp_path, more, message):
    args = parse(flags_of(start, tmp_path / "out", *more))
    with pytest.raises(UserError, match=message):
        trainer_config(args, "model", world=4)


@pytest.mark.parametrize("more", [["--lora-rank", "-1"], ["--tensor-parallel", "0"], ["--lora-alpha", "0"]])
def test_sizes_that_cannot_be_are_reported(start, tmp_path, more):
    with pytest.raises(UserError, match="must be more than 0"):
        parse(flags_of(start, tmp_path / "out", *more))


def test_random_weights_are_not_frozen(tmp_path):
    flags = ["--fresh", "a", "--tokenizer", "b", "--data", "c", "--output", str(tmp_path / "out"), "--lora-rank", "4"]
    with pytest.raises(UserError, match="not worth freezing"):
        parse(flags)


@pytest.mark.slow  # two processes that import torch, and twenty steps
def test_ranks_that_are_asked_to_stop_end_with_143_and_leave_no_output(start, tmp_path):
    """As torchrun asks them: all at once, wherever each of them is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = [sys.executable, "-m", "searchr1.cli", "sft", *flags_of(start, tmp_path / "out", "--max-steps", 100_000)]
    processes = [
        subprocess.Popen(
            words,
            env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for line in processes[0].stdout:
            if line.startswith("step "):
                break
        for process in processes:
            process.terminate()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert all(output.splitlines()[-1] == "searchr1 sft: stopped by SIGTERM" for output in outputs)
    assert not list((tmp_path / "out").glob("*")), "a stopped training can be started again with the same output"
