"""vLLM's `LLMEngine` cut down to what the rollout needs. Synchronous; everything is called from one thread."""

from __future__ import annotations

import os
from typing import Any

import torch

from searchr1.agent.settings import GenerateParams
from searchr1.checkpoints.weight_check import check_model_folder
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.files.temp_folder import VLLM_BYTES, shorten_temp_folder
from searchr1.nvidia import vllm_mismatch
from searchr1.rollout.backend import Finished, OnText
from searchr1.rollout.settings import EngineSettings
from searchr1.rollout.weights import WeightManifest

_ADAPTER = "policy"
_ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM's buffers can have; smaller adapters are padded."""


class VllmBackend:
    """One in-process vLLM engine."""

    def __init__(self, model_path: str, device: Device, settings: EngineSettings) -> None:
        """Load the model.

        Raises:
            UserError: the environment forbids an in-process engine, the installed vLLM is built for another device, or the
                model's weights do not fit its config.json.
        """
        if mismatch := vllm_mismatch(device.kind):
            raise UserError(f"cluster.device: {mismatch}")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
            raise UserError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0: the rollout steps its engine in process")
        if not device.is_cuda and "OMP_NUM_THREADS" in os.environ:
            # OpenMP's thread count belongs to the calling thread, and was read when torch was imported.
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if settings.load_format == "auto":
            check_model_folder(model_path, trained=False)  # vLLM leaves some missing tensors random
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        # Registers the weight-transfer engine before the model is built.
        from searchr1.rollout import vllm_transfer

        self._settings = settings
        self._device = device
        shorten_temp_folder(VLLM_BYTES)
        arguments = engine_arguments(model_path, device, settings)
        arguments["weight_transfer_config"] = {"backend": vllm_transfer.BACKEND}
        arguments["worker_extension_cls"] = f"{vllm_transfer.__name__}.{vllm_transfer.WorkerExtension.__name__}"
        self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments), enable_multiprocessing=False)
        self._core = self._llm.engine_core.engine_core
        self._tokenizer = self._llm.get_tokenizer() if settings.detokenize else None
        # vLLM appends random characters to request ids; these map ours to its own.
        self._internal_ids: dict[str, str] = {}
        self._listeners: dict[str, OnText] = {}
        self._adapter: Any = None
        self._decoded_at_end: set[str] = set()
        self._ended: list[Finished] = []

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished: until its last output has come back, not only until it was computed."""
        return bool(self._llm.has_unfinished_requests())

    def add(self, request_id: str, prompt_ids: list[int], params: GenerateParams, on_text: OnText | None = None) -> None:
        """Queue a generation; with `on_text`, `step` passes on its text so far.

        Raises:
            ValueError: the prompt is empty or too long, or the parameters make no sense.
        """
        if (params.stop or on_text) and self._tokenizer is None:
            raise ValueError("stop strings and texts that grow need rollout.detokenize: True")
        if len(prompt_ids) >= self._settings.max_model_len:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room in max_model_len={self._settings.max_model_len}"
            )
        self._submit(request_id, prompt_ids, _sampling_params(params, streams=on_text is not None))
        if on_text is not None:
            self._listeners[request_id] = on_text
            # Detokenized for the listener only: what comes back is the text that it would be without one.
            if not params.stop:
                self._decoded_at_end.add(request_id)

    def add_scoring(self, request_id: str, token_ids: list[int]) -> None:
        """Queue the scoring of given tokens; `Finished.prompt_logprobs` will hold one value per token.

        Raises:
            ValueError: the sequence is empty or does not fit (scoring samples one more token).
        """
        if not 0 < len(token_ids) < self._settings.max_model_len:
            raise ValueError(
                f"cannot score {len(token_ids)} tokens: between 1 and max_model_len - 1 = "
                f"{self._settings.max_model_len - 1} fit"
            )
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            flat_logprobs=True,
            skip_reading_prefix_cache=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._submit(request_id, token_ids, sampling)

    def step(self) -> list[Finished]:
        """Run the model once for everything queued or running; return what ended.

        On a GPU a step hands one batch to the device and returns what the batch before it brought.
        """
        finished = []
        # Requests without a listener are in here only once they have ended.
        for output in self._llm.step():
            if output.finished:
                finished.append(self._finish(output))
            elif output.request_id in self._listeners:
                self._listeners[output.request_id](output.outputs[0].text)
        return finished

    def take_ended(self) -> list[Finished]:
        """Return what ended outside of `step`, once."""
        ended, self._ended = self._ended, []
        return ended

    def abort(self, request_ids: list[str]) -> list[Finished]:
        """End requests at once; return what they had generated so far. Unknown ids are ignored.

        What is on the device is waited for: a request that it ends is in `take_ended`, not here.
        """
        if self._core.batch_queue:
            self._settle()
            self._resume()
        partial = []
        for request_id in request_ids:
            self._listeners.pop(request_id, None)
            self._decoded_at_end.discard(request_id)
            internal = self._internal_ids.pop(request_id, None)
            state = self._llm.output_processor.request_states.get(internal) if internal else None
            if internal is None or state is None:
                continue
            logprobs = state.logprobs_processor.logprobs
            token_ids = list(state.detokenizer.output_token_ids)
            partial.append(
                Finished(
                    request_id=request_id,
                    token_ids=token_ids,
                    logprobs=list(logprobs.logprobs) if logprobs is not None else [],
                    text=self._decode(token_ids),
                    finish_reason="abort",
                    prompt_tokens=state.prompt_len,
                    cached_tokens=0,
                    prompt_logprobs=None,
                )
            )
            self._llm.abort_request([internal], internal=True)
        return partial

    def load_weights(self, bucket: WeightManifest) -> list[str]:
        """Replace the weights, in one call or several. Running requests go on with the new ones, caches recomputed.

        Returns:
            What made it slower than it should be, as sentences; empty before the last bucket.
        """
        if bucket.first:
            self._settle()
        done = False
        warnings: list[str] = []
        try:
            if bucket.first:
                self._llm.collective_rpc("start_weight_update")
            self._llm.collective_rpc("update_weights", args=({"bucket": bucket},))
            if bucket.last:
                self._llm.collective_rpc("finish_weight_update")
                warnings = [text for worker in self._llm.collective_rpc("take_weight_warnings") for text in worker]
                self._forget_cache()
                self._llm.set_weight_version(str(bucket.version))
            done = not bucket.last  # the next part follows; nothing runs until then
        finally:
            if not done:
                self._resume()
        return warnings

    def load_adapter(self, folder: str, version: int) -> None:
        """Put a LoRA adapter in the place of the one before. Running requests go on with the new one, caches recomputed.

        Args:
            folder: as peft writes it; it is not needed afterwards.
            version: of the policy.
        """
        from vllm.lora.request import LoRARequest

        self._settle()
        try:
            # Always the same id, so that requests which run take the new one over.
            if not self._llm.add_lora(LoRARequest(_ADAPTER, 1, folder, load_inplace=True)):
                raise RuntimeError(f"vLLM did not take the adapter of version {version}")
            self._adapter = LoRARequest(_ADAPTER, 1, folder)
            self._forget_cache()
            self._llm.set_weight_version(str(version))
        finally:
            self._resume()

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values; running requests are prefilled again."""
        self._settle()
        try:
            self._forget_cache()
        finally:
            self._resume()

    def sleep(self, level: int) -> None:
        """Hand memory back: level 1 keeps the weights in host memory, level 2 drops them (an update must follow).

        Raises:
            RuntimeError: the engine's memory is not in vLLM's sleep allocator.
        """
        if not self._device.is_cuda:
            return  # host memory is shared as it is
        if not self._settings.sleep_mode:
            raise RuntimeError("an engine that is to sleep must be started with EngineSettings.sleep_mode")
        self._settle()
        self._llm.sleep(level=level, mode="keep")

    def wake(self, tags: tuple[str, ...]) -> None:
        """Take the memory of `tags` again."""
        if self._device.is_cuda:
            self._llm.wake_up(list(tags))

    def close(self) -> None:
        """Free the engine."""
        self._llm.engine_core.shutdown()

    def _settle(self) -> None:
        """Schedule no more, and wait for the steps already handed to the device; what they end is in `take_ended`.

        GPU engines run one batch ahead of the outputs. Emptying the cache before they are in would drop their tokens.
        """
        self._core.pause_scheduler(mode="keep", clear_cache=False)
        while self._core.batch_queue:
            self._ended += self.step()

    def _resume(self) -> None:
        """Schedule again, unless part of the memory is still handed back: waking up schedules then."""
        if not self._core.model_executor.is_sleeping:
            self._core.resume_scheduler()

    def _forget_cache(self) -> None:
        self._llm.reset_prefix_cache(reset_running_requests=True)

    def _submit(self, request_id: str, prompt_ids: list[int], sampling: Any) -> None:
        from vllm.inputs.engine import tokens_input

        internal = self._llm.add_request(request_id, tokens_input(prompt_ids), sampling, lora_request=self._adapter)
        self._internal_ids[request_id] = internal
        # Per-token strings of the log-probabilities are never read, and cost more than detokenizing itself.
        self._llm.output_processor.request_states[internal].logprobs_processor.tokenizer = None

    def _finish(self, output: Any) -> Finished:
        self._internal_ids.pop(output.request_id, None)
        self._listeners.pop(output.request_id, None)
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        text = "" if output.request_id in self._decoded_at_end else completion.text
        self._decoded_at_end.discard(output.request_id)
        prompt_logprobs = None
        if output.prompt_logprobs is not None:
            # The first token has nothing before it, and no entry.
            prompt_logprobs = [0.0, *output.prompt_logprobs.logprobs]
        return Finished(
            request_id=output.request_id,
            token_ids=token_ids,
            logprobs=list(completion.logprobs.logprobs) if completion.logprobs is not None else [],
            text=text or self._decode(token_ids),
            finish_reason="length" if completion.finish_reason == "length" else "stop",
            prompt_tokens=len(output.prompt_token_ids or ()),
            cached_tokens=output.num_cached_tokens or 0,
            prompt_logprobs=prompt_logprobs,
        )

    def _decode(self, token_ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


def engine_arguments(model_path: str, device: Device, settings: EngineSettings) -> dict[str, Any]:
    """vLLM's `EngineArgs` for these settings on this device."""
    arguments: dict[str, Any] = {
        "model": model_path,
        "trust_remote_code": False,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "enable_chunked_prefill": settings.enable_chunked_prefill and device.chunked_prefill,
        "load_format": settings.load_format,
        "skip_tokenizer_init": not settings.detokenize,
        # The default reports the raw distribution, without the temperature.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        **device.engine_kwargs(settings.kv_cache_bytes, settings.enforce_eager, settings.sleep_mode),
    }
    if settings.adapter_rank:
        rank = next(rank for rank in _ADAPTER_RANKS if rank >= settings.adapter_rank)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}
    if not arguments["enable_chunked_prefill"]:
        arguments["max_num_batched_tokens"] = max(settings.max_num_batched_tokens, settings.max_model_len)
    # Each running sequence takes at least one token of a step: vLLM refuses more of them, which could not run.
    arguments["max_num_seqs"] = min(settings.max_num_seqs, arguments["max_num_batched_tokens"])
    if settings.block_size is not None:
        arguments["block_size"] = settings.block_size
    if settings.executor_backend is not None and settings.tensor_parallel_size * settings.pipeline_parallel_size > 1:
        arguments["distributed_executor_backend"] = settings.executor_backend
    return arguments


def _sampling_params(params: GenerateParams, streams: bool = False) -> Any:
    """vLLM's sampling parameters; `streams`: outputs while the request goes on."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if params.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {params.max_new_tokens}")
    return SamplingParams(
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        # Recipes write 1000000 for "off".
        top_k=0 if params.top_k < 0 or params.top_k >= 1_000_000 else params.top_k,
        repetition_penalty=params.repetition_penalty,
        # Seeds may be any integer; vLLM takes 64 bits.
        seed=None if params.seed is None else params.seed % (1 << 63),
        stop=list(params.stop) or None,
        include_stop_str_in_output=True,
        # Tags may be special tokens of a tokenizer; the text must show them.
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        detokenize=bool(params.stop) or streams,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.CUMULATIVE if streams else RequestOutputKind.FINAL_ONLY,
    )
