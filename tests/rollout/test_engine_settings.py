"""From settings to vLLM's arguments."""

from __future__ import annotations

import dataclasses

import pytest

from searchr1.agent.settings import GenerateParams
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.preflight.check_backend import without_adapters
from searchr1.rollout.settings import EngineSettings
from searchr1.rollout.vllm_backend import _sampling_params, engine_arguments

CPU = Device(kind="cpu", slots=2, cores=2)
CUDA = Device(kind="cuda", slots=8, cores=64)
SETTINGS = EngineSettings(max_model_len=2048)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_argument_is_one_that_vllm_knows(device: Device) -> None:
    from vllm import EngineArgs

    settings = dataclasses.replace(
        SETTINGS, block_size=64, kv_cache_memory_gb=0.5, max_num_batched_tokens=100, executor_backend="mp"
    )
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(engine_arguments("model", device, settings)) <= known


def test_a_cpu_never_splits_a_prompt() -> None:
    arguments = engine_arguments("model", CPU, dataclasses.replace(SETTINGS, max_num_batched_tokens=100))
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] == 2048
    assert engine_arguments("model", CPU, SETTINGS)["max_num_batched_tokens"] >= 2048
    assert engine_arguments("model", CPU, SETTINGS)["block_size"] == 32


def test_a_gpu_goes_by_the_settings() -> None:
    arguments = engine_arguments("model", CUDA, dataclasses.replace(SETTINGS, max_num_batched_tokens=100))
    assert arguments["enable_chunked_prefill"] is True
    assert arguments["max_num_batched_tokens"] == 100
    off = dataclasses.replace(SETTINGS, max_num_batched_tokens=100, enable_chunked_prefill=False)
    assert engine_arguments("model", CUDA, off)["max_num_batched_tokens"] == 2048
    assert "distributed_executor_backend" not in arguments
    parallel = dataclasses.replace(SETTINGS, tensor_parallel_size=2, executor_backend="mp")
    assert engine_arguments("model", CUDA, parallel)["distributed_executor_backend"] == "mp"


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_step_is_large_enough_for_prompts_beside_many_sequences_unless_the_yaml_says_otherwise(device: Device) -> None:
    config = Config()
    arguments = engine_arguments("model", device, EngineSettings.from_config(config))
    assert (arguments["max_num_batched_tokens"], arguments["max_num_seqs"]) == (8192, 256)
    config.runner.seq_length, config.rollout.max_running_requests = 500, 32
    config.rollout.vllm.max_num_batched_tokens = 1024
    arguments = engine_arguments("model", device, EngineSettings.from_config(config))
    assert (arguments["max_num_batched_tokens"], arguments["max_num_seqs"]) == (1024, 32)
    few = EngineSettings(max_model_len=2048, max_num_batched_tokens=100)
    assert engine_arguments("model", CUDA, few)["max_num_seqs"] == 100


def test_settings_from_a_config() -> None:
    config = Config()
    config.runner.seq_length = 777
    config.runner.step_timeout_s = 99.0
    config.runner.seed = 5
    config.rollout.model.precision = "fp32"
    config.rollout.max_running_requests = 9
    config.rollout.vllm.max_num_batched_tokens = 1000
    config.rollout.vllm.kv_cache_memory_gb = 0.5
    config.rollout.vllm.enable_prefix_caching = False
    settings = EngineSettings.from_config(config)
    assert settings == EngineSettings(
        max_model_len=777,
        dtype="float32",
        seed=5,
        kv_cache_memory_gb=0.5,
        enable_prefix_caching=False,
        max_num_batched_tokens=1000,
        max_num_seqs=9,
        executor_backend="mp",
        request_timeout_s=99.0,
    )
    assert settings.kv_cache_bytes == 1 << 29
    assert EngineSettings.from_config(config, sleep_mode=True) == dataclasses.replace(settings, sleep_mode=True)
    for sleeps in (False, True):
        arguments = engine_arguments("model", CUDA, dataclasses.replace(settings, sleep_mode=sleeps))
        assert arguments["enable_sleep_mode"] is sleeps
    for precision, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        config.rollout.model.precision = precision
        assert EngineSettings.from_config(config).dtype == dtype


def test_sampling_parameters() -> None:
    sampling = _sampling_params(GenerateParams(max_new_tokens=7, top_k=1_000_000, stop=("</search>",)))
    assert sampling.top_k in (0, -1)
    assert sampling.detokenize
    assert sampling.include_stop_str_in_output
    assert sampling.logprobs == 0
    assert not _sampling_params(GenerateParams(max_new_tokens=7)).detokenize
    assert _sampling_params(GenerateParams(max_new_tokens=7, top_k=5)).top_k == 5


def test_only_a_run_that_trains_adapters_makes_room_for_them() -> None:
    config = Config()
    config.actor.lora.rank, config.actor.lora.weight_update = 16, "adapter"
    assert EngineSettings.from_config(config).adapter_rank == 16
    assert EngineSettings.from_config(without_adapters(config)).adapter_rank == 0
    assert config.actor.lora.rank == 16
