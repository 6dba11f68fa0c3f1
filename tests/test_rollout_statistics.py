"""Statistics taken while sampling, on the real engines: each completion must get those of its own tokens, whatever happens to its row."""

from __future__ import annotations

import pytest
import torch

from tests.test_rollout import disturb, load
from urlvr_fast.trainer.rollout import RolloutError, Sampling
from urlvr_fast.trainer.rollout.hf import HFRollout
from urlvr_fast.trainer.rollout.vllm import VLLMRollout

STOPS = [2, *range(20, 30)]  # many, so that completions end at different times
STATISTICS = frozenset({"entropy", "self_certainty", "prob_gap"})
SHORT = [[1, 50], [1, 20, 30, 40, 50, 60], [1, 7, 8]]
LONG = [[1, 10 + i, *range(10, 90), *range(10, 55)] for i in range(8)]  # 127 tokens, different from the second on: nothing shared


def largest_gap(model, prompts, completions, temperature):
    """Largest difference between any statistic of any token and that of one forward per completion, in float64."""
    model = model.double()
    largest = 0.0
    for prompt, group in zip(prompts, completions, strict=True):
        for c in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1]
            logp = (logits / temperature).log_softmax(-1)
            top = logp.exp().topk(2).values
            own = {
                "entropy": -(logp.exp() * logp).sum(-1),
                "self_certainty": -(logp + torch.tensor(logp.shape[-1]).log()).mean(-1),
                "prob_gap": top[:, 0] - top[:, 1],
            }
            assert c.statistics.keys() == STATISTICS
            for name, values in c.statistics.items():
                assert values.shape == (len(c.token_ids),)
                assert values.dtype == torch.float32
                largest = max(largest, (values - own[name]).abs().max().item())
    model.float()
    return largest


def vllm_engine(path, **options):
    return VLLMRollout(str(path), dtype="float32", max_model_len=200, stop_token_ids=STOPS, **options)


def core(rollout):
    return rollout._llm.llm_engine.engine_core.engine_core


@pytest.fixture(scope="module")
def vllm(tiny_model_dir):
    """Eight rows at most, and a KV cache of 10 blocks of 128 tokens: eight of LONG fit for two tokens, and then do not."""
    rollout = vllm_engine(tiny_model_dir, max_sequences=8, kv_cache_gib=10 * 2**16 / 2**30, statistics=True)
    yield rollout, load(tiny_model_dir)
    rollout.close()


@pytest.fixture(scope="module", params=["vllm", "hf"])
def engine(request, tiny_model_dir):
    if request.param == "vllm":
        return request.getfixturevalue("vllm")
    model = load(tiny_model_dir)
    return HFRollout(model, dtype="float32", stop_token_ids=STOPS, batch_prompts=2), model


@pytest.fixture
def events(monkeypatch):
    """What vLLM tells the processor about its rows, as it happens."""
    from urlvr_fast.trainer.rollout import vllm_statistics

    seen = {"added": 0, "resumed": 0, "moved": 0, "swapped": 0}
    follow = vllm_statistics.process_dict_updates

    def spy(rows, update, new_state):
        if update is not None:
            seen["added"] += len(update.added)
            seen["resumed"] += sum(bool(tokens) for *_, tokens in update.added)
            for *_, direction in update.moved:
                seen["swapped" if direction.name == "SWAP" else "moved"] += 1
        return follow(rows, update, new_state)

    monkeypatch.setattr(vllm_statistics, "process_dict_updates", spy)
    return seen


def test_statistics_follow_weights_and_temperature(engine):
    """15 completions in 8 rows, five of each prompt, which end at different times."""
    rollout, model = engine
    for update, temperature in enumerate((1.0, 0.6, 1.7)):
        disturb(model, update)
        rollout.sync(model.named_parameters(remove_duplicate=False))
        completions = rollout.generate(SHORT, Sampling(5, temperature, 12, statistics=STATISTICS), seed=update)
        assert len({len(c.token_ids) for group in completions for c in group}) > 3
        assert largest_gap(model, SHORT, completions, temperature) < 1e-4


def test_the_same_tokens_without_statistics(engine):
    rollout, _ = engine
    plain, taken = (rollout.generate(SHORT, Sampling(6, 1.0, 10, statistics=s), seed=3) for s in (frozenset(), STATISTICS))
    assert [[(c.token_ids, c.finish_reason) for c in g] for g in plain] == [[(c.token_ids, c.finish_reason) for c in g] for g in taken]
    assert not any(c.statistics for g in plain for c in g)


def test_rows_move_down_and_swap(vllm, events, monkeypatch):
    """Rows free up all over the batch, and new requests come in beside running ones. That attention wants decodes before prefills is so on
    GPUs; here vLLM is told to sort them."""
    rollout, model = vllm
    monkeypatch.setattr(core(rollout).model_executor.driver_worker.worker.model_runner, "reorder_batch_threshold", 1)
    prompts = SHORT * 3
    completions = rollout.generate(prompts, Sampling(5, 1.3, 12, statistics=STATISTICS), seed=1)
    assert events["added"] == 45
    assert events["moved"] > 0
    assert events["swapped"] > 0
    assert largest_gap(model, prompts, completions, 1.3) < 1e-4


def test_a_preempted_request_goes_on_where_it_was(vllm, events):
    rollout, model = vllm
    completions = rollout.generate(LONG, Sampling(2, 1.0, 12, statistics=STATISTICS), seed=2)
    assert events["resumed"] > 0
    assert largest_gap(model, LONG, completions, 1.0) < 1e-4


def test_a_prompt_read_in_parts(vllm, monkeypatch):
    """The row of a prompt that is not read to its end makes logits, too, and a token that is thrown away."""
    rollout, model = vllm
    monkeypatch.setattr(core(rollout).scheduler, "max_num_scheduled_tokens", 50)
    prompts = [*LONG[:3], *SHORT]
    completions = rollout.generate(prompts, Sampling(2, 1.0, 8, statistics=STATISTICS), seed=4)
    assert len(rollout._recorder._row) > sum(len(c.token_ids) for g in completions for c in g)
    assert largest_gap(model, prompts, completions, 1.0) < 1e-4


def test_a_token_without_statistics_is_an_error(vllm, monkeypatch):
    from urlvr_fast.trainer.rollout import vllm_statistics

    rollout, _ = vllm
    monkeypatch.setattr(vllm_statistics, "process_dict_updates", lambda *_: False)  # rows keep what the last call left there
    with pytest.raises(RolloutError, match=r"not seen.*rollout\.stats=recompute"):
        rollout.generate(SHORT, Sampling(5, 1.0, 12, statistics=STATISTICS), seed=0)


def test_what_has_no_statistics_is_refused(vllm, tiny_model_dir, monkeypatch):
    for changed in ({"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}):
        with pytest.raises(ValueError, match="whole vocabulary"):
            Sampling(**{"n": 1, "temperature": 1.0, "max_tokens": 4, "statistics": STATISTICS} | changed)
    monkeypatch.setattr(vllm[0], "_recorder", None)  # as in an engine that was built without
    with pytest.raises(RolloutError, match="statistics=True"):
        vllm[0].generate(SHORT, Sampling(1, 1.0, 4, statistics=STATISTICS), seed=0)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(RolloutError, match=r"VLLM_USE_V2_MODEL_RUNNER=1.*rollout\.stats=recompute"):
        vllm_engine(tiny_model_dir, statistics=True)
