"""Build a Megatron model from a Hugging Face folder, and give its weights back under Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.checkpoints.hf_folder import StoredWeights, local_folder
from searchr1.checkpoints.mapping import VALUE_HEAD, Entry, checkpoint_name, entries
from searchr1.checkpoints.model_shape import ModelShape, rotary_frequencies
from searchr1.config.layout import Layout
from searchr1.config.schema_model import ActorModelConfig
from searchr1.device import Device

PARAMETER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_config(arch: ModelShape, layout: Layout, settings: ActorModelConfig, device: Device) -> Any:
    """Return Megatron's configuration of one rank's model."""
    from megatron.core.transformer import TransformerConfig

    dtype = PARAMETER_DTYPES[settings.precision]
    on_gpu = device.is_cuda
    return TransformerConfig(
        num_layers=arch.num_hidden_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.intermediate_size,
        layernorm_epsilon=arch.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        sequence_parallel=settings.sequence_parallel and layout.tensor_parallel > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default rejects variable lengths, also without experts
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        recompute_granularity=settings.recompute_granularity,
        recompute_method=settings.recompute_method if settings.recompute_granularity == "full" else None,
        recompute_num_layers=settings.recompute_num_layers if settings.recompute_granularity == "full" else None,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        batch_p2p_comm=on_gpu,
        batch_p2p_sync=False,
        overlap_p2p_comm=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,  # Transformer Engine's
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
    )


def build_model(
    arch: ModelShape, hf_config: Any, layout: Layout, settings: ActorModelConfig, device: Device, max_tokens: int
) -> Any:
    """Return one rank's part of the model, its weights not yet set."""
    from megatron.core import parallel_state

    from searchr1.learner.megatron.modules import PolicyModel, ValueModel, layer_spec

    config = transformer_config(arch, layout, settings, device)
    model = (ValueModel if arch.value_head else PolicyModel)(
        config=config,
        transformer_layer_spec=layer_spec(config, arch.num_hidden_layers // layout.pipeline_parallel),
        vocab_size=arch.padded_vocab,
        max_sequence_length=max_tokens,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=hf_config.rope_parameters["rope_theta"],
    )
    model.rotary_pos_emb.inv_freq = rotary_frequencies(hf_config).to(device.torch_device())
    return model.to(device.torch_device(), PARAMETER_DTYPES[settings.precision])


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter of this rank and the table's entry for it."""

    entry: Entry
    parameter: torch.nn.Parameter


def local_parameters(model: Any, arch: ModelShape, first_layer: int) -> list[LocalParameter]:
    """Return every parameter of this rank, once; an output layer tied to another stage's embedding stands for that.

    Raises:
        RuntimeError: a parameter that is not in the table, or of another shape.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    table = {entry.name: entry for entry in entries(arch)}
    size = parallel_state.get_tensor_model_parallel_world_size()
    local = []
    for name, parameter in model.named_parameters():
        stored = checkpoint_name(_global_name(name, first_layer))
        if stored == "output_layer.weight" and arch.tied:
            stored = "embedding.word_embeddings.weight"
        entry = table.get(stored)
        if entry is None or entry.local_shape(size) != tuple(parameter.shape):
            raise RuntimeError(f"{name} {tuple(parameter.shape)} is not in the mapping of {arch.family}")
        if entry.kind != "copy" and not hasattr(parameter, "tensor_model_parallel"):
            # Megatron marks parameters when it initialises them, which it does not here; the gradient's norm needs it.
            set_tensor_model_parallel_attributes(parameter, True, 1 if entry.kind == "columns" else 0, 1)
        local.append(LocalParameter(entry, parameter))
    return local


def load_hugging_face(parameters: list[LocalParameter], folder: str | Path, arch: ModelShape) -> None:
    """Fill this rank's parameters from safetensors, reading only what they need; a value head stays as it is.

    Raises:
        UserError: a tensor is missing, misshapen or cut short; names it.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with ExitStack() as stack, torch.no_grad():
        weights = stack.enter_context(StoredWeights.open(local_folder(folder), pickles=False))
        weights.check(arch)
        for item in parameters:
            if item.entry.name == VALUE_HEAD:
                continue
            item.parameter.copy_(item.entry.read(weights.read, rank, size))


def _global_name(name: str, first_layer: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def first_layer_of_stage(arch: ModelShape, layout: Layout) -> int:
    """Return how many layers the stages before this rank's have."""
    from megatron.core import parallel_state

    stage: int = parallel_state.get_pipeline_model_parallel_rank()
    return stage * (arch.num_hidden_layers // layout.pipeline_parallel)


def gather_hugging_face(
    parameters: list[LocalParameter], arch: ModelShape, layout: Layout, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield full tensors on rank 0, empty shells on the others, which must run along. A tied output layer is left out.

    Tensor-parallel parts are joined by the stage that has them and sent on to rank 0, by the first data-parallel rank alone.
    At no time does a rank hold more than one full tensor that is not its own.
    """
    from megatron.core import parallel_state

    rank = dist.get_rank()
    group = parallel_state.get_tensor_model_parallel_group()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mine = {item.entry.name: item.parameter for item in parameters}
    layers_per_stage = arch.num_hidden_layers // layout.pipeline_parallel
    dtype = parameters[0].parameter.dtype
    for entry in entries(arch):
        owner = _stage_of(entry.name, layers_per_stage, layout.pipeline_parallel)
        whole: dict[str, Tensor] = {}
        if stage == owner and layout.dp_rank(rank) == 0:
            whole = dict(entry.to_hugging_face(_tensor_parallel_parts(entry, mine[entry.name].detach(), group)))
        for name, shape in zip(entry.sources, entry.shapes, strict=True):
            if rank == 0 and stage != owner:
                whole[name] = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(whole[name], owner * layout.tensor_parallel * layout.data_parallel)
            elif whole and stage != 0 and group.rank() == 0:
                dist.send(whole[name].contiguous(), 0)
            yield name, whole[name] if rank == 0 else torch.empty(shape, dtype=dtype, device="meta")


def _tensor_parallel_parts(entry: Entry, part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if entry.kind == "copy" or group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def _stage_of(name: str, layers_per_stage: int, stages: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) // layers_per_stage
    return 0 if name.startswith("embedding.") else stages - 1
