"""A chat whose engine samples prepared lines, beside the real loop; its search returns prepared passages."""

from __future__ import annotations

import asyncio

from searchr1.agent.loop import run_trajectory
from searchr1.agent.settings import AgentSettings, GenerateParams, Generation
from searchr1.agent.tools import AccessTool, FailureMonitor, SearchTool
from searchr1.chat.async_chat import AsyncChat, PromptSettings
from searchr1.retrieval.client.client import ClientStats, SearchUnavailable
from searchr1.retrieval.documents import Page, RetrievedDocument

ADA = RetrievedDocument("0", "Ada Lovelace", "Ada wrote the first program.", "https://w.example/Ada", 7.5)
SEARCH = "<think> Who was it?</think>\n<search> first program</search>"
ANSWER = "<think> Found it.</think>\n<answer> Ada Lovelace</answer>"


class CharTokenizer:
    """One token per character."""

    eos_token_id = 0
    chat_template = None

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class ScriptedEngine:
    """An engine that samples prepared lines for each question in turn; each grows by three characters a step."""

    def __init__(self, script, delay=0.0):
        self.script, self.delay = script, delay
        self.running = self.aborted = self.most = 0
        self.stop_reason = None
        self.error = None
        self.asked = []

    async def generate(self, prompt_ids, params, timeout_s=None, on_text=None):
        if self.error is not None:
            raise self.error
        self.asked.append(list(prompt_ids))
        prompt = "".join(map(chr, prompt_ids))
        lines = self.script[prompt.partition("Question: ")[2].partition("\n")[0]]
        line = next((line for line in lines if line not in prompt), lines[-1])[: params.max_new_tokens]
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for end in range(3, len(line), 3):
                await asyncio.sleep(self.delay)
                on_text(line[:end])
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1
        return Generation([ord(c) for c in line], [-1.0] * len(line), line, "stop", weight_version=0)


class ScriptedSearch:
    """A search backend that returns the same passages for every query."""

    def __init__(self, *documents, pages=None, error=None, delay=0.0):
        self.documents, self.pages, self.error, self.delay = list(documents), pages or {}, error, delay
        self.queries = []
        self.closed = False

    @property
    def stats(self):
        return ClientStats()

    async def search(self, queries):
        self.queries.append(list(queries))
        await asyncio.sleep(self.delay)
        if self.error:
            raise SearchUnavailable(self.error)
        return [self.documents for _ in queries]

    async def access(self, urls):
        if self.error:
            raise SearchUnavailable(self.error)
        return [Page(url, self.pages[url]) if url in self.pages else None for url in urls]

    async def aclose(self):
        self.closed = True


def make_chat(script, backend=None, *, engine=None, delay=0.0, template="demo", max_prompt=1000, **changes):
    """Return a chat; `changes` are of `AgentSettings`."""
    backend = backend or ScriptedSearch(ADA)
    engine = engine or ScriptedEngine(script, delay)
    defaults = {
        "sampling": GenerateParams(max_new_tokens=10_000),
        "max_model_len": 20_000,
        "max_turns": 2,
        "invalid_action_message": "\nThat was no action.\n",
    }
    monitor = FailureMonitor(1.0, "search")
    return AsyncChat(
        engine=engine,
        tokenizer=CharTokenizer(),
        tools={"search": SearchTool(backend, "searchr1", monitor), "access": AccessTool(backend, monitor)},
        backend=backend,
        settings=AgentSettings(**(defaults | changes)),
        prompt=PromptSettings(template, False, max_prompt),
        run=run_trajectory,
        seed=0,
        about={"model": "scripted", "search": "prepared"},
    )
