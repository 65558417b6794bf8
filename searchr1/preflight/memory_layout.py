"""How a run spreads its model over GPUs: the keys of a YAML that the memory plan depends on. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from searchr1.checkpoints.model_shape import ModelShape
from searchr1.config.layout import group_ranks, group_slots
from searchr1.config.schema import Config
from searchr1.config.schema_model import ActorConfig
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.learner.trainer_config import TrainerConfig

PRECISION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of a number in each precision."""
PROBES = 8
"""Prompts of the probe of the first weight update (runner/train.py)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run spreads a model over GPUs."""

    backend: str = "fsdp"
    gpus: int = 8
    """Ranks of the actor."""
    tp: int = 1
    pp: int = 1
    compute_bytes: int = 2
    """Of a number in the precision that the actor computes in."""
    distributed_optimizer: bool = True
    sequence_parallel: bool = False
    recompute: str = "none"
    """`none`, `selective` or `full`."""
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    offload_weight: bool = False
    """In host memory while the engine generates; `offload_grad` and `offload_optimizer` likewise."""
    offload_grad: bool = False
    offload_optimizer: bool = False
    reshard: bool = True
    """FSDP: free a layer's gathered weights between forward and backward."""
    cpu_offload: bool = False
    """FSDP: shards and optimizer state always in host memory."""
    max_tokens: int = 11008
    """Of a micro-batch."""
    loss_bytes: int = 256 << 20
    """Four fp32 copies of the logits that the loss works on at a time (algorithms/entropy.py)."""
    policy_share: float = 1.0
    """Of these tokens, at most so many reach the output layer."""
    reference: bool = True
    """A frozen model, sharded with FSDP2 over `reference_gpus` that are also the actor's."""
    reference_gpus: int = 8
    lora_rank: int = 0
    """FSDP: above 0 only adapters of this rank are trained."""
    lora_targets: tuple[str, ...] = ()
    adapter_updates: bool = False
    """The engine gets adapters instead of merged weights."""
    base_bytes: int = 4
    """FSDP: of a number of the weights as they are held; 4 unless they are frozen."""
    critic: Layout | None = None
    """How a value model of the same shape is sharded, with its optimizer; None: there is none."""
    section: str = "actor"
    """Of the YAML, for messages."""
    shared: bool = True
    """Actor and rollout share GPUs: the engine sleeps while the actor trains."""
    engine_share: float = 0.75
    engine_tp: int = 1
    """GPUs of one engine."""
    engine_bytes: int = 2
    """Of a number in the engine's precision."""
    engine_eager: bool = False
    """No CUDA graphs."""
    engine_cache: int | None = None
    """Bytes of the engine's cache, if a size is given instead of `engine_share`."""
    longest: int = 0
    """Tokens of a trajectory; one must fit into the engine's cache."""
    probe_tokens: int = 0
    """Of the probe of the first weight update; 0: there is none."""
    reference_apart: bool = False
    """There is a reference model on GPUs that are not the actor's."""
    reference_by_engine: bool = False
    """And engines are on its GPUs."""
    critic_apart: bool = False
    """The critic is on GPUs that are not the actor's."""

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.tp * self.pp)

    def check(self, model: ModelShape) -> None:
        """Refuse a layout that the model or the GPUs cannot be cut into.

        Raises:
            UserError: names the key and the numbers.
        """
        tp_key, pp_key = (f"{self.section}.model.{name}_model_parallel_size" for name in ("tensor", "pipeline"))
        if min(self.tp, self.pp, self.max_tokens) < 1:
            raise UserError(f"{tp_key}, {pp_key} and runner.max_tokens_per_mbs: must be 1 or more")
        if self.gpus % (self.tp * self.pp):
            raise UserError(
                f"{tp_key} x {pp_key} = {self.tp} x {self.pp} does not divide the {self.section}'s {self.gpus} GPUs "
                "(cluster.component_placement, cluster.slots)"
            )
        for name, size in (
            ("num_attention_heads", model.num_attention_heads),
            ("num_key_value_heads", model.num_key_value_heads),
            ("intermediate_size", model.intermediate_size),
            ("the padded vocabulary", model.padded_vocab),
        ):
            if size % self.tp:
                raise UserError(tp_key, f"{self.tp} does not divide {name} = {size} of the model")
        if model.num_hidden_layers % self.pp:
            raise UserError(pp_key, f"{self.pp} does not divide num_hidden_layers = {model.num_hidden_layers} of the model")
        if self.critic is not None:
            self.critic.check(model)

    def both(self, **changes: Any) -> Layout:
        """Change keys that concern actor and critic alike."""
        return replace(self, **changes, critic=self.critic and replace(self.critic, **changes))

    def variants(self) -> list[tuple[str, Layout]]:
        """Return a copy with one key changed."""
        more = replace(self.both(gpus=2 * self.gpus), reference_gpus=2 * self.reference_gpus)
        changes: list[tuple[str, Layout]] = [
            (f"runner.max_tokens_per_mbs: {self.max_tokens // 2}", self.both(max_tokens=self.max_tokens // 2)),
            ("algorithm.kl_beta: 0 (no reference model)", replace(self, reference=False)),
            ("cluster.component_placement: actor on twice the GPUs", more),
            ("cluster.component_placement: rollout on other GPUs", replace(self, shared=False)),
        ]
        offloads = {
            "offload_optimizer": self.both(offload_optimizer=True),
            "offload_weight": self.both(offload_weight=True),
            "offload_grad": self.both(offload_grad=True),
        }
        known = ActorConfig.__dataclass_fields__
        changes += [(f"actor.{name}: True", changed) for name, changed in offloads.items() if name in known]
        share = round(self.engine_share - 0.1, 2)
        if share > 0.2:
            changes.append((f"rollout.gpu_memory_utilization: {share:g}", replace(self, engine_share=share)))
        if self.engine_cache is not None:
            half = self.engine_cache // 2
            changes.append((f"rollout.vllm.kv_cache_memory_gb: {half / (1 << 30):g}", replace(self, engine_cache=half)))
        for size in (2, 4, 8):
            if size > self.engine_tp and self.gpus % size == 0:
                changes.append((f"rollout.tensor_parallel_size: {size}", replace(self, engine_tp=size)))
        full: dict[str, Any] = {"recompute": "full", "recompute_method": "uniform", "recompute_layers": 1}
        if self.critic is not None:
            changes.append(("critic.gradient_checkpointing: True", replace(self, critic=replace(self.critic, **full))))
        if self.backend != "megatron":
            return [
                *changes,
                ("actor.model.gradient_checkpointing: True", replace(self, **full)),
                ("actor.fsdp.cpu_offload: True", self.both(cpu_offload=True)),
                ("actor.fsdp.reshard_after_forward: True", self.both(reshard=True)),
            ]
        # A critic that is cut like the actor is taken to follow it.
        follows = self.critic is not None and (self.critic.backend, self.critic.tp, self.critic.pp) == (
            self.backend,
            self.tp,
            self.pp,
        )
        change = self.both if follows else partial(replace, self)
        return [
            *changes,
            ("actor.model.recompute_granularity: full", replace(self, **full)),
            (f"actor.model.tensor_model_parallel_size: {2 * self.tp}", change(tp=2 * self.tp)),
            (f"actor.model.pipeline_model_parallel_size: {2 * self.pp}", change(pp=2 * self.pp)),
            ("actor.model.sequence_parallel: True", change(sequence_parallel=self.tp > 1)),
            ("actor.optim.use_distributed_optimizer: True", replace(self, distributed_optimizer=True)),
        ]


def layout_of(
    config: Config, gpus: int, policy_share: float = 1.0, section: str = "actor", device: Device | None = None
) -> Layout:
    """Return the layout that a run's YAML asks for.

    Args:
        config: of the run.
        gpus: what `all` means in `cluster.component_placement`.
        policy_share: of a micro-batch's tokens, those that the policy sampled, at most.
        section: `actor` or `critic`.
        device: where the groups run, if not on that many GPUs.

    Raises:
        UserError: a placement that does not fit, or a value that is not known.
    """
    trainer = TrainerConfig.for_critic(config) if section == "critic" else TrainerConfig.for_actor(config)
    model, lora, rollout = trainer.model, trainer.lora, config.rollout
    if model.precision not in PRECISION_BYTES:
        raise UserError("actor.model.precision", f"{model.precision!r} is not one of {', '.join(PRECISION_BYTES)}")
    backend = trainer.backend
    if backend not in ("fsdp", "megatron"):
        raise UserError(f"{section}.training_backend", f"{backend!r} is not one of fsdp, megatron")
    with_critic = section == "actor" and config.critic.use_critic_model
    critic = layout_of(config, gpus, policy_share, "critic", device) if with_critic else None
    if device is None:
        config = replace(config, cluster=replace(config.cluster, slots=gpus))
        device = Device(kind="cuda", slots=gpus, cores=1)
    slots, engine = group_slots(config, section, device), group_slots(config, "rollout", device)
    group_ranks(config, "rollout", device)  # refuses engines that do not fit
    inference = group_slots(config, "inference", device)
    megatron = backend == "megatron"
    granularity = model.recompute_granularity if megatron else "full" if model.gradient_checkpointing else None
    recompute: str = granularity or "none"
    if recompute not in ("none", "full", "selective"):
        raise UserError("actor.model.recompute_granularity", f"{recompute!r} is not one of null, full, selective")
    reference = section == "actor" and config.algorithm.kl_beta > 0
    critic_slots = group_slots(config, "critic", device) if critic is not None else slots
    layout = Layout(
        backend=backend,
        gpus=len(slots),
        tp=model.tensor_model_parallel_size if megatron else 1,
        pp=model.pipeline_model_parallel_size if megatron else 1,
        compute_bytes=PRECISION_BYTES[model.precision],
        distributed_optimizer=trainer.optim.use_distributed_optimizer,
        sequence_parallel=megatron and model.sequence_parallel,
        recompute=recompute,
        recompute_method=model.recompute_method or "uniform",
        recompute_layers=model.recompute_num_layers or 1,
        offload_weight="weight" in trainer.offloads,
        offload_grad="grad" in trainer.offloads,
        offload_optimizer="optimizer" in trainer.offloads,
        reshard=trainer.fsdp.reshard_after_forward,
        cpu_offload=trainer.fsdp.cpu_offload,
        max_tokens=config.runner.max_tokens_per_mbs,
        policy_share=policy_share,
        reference=config.algorithm.kl_beta > 0 and bool(set(inference) & set(slots)),
        reference_apart=reference and bool(set(inference) - set(slots)),
        reference_by_engine=reference and bool((set(inference) - set(slots)) & set(engine)),
        critic_apart=bool(set(critic_slots) - set(slots)),
        reference_gpus=len(inference),
        lora_rank=lora.rank,
        adapter_updates=bool(lora.rank) and lora.weight_update == "adapter",
        lora_targets=tuple(lora.target_modules) if lora.rank else (),
        base_bytes=PRECISION_BYTES[model.precision] if lora.rank and lora.base_precision == "compute" else 4,
        critic=critic,
        section=section,
        shared=bool(set(slots) & set(engine)),
        probe_tokens=PROBES * config.data.max_prompt_length if rollout.validate_weight_first_sync else 0,
    )
    return with_engine(layout, config)


def with_engine(layout: Layout, config: Config) -> Layout:
    """Fill in what a run's YAML says about its engines.

    Raises:
        UserError: a precision that is not known.
    """
    rollout, cache = config.rollout, config.rollout.vllm.kv_cache_memory_gb
    if rollout.model.precision not in PRECISION_BYTES:
        raise UserError("rollout.model.precision", f"{rollout.model.precision!r} is not one of {', '.join(PRECISION_BYTES)}")
    return replace(
        layout,
        engine_share=rollout.gpu_memory_utilization,
        engine_tp=rollout.tensor_parallel_size * rollout.pipeline_parallel_size,
        engine_bytes=PRECISION_BYTES[rollout.model.precision],
        engine_eager=rollout.enforce_eager,
        engine_cache=None if cache is None else round(cache * (1 << 30)),
        longest=config.runner.seq_length,
    )
