"""One rank of the Megatron tests: `python policy_ranks.py RANK WORLD PORT`; also the jobs' inputs and oracle."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from searchr1.agent.trajectory import Trajectory
from searchr1.config.schema import Config
from searchr1.errors import UserError
from support.host_reads import HostReads
from support.trajectories import random_trajectories

STEPS = 5


def make_config(path: str, job: dict) -> Config:
    config = Config()
    config.rollout.model.model_path = path
    config.rollout.model.precision = "fp32"
    config.runner.max_tokens_per_mbs = job.get("max_tokens", 96)
    config.algorithm.kl_beta = 0.1
    config.algorithm.calculate_entropy = True
    config.algorithm.entropy_bonus = 0.01
    config.algorithm.sampling_params.temperature = 0.8
    for name, value in job.get("lora", {}).items():
        setattr(config.actor.lora, name, value)
    for name, value in job.get("correction", {}).items():
        setattr(config.algorithm.mismatch_correction, name, value)
    config.algorithm.recompute_logprobs = job.get("recompute_logprobs", True)
    actor = config.actor
    actor.training_backend = job.get("backend", "megatron")
    actor.optim.lr = 1e-3
    actor.optim.adam_eps = 1e-3  # large, so that rounding in tiny gradients is not blown up to whole steps
    actor.lr_sched.lr_decay_style = "cosine"
    actor.lr_sched.lr_warmup_iters = 2
    actor.model.tensor_model_parallel_size = job.get("tp", 1)
    actor.model.pipeline_model_parallel_size = job.get("pp", 1)
    for name in ("sequence_parallel", "recompute_granularity", "recompute_method", "recompute_num_layers", "precision"):
        if name in job:
            setattr(actor.model, name, job[name])
    actor.model.megatron_checkpoint = job.get("megatron_checkpoint")
    actor.optim.use_distributed_optimizer = job.get("distributed_optimizer", True)
    actor.optim.overlap_grad_reduce = actor.optim.overlap_param_gather = job.get("overlap", False)
    return config


def compare_vocab_parallel() -> float:
    """Largest difference, in float64, between this rank's part of a vocabulary and the whole of it."""
    from searchr1.algorithms.entropy import logprobs_from_logits
    from searchr1.learner.megatron.vocab_parallel import vocab_parallel_logprobs

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.new_group(list(range(world)))
    worst = 0.0
    for count, seed, temperature in ((0, 0, 1.0), (1, 1, 1.0), (37, 2, 0.7), (5, 3, 3.0)):
        torch.manual_seed(seed)
        logits = 5 * torch.randn(count, 96, dtype=torch.float64)
        logits[: count // 2, 10] = -torch.inf  # a token that cannot be sampled
        targets = torch.randint(11, 96, (count,))
        weights = torch.randn(2, count, dtype=torch.float64)
        part = 96 // world
        mine = logits[:, rank * part : (rank + 1) * part].clone().requires_grad_()
        whole = logits.clone().requires_grad_()
        found = vocab_parallel_logprobs(mine, targets, rank * part, group, temperature, True)
        expected = logprobs_from_logits(whole, targets, temperature, True)
        for values in (found, expected):
            (values.logprobs_M * weights[0] + values.entropy_M * weights[1]).sum().backward()
        pairs = (
            (found.logprobs_M, expected.logprobs_M),
            (found.entropy_M, expected.entropy_M),
            (mine.grad, whole.grad[:, rank * part : (rank + 1) * part]),
        )
        worst = max([worst, *(float((a - b).detach().abs().max()) for a, b in pairs if a.numel())])
    return worst


def critic_config(path: str, job: dict | None = None) -> Config:
    """`backend`, `tp`, `pp` and so on are the actor's, which the critic follows."""
    config = make_config(path, {"backend": "fsdp"} | (job or {}))
    config.algorithm.n_minibatches = 2
    config.critic.cliprange_value = 0.1
    config.critic.optim.lr = 1e-2
    config.critic.optim.adam_eps = 1e-3
    config.critic.optim.initial_loss_scale = 4096.0  # at the default it takes some updates to come down
    return config


def critic_returns(trajectories: list[Trajectory], step: int) -> list[np.ndarray]:
    rng = np.random.default_rng([9, step])
    return [np.where(t.loss_mask, rng.normal(size=t.response_length), 0).astype(np.float32) for t in trajectories]


def run_critic(job: dict, out: Path) -> None:
    """Three steps (or those in `steps`) of two mini-batches each; with `poison`, after one with infinite returns."""
    from searchr1.device import Device
    from searchr1.learner.critic import Critic

    critic = Critic.start(critic_config(job["model"], job), Device.detect("cpu"), None)
    dp_size = torch.distributed.get_world_size(critic.backend.data_group)
    rank = torch.distributed.get_rank()
    if "load" in job:
        critic.load(Path(job["load"]))
    result: dict = {"metrics": []}
    for step in range(*job.get("steps", (0, 3))):
        trajectories, _ = random_trajectories(step)
        returns = critic_returns(trajectories, step)
        share = list(range(critic.dp_rank, len(trajectories), dp_size))
        part = [trajectories[i] for i in share]
        values = critic.values(part)
        if step == job.get("steps", (0, 3))[0]:
            result["first_values"] = dict(zip(share, values, strict=True))
        result["last_values"] = dict(zip(share, values, strict=True))
        ids = [t.sample.index % 2 for t in part]
        if job.get("poison") and step == 0:
            wild = [np.where(t.loss_mask, np.inf if critic.dp_rank == 0 else 0, 0).astype(np.float32) for t in part]
            result["poisoned"] = critic.train_step(part, wild, values, ids)
        result["metrics"].append(critic.train_step(part, [returns[i] for i in share], values, ids))
    if "save" in job:
        critic.save(Path(job["save"]), job.get("background", False))
        critic.finish_save()
    named = {name: tensor.clone() for name, tensor in critic.backend.named_weights(torch.float32)}
    assert sum(tensor.numel() for tensor in named.values()) == critic.backend.parameter_count
    result["weights"] = named if rank == 0 else {}
    torch.save(result, out / f"{job['name']}-{rank}.pt")


def host_reads(policy, trajectories, advantages) -> list[str]:
    """Of the forward and backward passes of three micro-batches or more."""
    batches, watch = policy._pack(trajectories, advantages), HostReads()
    assert len(batches) >= 3
    run = policy._run

    def watched(*args):
        with watch:
            run(*args)

    with mock.patch.object(policy, "_run", watched):
        policy._accumulate(batches, trajectories)
    policy.backend.zero_grad()
    return watch.found


def run_job(job: dict, out: Path) -> None:
    """Log-probabilities, then `STEPS` training steps (or those in `steps`), with what was measured, into `out`."""
    from functools import partial

    from searchr1.device import Device
    from searchr1.learner.offload import Offload
    from searchr1.learner.policy import Policy

    if job["name"].startswith("critic-"):
        run_critic(job, out)
        return
    if job["name"].startswith("loading-"):
        from support import loading_ranks

        torch.save(loading_ranks.differences(job), out / f"{job['name']}-{os.environ['RANK']}.pt")
        return
    if job["name"] == "vocab":
        from searchr1.learner.model import init_process_group

        init_process_group(Device.detect("cpu"))
        torch.save({"worst": compare_vocab_parallel()}, out / f"vocab-{os.environ['RANK']}.pt")
        return
    policy = Policy.start(make_config(job["model"], job), Device.detect("cpu"), STEPS)
    rank, backend = torch.distributed.get_rank(), policy.backend
    layout = getattr(backend, "layout", None)
    dp_size = layout.data_parallel if layout else torch.distributed.get_world_size()
    dp_rank = layout.dp_rank(rank) if layout else rank
    result: dict = {"metrics": []}
    if job.get("offload"):  # on a CPU nobody would; the policy then moves everything out at each step's end
        kinds = ("weight", "grad", "optimizer")
        policy.offloads = {kind: Offload(partial(backend.resident, kind), keep=kind != "grad") for kind in kinds}
        result["freed"] = {}
    if job.get("fails"):
        try:
            if "load" in job:
                policy.load(Path(job["load"]))
            else:  # a disk on which no file can be larger than this
                limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
                try:
                    policy.save(Path(job["save"]), job["background"])
                    policy.finish_save()
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        except UserError as error:
            torch.save(str(error), out / f"{job['name']}-{rank}.pt")
        return
    if "load" in job:
        policy.offload("weight", "grad", "optimizer")  # as a worker does when its start ends
        policy.load(Path(job["load"]))
    for step in range(*job.get("steps", (0, STEPS))):
        trajectories, advantages = random_trajectories(step)
        share = list(range(dp_rank, len(trajectories), dp_size))
        part = [trajectories[i] for i in share], [advantages[i] for i in share]
        if step == 0:
            result["logprobs"] = dict(zip(share, policy.logprobs(part[0]), strict=True))
            if job.get("gradients"):
                result["gradients"] = gradients(policy, *part)
            if job.get("host_reads"):
                result["host_reads"] = host_reads(policy, *part)
        result["metrics"].append(policy.train_step(*part, [0] * len(share)))
        if job.get("offload"):
            policy.reload("optimizer")
            result["freed"] = {kind: offload.out() for kind, offload in policy.offloads.items()}
    if "save" in job:
        background = job.get("background", False)
        policy.save(Path(job["save"]), background)
        if background:  # what is trained meanwhile must not reach the checkpoint
            trajectories, advantages = random_trajectories(7)
            policy.train_step(trajectories[rank::2], advantages[rank::2], [0] * len(trajectories[rank::2]))
        policy.finish_save()
    policy.reload("weight")
    if job.get("backend", "megatron") == "megatron":
        from searchr1.learner.megatron.optimizer import torch_optimizers

        result["fused"] = [g["fused"] for part in torch_optimizers(backend.optimizer) for g in part.param_groups]
    named = {name: tensor.clone() for name, tensor in policy.named_weights(torch.float32)}
    shells = {name: tensor.shape for name, tensor in named.items()}
    result["shapes"], result["weights"] = shells, named if rank == 0 else {}
    assert sum(tensor.numel() for tensor in named.values()) == backend.parameter_count
    torch.save(result, out / f"{job['name']}-{rank}.pt")


def gradients(policy, trajectories, advantages) -> dict:
    """Of the first step, gathered as weights are."""
    from searchr1.learner.megatron.model import LocalParameter, gather_hugging_face

    policy._accumulate(policy._pack(trajectories, advantages), trajectories)
    backend = policy.backend
    grads = [LocalParameter(item.entry, item.parameter.main_grad) for item in backend.parameters]
    found = {n: t.clone() for n, t in gather_hugging_face(grads, backend.arch, backend.layout, backend.device)}
    backend.zero_grad()
    return found if torch.distributed.get_rank() == 0 else {}


def oracle(job: dict) -> dict:
    """The same with transformers and torch.optim alone, a sequence at a time."""
    from transformers import AutoModelForCausalLM

    from searchr1.learner.optimizer import lr_factor

    config = make_config(job["model"], job)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="eager")
    optim, algorithm = config.actor.optim, config.algorithm
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=optim.lr, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps,
    )  # fmt: skip
    factor = lr_factor(config.actor.lr_sched, optim.lr, STEPS)
    result: dict = {"metrics": []}
    for step in range(STEPS):
        trajectories, advantages = random_trajectories(step)
        tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
        loss_sum, entropy_sum = 0.0, 0.0
        logprobs = {}
        for number, (t, advantage) in enumerate(zip(trajectories, advantages, strict=True)):
            ids = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])[None]
            log_p = (model(ids).logits[0, :-1] / algorithm.sampling_params.temperature).log_softmax(-1)
            first = len(t.sample.prompt_ids) - 1
            logp = log_p.gather(-1, ids[0, 1:, None])[:, 0][first:]
            entropy = -(log_p.exp() * log_p).sum(-1)[first:]
            mask = torch.tensor(t.loss_mask)
            logprobs[number] = torch.where(mask, logp, 0.0).detach().numpy()
            d = logp - torch.tensor(t.ref_logprobs)
            kl = (-d).exp() - 1 + d
            policy = -(logp - logp.detach()).exp() * advantage
            term = policy + algorithm.kl_beta * kl - algorithm.entropy_bonus * entropy
            loss = (term * mask).sum() / tokens
            loss.backward()
            loss_sum += loss.item()
            entropy_sum += (entropy * mask).sum().item() / tokens
        if step == 0:
            result["logprobs"] = logprobs
            result["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * factor(step)
        optimizer.step()
        optimizer.zero_grad()
        result["metrics"].append({"actor/loss": loss_sum, "actor/grad_norm": float(norm), "actor/entropy": entropy_sum})
    result["weights"] = {name: p.detach() for name, p in model.named_parameters()}
    return result


class Ranks:
    """`world` processes that wait for jobs: what they import and set up is paid once."""

    def __init__(self, world: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.logs = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(world)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(world), str(port)],
                env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True,
            )
            for rank, log in enumerate(self.logs)
        ]  # fmt: skip

    def run(self, jobs: list[dict], out: Path, timeout: float) -> None:
        for process in self.processes:
            process.stdin.write(json.dumps([jobs, str(out)]) + "\n")
            process.stdin.flush()
        deadline = time.monotonic() + timeout
        for rank, process in enumerate(self.processes):
            while not (out / f"done-{rank}").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise AssertionError("".join(map(self.last_words, range(len(self.logs)))))
                time.sleep(0.02)

    def last_words(self, rank: int) -> str:
        self.logs[rank].seek(0)
        return f"\nrank {rank}:\n{self.logs[rank].read()[-6000:]}"

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        """End them and their own processes, which write checkpoints; their threads take seconds to end by themselves."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


STARTED: dict[int, Ranks] = {}
"""By their number."""


@atexit.register
def close_all() -> None:
    for ranks in STARTED.values():
        ranks.close()
    STARTED.clear()


def run(world: int, jobs: list[dict], out: Path, timeout: float = 580) -> dict[str, list[dict]]:
    """All jobs one after the other in the same `world` processes. Returns every rank's result by the job's name."""
    out.mkdir(parents=True, exist_ok=True)
    if world not in STARTED or not STARTED[world].alive():
        close_all()  # idle ones would take half a core each
        STARTED[world] = Ranks(world)
    STARTED[world].run(jobs, out, timeout)
    return {
        job["name"]: [torch.load(out / f"{job['name']}-{rank}.pt", weights_only=False) for rank in range(world)]
        for job in jobs
    }


def main() -> None:
    rank, world, port = sys.argv[1:]
    os.environ |= {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    for line in sys.stdin:
        jobs, out = json.loads(line)
        for job in jobs:
            run_job(job, Path(out))
            if "megatron.core" in sys.modules:  # the next job has another layout
                from megatron.core import parallel_state

                parallel_state.destroy_model_parallel()
        (Path(out) / f"done-{rank}").touch()


if __name__ == "__main__":
    main()
