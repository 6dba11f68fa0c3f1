"""The policy that rewards may ask, on the bundled model, against plain transformers forwards."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from urlvr_fast.rewards import RewardError
from urlvr_fast.rewards.answers import ExactAnswers, MathAnswers
from urlvr_fast.rewards.certainty import TrajectoryEntropy
from urlvr_fast.rewards.covo import CoVo, consistency_and_volatility
from urlvr_fast.rewards.cross_view import CrossViewVoting
from urlvr_fast.rewards.disparity import ProbabilityDisparity
from urlvr_fast.rewards.self_verification import SelfVerification
from urlvr_fast.trainer.base_model import bundled_model_path
from urlvr_fast.trainer.batch import build_batch
from urlvr_fast.trainer.config import LossConfig, TrainerConfig
from urlvr_fast.trainer.learner import Learner
from urlvr_fast.trainer.model import LoadedModel
from urlvr_fast.trainer.policy import Policy
from urlvr_fast.trainer.rollout import Completion
from urlvr_fast.trainer.rollout.hf import HFRollout

CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def make_policy(chat=False, **trainer):
    model = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    if chat:
        tokenizer.chat_template = CHAT
    stop = [tokenizer.eos_token_id]
    loaded = LoadedModel("bundled", model, tokenizer, torch.device("cpu"), "float32", stop, model.config.max_position_embeddings)
    rollout = HFRollout(model, dtype="float32", stop_token_ids=stop)
    learner = Learner(model, trainer=TrainerConfig(**trainer), loss=LossConfig(), dtype="float32", max_response_tokens=16)
    return Policy(loaded, rollout, learner, seed=5, chat=chat), loaded


@pytest.fixture(scope="module")
def asked():
    return make_policy()


def direct_likelihood(loaded, context, continuation, bos=True):
    """Sum of log-probs by one forward of the whole sequence, in float64 after the logits."""
    tokenizer = loaded.tokenizer
    before = ([tokenizer.bos_token_id] if bos else []) + tokenizer(context, add_special_tokens=False).input_ids
    after = tokenizer(continuation, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = loaded.model(torch.tensor([before + after]), use_cache=False).logits[0].double()
    logp = logits.log_softmax(-1)[len(before) - 1 : -1]
    return logp.gather(-1, torch.tensor(after)[:, None]).sum().item(), len(after)


def test_likelihood_is_that_of_direct_forwards(asked):
    policy, loaded = asked
    contexts = ["12+34=", "7*8=", "12+34=", "", "a {long} context: " + "5+5=10. " * 20, "7*8="]
    continuations = ["46", "56", "47", "9", "True", "56"]
    logp, tokens = policy.likelihood(contexts, continuations)
    assert logp.dtype == torch.float64
    assert tokens.dtype == torch.int64
    for index, pair in enumerate(zip(contexts, continuations, strict=True)):
        wanted, count = direct_likelihood(loaded, *pair)
        assert logp[index].item() == pytest.approx(wanted, abs=1e-5)
        assert tokens[index].item() == count
    assert logp[1] == logp[5]  # the same pair, the same number
    assert logp[0] > logp[2]  # the model knows its sums


def test_likelihood_does_not_depend_on_micro_batches(asked):
    contexts = [f"{a}+{b}=" for a in (3, 44, 91) for b in (5, 60)]
    continuations = ["8", "49", "1000", "151", "7", "True"]
    cut, _ = make_policy(micro_batch_tokens=8)
    torch.testing.assert_close(
        cut.likelihood(contexts, continuations)[0], asked[0].likelihood(contexts, continuations)[0], atol=1e-5, rtol=0
    )


def test_likelihood_refuses_what_has_no_tokens_or_no_room(asked):
    policy, loaded = asked
    with pytest.raises(RewardError, match=r"the continuation '' has no tokens"):
        policy.likelihood(["1+1="], [""])
    with pytest.raises(RewardError, match=r"room for 1024"):
        policy.likelihood(["1" * loaded.context], ["2"])
    with pytest.raises(RewardError, match=r"room for 1024"):
        policy.generate(["1" * loaded.context], 1, temperature=1.0, max_tokens=4)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        policy.likelihood(["1+1="], [])
    logp, tokens = policy.likelihood([], [])
    assert logp.shape == tokens.shape == (0,)


def test_greedy_generation_is_the_models_own(asked):
    policy, loaded = asked
    prompts = ["12+34=", "7*8=", "90-4="]
    generated = policy.generate(prompts, 1, temperature=0, max_tokens=8)
    for prompt, texts in zip(prompts, generated, strict=True):
        ids = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = loaded.model.generate(**ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
        assert texts == [loaded.tokenizer.decode(out, skip_special_tokens=True)]


def test_generation_is_cut_to_the_context(asked):
    policy, loaded = asked
    prompt = "1" * (loaded.context - 3)  # and <bos>
    [texts] = policy.generate([prompt], 2, temperature=1.0, max_tokens=500)
    assert len(texts) == 2
    assert all(len(text) <= 2 for text in texts)


def test_messages_are_rendered_as_the_run_presents_prompts(asked):
    assert asked[0].render("{2}+2=") == "{2}+2="
    policy, loaded = make_policy(chat=True)
    assert policy.render("{2}+2=") == "<|user|>{2}+2=<|assistant|>"
    # The template's text begins with what the template put there: no <bos> in front of it.
    logp, _ = policy.likelihood([policy.render("2+2=")], ["4"])
    assert logp.item() == pytest.approx(direct_likelihood(loaded, "<|user|>2+2=<|assistant|>", "4", bos=False)[0], abs=1e-5)
    with pytest.raises(RewardError, match="the context '' has no tokens"):
        policy.likelihood([""], ["4"])


def batch_of(loaded, responses, prompt="1+1=", gap=None):
    """One group whose responses are these texts, each ended by <eos>."""
    completions = []
    for text in responses:
        ids = [*loaded.tokenizer(text, add_special_tokens=False).input_ids, loaded.tokenizer.eos_token_id]
        statistics = {} if gap is None else {"prob_gap": torch.tensor([gap(k) for k in range(len(ids))], dtype=torch.float32)}
        completions.append(Completion(ids, [-1.0] * len(ids), "stop", statistics))
    prompt_ids = [loaded.tokenizer(prompt).input_ids]
    return build_batch(
        prompt_token_ids=prompt_ids, prompt_texts=[prompt], prompt_ids=[0], completions=[completions], decode=loaded.decode, temperature=1.0
    )


def test_token_spans_of_a_character_tokenizer(asked):
    policy, loaded = asked
    text = r"so \boxed{42}."
    batch = batch_of(loaded, [text, "7"])
    start = text.index("42")
    assert policy.token_span(batch, 0, start, start + 2) == (start, start + 2)
    assert policy.token_span(batch, 0, 0, len(text)) == (0, len(text))  # without <eos>
    assert policy.token_span(batch, 0, 3, 3) == (3, 3)
    assert policy.token_span(batch, 1, 0, 1) == (0, 1)


class Pieces:
    """A tokenizer whose tokens are byte strings, the way byte-level BPE cuts characters in two."""

    all_special_ids = (0,)

    def __init__(self, pieces):
        self.pieces = [b"", *pieces]


def span_of(pieces, start, end, leading_special=False):
    ids = ([0] if leading_special else []) + list(range(1, len(pieces) + 1))
    tokenizer = Pieces(pieces)

    def decode(rows):
        return [b"".join(tokenizer.pieces[i] for i in row).decode("utf-8", errors="replace") for row in rows]

    class Loaded:
        pass

    loaded = Loaded()
    loaded.tokenizer, loaded.decode = tokenizer, decode
    batch = build_batch(
        prompt_token_ids=[[9]],
        prompt_texts=["p"],
        prompt_ids=[0],
        completions=[[Completion(ids, [-1.0] * len(ids), "stop")]],
        decode=decode,
        temperature=1.0,
    )
    return Policy(loaded, None, None, 0).token_span(batch, 0, start, end), batch.completions[0]


def test_token_spans_where_tokens_and_characters_do_not_line_up():
    # A token that reaches into the span belongs to it.
    assert span_of([b"the ans", b"wer=1", b"2 ", b"ok"], 11, 13) == ((1, 3), "the answer=12 ok")
    # Three tokens make one character, and all of them are the answer's.
    crab = "蟹".encode()
    assert span_of([b"x", crab[:1], crab[1:2], crab[2:], b"y"], 1, 2) == ((1, 4), "x蟹y")
    assert span_of([b"x", crab[:1], crab[1:2], crab[2:], b"y"], 2, 3) == ((4, 5), "x蟹y")
    # What is no UTF-8 at all stays U+FFFD in the completion.
    assert span_of([b"x", b"\xff", b"4"], 2, 3) == ((2, 3), "x\ufffd4")
    # A special token at the beginning is not part of it.
    assert span_of([b"42", b"!"], 0, 2, leading_special=True) == ((1, 2), "42!")


def test_disparity_is_taken_on_the_tokens_the_policy_finds(asked):
    policy, loaded = asked
    gap = [0.01 * k for k in range(40)].__getitem__
    batch = batch_of(loaded, [r"so \boxed{42}. That is 42", "none", r"\boxed{7}"], gap=gap)
    rewards = ProbabilityDisparity(MathAnswers())(batch, policy)
    assert rewards.tolist() == pytest.approx([(0.10 + 0.11) / 2, 0.0, 0.07], abs=1e-7)


def test_self_verification_reads_the_policys_probabilities(asked):
    policy, loaded = asked
    batch = batch_of(loaded, ["2", "{3}"])

    def ask(prompt, completion, columns):
        return prompt + completion + " "

    reward = SelfVerification(ask, verdicts=("yes", "n"), threshold=None)
    wanted = []
    for completion in batch.completions:
        yes, no = (direct_likelihood(loaded, "1+1=" + completion + " ", verdict)[0] for verdict in ("yes", "n"))
        wanted.append(torch.tensor(yes).double().exp() / (torch.tensor(yes).double().exp() + torch.tensor(no).double().exp()))
    assert reward(batch, policy).tolist() == pytest.approx([float(p) for p in wanted], abs=1e-5)
    judged = SelfVerification(ask, mode="generate", max_tokens=4)(batch, policy)
    assert set(judged.tolist()) <= {0.0, 1.0}


def test_rewards_that_ask_run_on_a_real_policy(asked):
    policy, loaded = asked
    batch = batch_of(loaded, ["1+1\nis 2", "1+1\nis 3", "is 2", "?"])
    checker = ExactAnswers(r"(?s).*is (\d)")
    distance = {}
    for state in ("1+1", "1+1\nis 2", "1+1\nis 3", "is 2"):
        for answer in "23":
            logp, count = direct_likelihood(loaded, "1+1=" + state, "\nThe answer is: " + answer)
            distance[state, answer] = -logp / count
    ways = {("1+1", "1+1\nis 2"): "23", ("1+1", "1+1\nis 3"): "32", ("is 2",): "23"}
    measured = [
        consistency_and_volatility([distance[state, own] - distance[state, other] for state in states])
        for states, (own, other) in ways.items()
    ]
    two = [(c * math.cos(v), c * math.sin(v)) for c, v in (measured[0], measured[2])]
    wanted = [math.hypot(*(sum(axis) / 2 for axis in zip(*two, strict=True))), measured[1][0]]
    rewards = CoVo(checker, bound=None)(batch, policy).tolist()
    assert rewards == pytest.approx([wanted[0], wanted[1], wanted[0], 0], abs=1e-6)
    batch.columns = {"rephrased": ["2-0="] * 4}
    assert set(CrossViewVoting(ExactAnswers(r"(\d)"), max_tokens=2)(batch, policy).tolist()) <= {0.0, 1.0}


def test_scores_go_through_and_agree_with_likelihood(asked):
    policy, loaded = asked
    batch = batch_of(loaded, ["2", "17"])
    batch.sampled_logp = policy.score(batch, ("logp",))["logp"]
    total = TrajectoryEntropy(aggregate="sum")(batch)
    eos = [policy._learner.score(batch, ("logp",))["logp"][end - 1].item() for end in batch.response_cu_seqlens[1:].tolist()]
    logp, _ = policy.likelihood(["1+1="] * 2, ["2", "17"])
    assert (total.double() - torch.tensor(eos)).tolist() == pytest.approx(logp.tolist(), abs=1e-5)


def test_the_checker_and_the_policy_agree_on_exact_answers(asked):
    policy, loaded = asked
    batch = batch_of(loaded, ["46", "no answer here"], gap=lambda k: 0.5 + 0.1 * k)
    assert ProbabilityDisparity(ExactAnswers(r"(\d+)"))(batch, policy).tolist() == pytest.approx([0.55, 0.0], abs=1e-7)
