"""The learner against plain torch: hidden states, gradients, invariance to how the batch is cut."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from urlvr_fast.ops import linear_token_stats
from urlvr_fast.trainer.batch import build_batch
from urlvr_fast.trainer.config import LossConfig, TrainerConfig
from urlvr_fast.trainer.learner import Head, Learner, find_head, learning_rate
from urlvr_fast.trainer.rollout import Completion


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def make_batch(model, temperature=1.0, groups=5, seed=0):
    """Ragged groups of random tokens whose `sampled_logp` are the model's own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    prompts = [[1, *draw(2 + 3 * i)] for i in range(groups)]
    completions = []
    for i, prompt in enumerate(prompts):
        group = []
        for j in range(2 + i % 3):
            response = draw(1 + (5 * i + 3 * j) % 11)
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                logp = (model(ids).logits[0] / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            group.append(Completion(response, logp.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist(), "length"))
        completions.append(group)
    return build_batch(
        prompt_token_ids=prompts,
        prompt_texts=["p"] * groups,
        prompt_ids=list(range(groups)),
        completions=completions,
        decode=lambda rows: ["" for _ in rows],
        temperature=temperature,
    )


def make_learner(model, loss=None, **options):
    return Learner(model, trainer=TrainerConfig(**options), loss=loss or LossConfig(), dtype="float32", max_response_tokens=16)


def plain_gradients(model, batch, advantages, loss_type, entropy_coef=0.0):
    """The loss written out, one forward per rollout and the whole softmax in memory."""
    model = copy.deepcopy(model)
    trained = torch.ones(len(batch)) if batch.train_mask is None else batch.train_mask.float()
    lengths = batch.response_lens
    tokens, sequences = (lengths * trained).sum(), trained.sum()
    total = torch.zeros(())
    for b in range(len(batch)):
        ids = batch.tokens[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]
        logits = model(ids[None], use_cache=False).logits[0][batch.prompt_lens[b] - 1 : -1] / batch.temperature
        logp_all = logits.log_softmax(-1)
        logp = logp_all.gather(-1, ids[batch.prompt_lens[b] :, None])[:, 0]
        entropy = -(logp_all.exp() * logp_all).sum(-1)
        # The bonus is averaged over tokens the way the loss type averages its own terms.
        terms = -(logp - logp.detach()).exp() * advantages[b] - entropy_coef * entropy
        if loss_type == "dapo":
            term = terms.sum() / tokens
        elif loss_type == "dr_grpo":
            term = terms.sum() / (sequences * 16)
        else:  # grpo
            term = terms.mean() / sequences
        total = total + trained[b] * term
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def accumulated(learner, batch, advantages):
    metrics = learner.accumulate(batch, advantages)
    gradients = {name: p.grad.clone() for name, p in learner.model.named_parameters()}
    learner.optimizer.zero_grad()
    return gradients, metrics


def assert_close(found, wanted, bound=1e-5):
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in wanted.values()))
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= bound * max(norm * 0.1, float(gradient.norm())), name


def test_hidden_states_are_those_of_one_by_one_forwards(model):
    batch = make_batch(model)
    learner = make_learner(model)
    hidden, ids, where = learner._response_hidden(batch, list(range(len(batch))))
    for b in range(len(batch)):
        mine = (batch.token_rollout[where] == b).nonzero().flatten()
        sequence = batch.tokens[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]
        alone = model.base_model(sequence[None], use_cache=False).last_hidden_state[0][batch.prompt_lens[b] - 1 : -1]
        torch.testing.assert_close(hidden[mine], alone, atol=1e-5, rtol=1e-5)
        assert ids[mine].tolist() == sequence[batch.prompt_lens[b] :].tolist()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_gradients_equal_plain_torch(model, loss_type, temperature, entropy_coef):
    batch = make_batch(model, temperature)
    advantages = torch.linspace(-1, 1, len(batch))
    advantages[3] = advantages[7] = 0.0  # dead unless the entropy bonus keeps them
    batch.train_mask = torch.arange(len(batch)) != 5
    wanted = plain_gradients(model, batch, advantages, loss_type, entropy_coef)
    learner = make_learner(model, LossConfig(loss_type=loss_type, entropy_coef=entropy_coef), micro_batch_tokens=64)
    found, metrics = accumulated(learner, batch, advantages)
    assert_close(found, wanted)
    assert metrics["live_rollouts"] == len(batch) - (1 if entropy_coef else 3)
    assert metrics["logp_gap_max"] < 1e-4


def test_gradients_do_not_depend_on_micro_batches_or_checkpointing(model):
    batch = make_batch(model)
    advantages = torch.linspace(-1, 1, len(batch))
    whole, whole_metrics = accumulated(make_learner(copy.deepcopy(model), micro_batch_tokens=10**6), batch, advantages)
    for options in ({"micro_batch_tokens": 1}, {"micro_batch_tokens": 90}, {"gradient_checkpointing": True}):
        cut, metrics = accumulated(make_learner(copy.deepcopy(model), **options), batch, advantages)
        assert_close(cut, whole)
        assert metrics == pytest.approx(whole_metrics, abs=1e-5)


def test_scores_and_entropy_are_the_models(model):
    batch = make_batch(model, temperature=0.8)
    learner = make_learner(model, micro_batch_tokens=64)
    stats = learner.score(batch, ("logp", "entropy", "self_certainty"))
    torch.testing.assert_close(stats["logp"], batch.sampled_logp, atol=1e-5, rtol=0)
    position = 0
    for b in range(len(batch)):
        ids = batch.tokens[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]
        with torch.no_grad():
            logits = model(ids[None]).logits[0][batch.prompt_lens[b] - 1 : -1].double() / 0.8
        n = len(logits)
        p = torch.distributions.Categorical(logits=logits)
        uniform = torch.distributions.Categorical(logits=torch.zeros_like(logits))
        torch.testing.assert_close(stats["entropy"][position : position + n].double(), p.entropy(), atol=1e-5, rtol=0)
        divergence = torch.distributions.kl_divergence(uniform, p)
        torch.testing.assert_close(stats["self_certainty"][position : position + n].double(), divergence, atol=1e-5, rtol=0)
        position += n
    # The actor entropy of a step is over all response tokens, those of dead rollouts included.
    advantages = torch.zeros(len(batch))
    advantages[0] = 1.0
    _, metrics = accumulated(learner, batch, advantages)
    assert metrics["actor_entropy"] == pytest.approx(stats["entropy"].mean().item(), abs=1e-5)
    assert metrics["logp_gap_max"] == pytest.approx((stats["logp"] - batch.sampled_logp).abs().max().item(), abs=2e-5)
    assert metrics["logp_gap_mean"] == pytest.approx((stats["logp"] - batch.sampled_logp).abs().mean().item(), abs=2e-5)


def test_gap_sees_a_rollout_that_is_dead(model):
    batch = make_batch(model)
    last = batch.token_rollout == len(batch) - 1
    batch.sampled_logp[last] += 0.5
    advantages = torch.zeros(len(batch))
    advantages[0] = 1.0
    learner = make_learner(model)
    metrics = learner.accumulate(batch, advantages)
    assert metrics["logp_gap_max"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["logp_gap_mean"] == pytest.approx(0.5 * last.float().mean().item(), abs=1e-4)


def test_all_dead_leaves_the_weights_alone(model):
    batch = make_batch(model)
    learner = make_learner(model, lr=0.1)
    learner.accumulate(batch, torch.linspace(-1, 1, len(batch)))
    learner.update(1)  # the optimiser has momentum now
    before = copy.deepcopy(model.state_dict())
    metrics = learner.accumulate(batch, torch.zeros(len(batch)))
    assert learner.update(2)["grad_norm"] == 0.0
    assert metrics["live_rollouts"] == 0
    assert metrics["loss"] == 0
    assert metrics["actor_entropy"] > 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_gradient_that_is_not_finite_is_skipped(model):
    batch = make_batch(model)
    learner = make_learner(model, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    advantages = torch.ones(len(batch))
    advantages[0] = math.inf
    learner.accumulate(batch, advantages)
    assert learner.update(1)["skipped"] == 1.0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    learner.accumulate(batch, torch.linspace(-1, 1, len(batch)))
    assert learner.update(2)["skipped"] == 0.0
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_update_is_clipped_adamw(model):
    batch = make_batch(model)
    twin = copy.deepcopy(model)
    advantages = torch.linspace(-50, 50, len(batch))
    learner = make_learner(model, lr=1e-3, grad_clip=0.5)
    learner.accumulate(batch, advantages)
    norm = learner.update(1)["grad_norm"]
    assert norm > 0.5  # or the clip is not tested
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.01)
    for p, g in zip(twin.parameters(), plain_gradients(twin, batch, advantages, "dapo").values(), strict=True):
        p.grad = g * (0.5 / norm)
    optimizer.step()
    # Adam's first step is lr·sign(g): where g is rounding noise its sign is too, so a few entries may differ by 2·lr.
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert ((p - q).abs() > 1e-5).float().mean() < 1e-3


def test_a_head_that_does_more_is_refused(model):
    head = find_head(model)
    assert (head.softcap, head.scale, head.bias) == (None, 1.0, None)
    forward = model.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with pytest.raises(ValueError, match="does something between hidden states and logits"):
        find_head(model)


def test_a_scale_covers_the_bias():
    """As `find_head` checks it against a model: softcap((h·Wᵀ + b)·scale)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 5), (11, 5), (11,)))
    bias.requires_grad_()
    ids, head = torch.arange(7), Head(weight, bias, 5.0, 0.5)
    got = linear_token_stats(hidden, head.weight, ids, outputs=("logp",), **head.options()).logp
    logits = 5.0 * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) * 0.5 / 5.0)
    expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(logp.sum(), bias)[0] for logp in (got, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 16, "query_pre_attn_scalar": 16}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Llama", {}),
    ],
)
def test_heads_of_other_families(family, options):
    """Softcapped (Gemma 2), divided (Granite) and multiplied (Cohere) logits give the model's own log-probs."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=95,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # large logits, so that a cap or a scale matters
    batch = make_batch(model)
    stats = make_learner(model).score(batch, ("logp",))
    torch.testing.assert_close(stats["logp"], batch.sampled_logp, atol=1e-4, rtol=0)


def test_learning_rate_schedules():
    constant = TrainerConfig(lr=1.0, steps=100, warmup_steps=10)
    assert [learning_rate(s, constant) for s in (1, 5, 10, 11, 100)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = TrainerConfig(lr=1.0, steps=100, lr_schedule="cosine")
    assert learning_rate(50, cosine) == pytest.approx(0.55)
    assert learning_rate(100, cosine) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_to_the_start_model_against_plain_torch(model, kind, temperature):
    """A moved policy: the penalty's gradient, on rollouts whose advantage is 0 as well, and the log-probs of the start model."""
    batch = make_batch(model, temperature)
    learner = make_learner(model, LossConfig(kl_coef=0.3, kl=kind))
    learner.keep_start()
    start = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    batch.ref_logp = learner.start_logp(batch)
    # The rollouts were sampled by the start model, so its log-probs are theirs.
    torch.testing.assert_close(batch.ref_logp, batch.sampled_logp, atol=2e-5, rtol=1e-5)
    advantages = torch.linspace(-1, 1, len(batch)) * (torch.arange(len(batch)) % 3 > 0)
    found, _ = accumulated(learner, batch, advantages)

    plain = copy.deepcopy(model)
    tokens = batch.response_lens.sum()
    total = torch.zeros(())
    for b in range(len(batch)):
        ids = batch.tokens[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]

        def logp_of(network, ids=ids, b=b):
            logits = network(ids[None], use_cache=False).logits[0][batch.prompt_lens[b] - 1 : -1] / temperature
            return logits.log_softmax(-1).gather(-1, ids[batch.prompt_lens[b] :, None])[:, 0]

        logp = logp_of(plain)
        with torch.no_grad():
            d_ref = logp_of(start)
        d = d_ref - logp
        penalty = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kind]
        total = total + (-(logp - logp.detach()).exp() * advantages[b] + 0.3 * penalty).sum() / tokens
    total.backward()
    assert_close(found, {name: p.grad for name, p in plain.named_parameters()}, 2e-5)


def test_start_logp_needs_a_start(model):
    with pytest.raises(RuntimeError, match="keep_start"):
        make_learner(model).start_logp(make_batch(model))


def test_old_logp_makes_ratios(model):
    """Of a second mini-batch: the ratio of the moved policy to the one before the batch's first update, clipped as the loss says."""
    batch = make_batch(model)
    learner = make_learner(model)
    batch.old_logp = learner.score(batch, ("logp",))["logp"]
    advantages = torch.linspace(-1, 1, len(batch))
    still, _ = accumulated(learner, batch, advantages)
    batch.old_logp = None
    on_policy, _ = accumulated(learner, batch, advantages)
    assert_close(still, on_policy, 1e-4)  # nothing has moved: every ratio is 1
    batch.old_logp = learner.score(batch, ("logp",))["logp"] - 1.0  # every ratio is e: clipped where the advantage is positive
    clipped, metrics = accumulated(learner, batch, advantages)
    assert metrics["clip_frac_high"] > 0.3
    negative = torch.where(advantages < 0, advantages * math.e, 0)
    batch.old_logp = None
    expected, _ = accumulated(learner, batch, negative)
    # The denominators are the same: tokens of the whole batch, dead rollouts included.
    assert_close(clipped, expected, 1e-4)
