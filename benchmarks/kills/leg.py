"""One start of a run: some of its processes are stopped for a while or taken away, and a signal ends it."""

from __future__ import annotations

import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kills.processes import Family, Server, shared_files, title, wait_until_gone
from searchr1.demo.demo import COLD_START, CPU_RECIPES

ROOT = Path(__file__).resolve().parents[2]

NOTICE_S = 15.0
"""How soon something has to be said, or the run to end, and how soon nothing may be left of it."""
STOP_S = 12.0
APPEAR_S = 30.0
PATIENCE_S = 150.0
"""How long a leg may take to reach its next phase, or to end after a signal, before it is given up."""
PHASES = {
    "boot": "starting training groups",
    "start": "begin ActorGroup.start",
    "rollout": "begin RolloutGroup.rollout",
    "update": "begin ActorGroup.train_step",
    "weights": "begin RolloutGroup.update_weights",
    "save": "begin ActorGroup.save",
}
"""How a phase begins: a line of the run, or a call to a group."""
AT_MOST_LATER_S = {"boot": 3.0, "start": 6.0, "rollout": 0.25, "update": 0.15, "weights": 0.02, "save": 0.05}
"""A kill comes at a random moment after a phase began."""
EXIT_CODES = {"TERM": 143, "HUP": 129, "INT": 130, "KILL": -9}
"""Of the driver, by its own signal."""
USUAL = re.compile(r"step \d+/\d+ |going on after step|starting training groups|WARNING:searchr1.training.health:")
"""Lines that a run prints without anybody's doing."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
GOES_ON = re.compile(r"going on after step (\d+)")


@dataclass(frozen=True)
class Kill:
    """What is sent to whom, and when."""

    role: str
    phase: str
    signal: str

    def __str__(self) -> str:
        return f"{self.role} {self.phase} {self.signal}"


@dataclass
class Outcome:
    """What became of it."""

    setting: str
    leg: int
    role: str
    phase: str
    signal: str
    ends: bool
    """Whether it ends the run."""
    began_after: int = 0
    """The step that the leg went on after; 0 for none."""
    step: int = 0
    """That was under way; 0 if the leg had not come so far."""
    noticed_s: float | None = None
    message: str = ""
    exit_code: int | None = None
    ended_s: float | None = None
    gone_s: float | None = None
    """Until no process was left."""
    shm: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    checkpoint: int = 0
    """The newest complete one afterwards."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """A training run that is started over and over."""

    name: str
    folder: Path
    server: Server
    steps: int
    overrides: tuple[str, ...] = ()
    program: tuple[str, ...] = (sys.executable, str(Path(__file__).with_name("driver.py")))
    """Called with a file descriptor for what phases begin, and `searchr1`'s arguments."""

    def command(self, experiment: str) -> list[str]:
        """What `searchr1` is called with."""
        settings = [
            "data.data_size=64", "algorithm.group_size=4", "data.rollout_batch_size=4", "runner.seq_length=384",
            "runner.logger.logger_backends=[]", "runner.val_check_interval=-1", "runner.val_before_train=False",
            "runner.save_interval=1", f"runner.max_steps={self.steps}", "runner.resume_dir=auto",
            # A few questions in a group of four are soon all right or all wrong.
            "runner.health.uniform_groups_max=null", "runner.health.save_unhealthy=True",
            "rollout.vllm.kv_cache_memory_gb=0.1", "tools.search.timeout_s=60", "tools.search.retries=100",
            f"runner.output_dir={self.folder}", f"runner.experiment_name={experiment}",
        ]  # fmt: skip
        return ["train", str(CPU_RECIPES.train), *settings, *self.overrides]

    def environment(self) -> dict[str, str]:
        """What it is started with."""
        return os.environ | {
            "SEARCHR1_DEMO_DIR": str(self.folder.parent),
            "SEARCHR1_SEARCH_ADDR": self.server.address,
            "SEARCHR1_COLD_START": str(COLD_START),
        }

    @property
    def run(self) -> Path:
        """The folder of the run that is killed."""
        return self.folder / "killed"


class Ended(Exception):
    """The run has ended."""


class Leg:
    """One start of `setting`, and what is done to it."""

    def __init__(self, setting: Setting, number: int, kills: list[Kill], seed: int) -> None:
        self.setting, self.number, self.kills = setting, number, kills
        self._rng = random.Random(f"{seed} {setting.name} {number}")
        self._events: queue.Queue[tuple[float, str, str]] = queue.Queue()
        self._begun = 0
        self._began_after = 0
        self.output: list[tuple[float, str]] = []

    def run(self) -> list[Outcome]:
        """Do all of it; the last kill's outcome says how the leg ended."""
        before = shared_files()
        self._start()
        outcomes: list[Outcome] = []
        try:
            for number, kill in enumerate(self.kills):
                outcome = Outcome(self.setting.name, self.number, kill.role, kill.phase, kill.signal, ends(kill))
                outcomes.append(outcome)
                try:
                    self._await_phase(kill.phase, number + 2)
                    self._strike(kill, outcome)
                except Ended:
                    outcome.problems.append("the run ended by itself before")
                    break
                except TimeoutError:
                    outcome.problems.append(f"{kill.phase} did not come within {PATIENCE_S:.0f} s")
                    break
            if not self.kills:
                self._until_end(time.monotonic() + 10 * PATIENCE_S)
        finally:
            last = outcomes[-1] if outcomes else Outcome(self.setting.name, self.number, "", "", "", True)
            self._clean_up(last, before)
        return outcomes or [last]

    def _start(self) -> None:
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [*self.setting.program, str(writing), *self.setting.command(self.setting.run.name)],
            env=self.setting.environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        self._family = Family(self._process.pid)
        threading.Thread(target=self._read, args=("mark", os.fdopen(reading, "rb")), daemon=True).start()
        threading.Thread(target=self._read, args=("line", self._process.stdout), daemon=True).start()
        threading.Thread(target=self._wait, daemon=True).start()

    def _read(self, kind: str, stream) -> None:
        for line in stream:
            self._events.put((time.monotonic(), kind, COLOUR.sub("", line.decode(errors="replace")).rstrip()))

    def _wait(self) -> None:
        code = self._process.wait()
        self._events.put((time.monotonic(), "end", str(code)))

    def _next(self, until: float) -> tuple[float, str, str]:
        """The next event; raises TimeoutError if there is none until then."""
        while True:
            try:
                event = self._events.get(timeout=max(until - time.monotonic(), 0.001))
            except queue.Empty:
                raise TimeoutError from None
            at, kind, text = event
            if kind == "line":
                self.output.append((at, text))
                if match := GOES_ON.search(text):
                    self._began_after = int(match.group(1))
            elif kind == "mark" and text == PHASES["rollout"]:
                self._begun += 1
            return event

    def _await_phase(self, phase: str, step: int) -> None:
        """Wait until a phase begins in the leg's step of that number, or a later one, and a random moment longer."""
        until = time.monotonic() + PATIENCE_S
        while True:
            _, kind, text = self._next(until)
            if kind == "end":
                self._events.put((time.monotonic(), kind, text))
                raise Ended
            if text.startswith(PHASES[phase]) and (phase in ("boot", "start") or self._begun >= step):
                break
        time.sleep(self._rng.uniform(0, AT_MOST_LATER_S[phase]))

    def _strike(self, kill: Kill, outcome: Outcome) -> None:
        outcome.began_after = self._began_after
        outcome.step = self._began_after + self._begun if self._begun else 0
        number = getattr(signal, f"SIG{kill.signal}")
        found = self._processes(kill.role)
        while not self._events.empty():  # what was said before the signal
            self._next(time.monotonic() + 1)
        struck = time.monotonic()
        if kill.role == "server":
            self.setting.server.send(number)
        else:
            if not found:
                outcome.problems.append(f"no process of {kill.role} was there")
                return
            struck = time.monotonic()
            self._rng.choice(found).send_signal(number)
        if ends(kill):
            self._until_end(struck + PATIENCE_S)
            self._say(outcome, struck, self._ended_at)
            return
        stopped = f"SIG{kill.signal}"
        try:
            self._let_pass(STOP_S)
        finally:
            self._say(outcome, struck, None)
            if kill.role == "server" and kill.signal != "STOP":
                self.setting.server.start()
            elif kill.role == "server":
                self.setting.server.send(signal.SIGCONT)
            else:
                for process in found:
                    process.send_signal(signal.SIGCONT)
        if self._process.poll() is not None:
            outcome.problems.append(f"{stopped} ended the run")

    def _processes(self, role: str) -> list[psutil.Process]:
        """Those of a role; while a run starts they may still be on their way."""
        until = time.monotonic() + APPEAR_S
        while role != "server" and time.monotonic() < until:
            if found := self._family.of(role):
                return found
            time.sleep(0.05)
        return []

    def _let_pass(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            try:
                if self._next(until)[1] == "end":
                    raise Ended
            except TimeoutError:
                return

    _ended_at: float | None = None

    def _until_end(self, until: float) -> None:
        """Wait for the end of the run; sets `_ended_at`, or leaves it None."""
        while True:
            try:
                at, kind, _ = self._next(until)
            except TimeoutError:
                return
            if kind == "end":
                self._ended_at = at
                self._let_pass_quietly()
                return

    def _let_pass_quietly(self) -> None:
        """Take in what was printed last."""
        try:
            self._let_pass(0.3)
        except Ended:
            return

    def _say(self, outcome: Outcome, struck: float, ended: float | None) -> None:
        said = [(at, text) for at, text in self.output if at >= struck and text.strip() and not USUAL.match(text)]
        times = [at for at, _ in said[:1]] + ([ended] if ended is not None else [])
        silent = outcome.role == "driver" and outcome.signal in ("KILL", "STOP")
        outcome.noticed_s = round(min(times) - struck, 1) if times and not silent else None
        words = [text for _, text in said if text.startswith("searchr1 train:")] or [text for _, text in said]
        outcome.message = words[0] if words else ""
        outcome.ended_s = round(ended - struck, 1) if ended is not None else None
        if any("Traceback" in text for _, text in said):
            outcome.problems.append("a traceback is printed")
        if not silent and (outcome.noticed_s is None or outcome.noticed_s > NOTICE_S):
            outcome.problems.append(f"noticed after {outcome.noticed_s} s")
        self._struck = struck

    _struck = 0.0

    def _clean_up(self, outcome: Outcome, before: set[str]) -> None:
        """See what is left when the run has ended, and end it if it has not."""
        killed = self.kills[-1] if self.kills else None
        if self._process.poll() is None:
            outcome.problems.append(f"still ran after {PATIENCE_S:.0f} s")
            self._family.end()
            self._process.wait()
        left = wait_until_gone(self._family, NOTICE_S)
        outcome.exit_code = self._process.returncode
        outcome.gone_s = round(time.monotonic() - self._struck, 1) if killed and not left else None
        outcome.processes = sorted({title(process) for process in left})
        self._family.end()
        wait_until_gone(self._family, NOTICE_S)
        self._family.close()
        outcome.shm = sorted(shared_files() - before)
        checkpoints = self.setting.run / "checkpoints"
        outcome.partial = sorted(path.name for path in checkpoints.glob(".partial*"))
        steps = [int(path.name.rpartition("_")[2]) for path in checkpoints.glob("global_step_*")]
        outcome.checkpoint = max(steps, default=0)
        outcome.began_after = self._began_after
        self._judge(killed, outcome)
        log = self.setting.folder / f"leg-{self.number:02}.log"
        kills = ", ".join(map(str, self.kills)) or "nothing"
        lines = [f"{at - self._struck:9.2f} {text}\n" for at, text in self.output]
        log.write_text(
            f"{kills}; seconds from the last kill\n{''.join(lines)}exit code {outcome.exit_code}\n", encoding="utf-8"
        )

    def _judge(self, killed: Kill | None, outcome: Outcome) -> None:
        if outcome.shm:
            outcome.problems.append(f"{len(outcome.shm)} files left in /dev/shm")
        if outcome.processes:
            outcome.problems.append(f"processes left: {', '.join(outcome.processes)}")
        if killed is None:
            if outcome.exit_code != 0:
                outcome.problems.append(f"exit code {outcome.exit_code} of a leg that nothing was done to")
            return
        if killed.role == "driver" and ends(killed) and outcome.exit_code != EXIT_CODES[killed.signal]:
            outcome.problems.append(f"exit code {outcome.exit_code} instead of {EXIT_CODES[killed.signal]}")
        if killed.role != "driver" and ends(killed) and (outcome.exit_code is None or outcome.exit_code <= 0):
            outcome.problems.append(f"exit code {outcome.exit_code}")
        if outcome.step and ends(killed) and outcome.checkpoint < outcome.step - 1:
            outcome.problems.append(f"step {outcome.step - 1} is lost")


def ends(kill: Kill) -> bool:
    """Whether the run is expected to end by it."""
    return kill.signal != "STOP" and kill.role != "server"
