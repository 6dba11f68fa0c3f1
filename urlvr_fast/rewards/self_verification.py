"""Self-verification (paper, section 7): the policy that is trained judges its own rollouts. Judging can be easier than solving.

The judge is the current policy, asked with one prompt per rollout. Only the solutions are trained on, never the verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError, rollout_text
from urlvr_fast.rewards.answers import extract_boxed

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

# (the prompt's text, the whole response, the prompt's other columns) -> what the judge is asked
VerificationPrompt = Callable[[str, str, Mapping[str, Any]], str]
BOXED_WORD = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", re.DOTALL)


class SelfVerification:
    """r(y) = what the policy itself says of y when it is asked whether y solves x (paper, section 7 and appendix C).

    mode: "probability" (default, our choice) reads P(True) / (P(True) + P(False)) off the verdict's first tokens: one token where the paper
        samples up to 4096, no parsing, and no noise. A verdict of several tokens has the product of their probabilities. "generate" is the
        paper: one sampled judgement per rollout whose last boxed True or False counts (`parse_verdict`).
    threshold: 1 for a share above it, else 0 (mode "probability"). None gives the share itself.
    temperature, max_tokens: of a generated judgement; the paper's 0.5 and 4096.
    question_column: the column with the bare question. Without it the judge is shown the prompt as the model saw it, which for a chat
        model has the template's marks around it.
    prompt: what to ask; a task brings its own (`verification_prompt` of `build_reward`), and the default asks in plain English.
    verdicts: the texts that mean yes and no, spelt as they would follow the prompt.

    Fails when judging is no easier than solving, or when the verdict depends on the prompt's wording more than on the solution: a base
    model that says yes to everything rewards everything. Then rollouts are learnt that persuade the judge. Raises RewardError without a
    policy, for an unknown column, and (from `likelihood`) where question and solution together exceed the model's context.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        prompt: VerificationPrompt | None = None,
        verdicts: Sequence[str] = ("True", "False"),
        mode: str = "probability",
        threshold: float | None = 0.5,
        temperature: float = 0.5,
        max_tokens: int = 4096,
        question_column: str | None = None,
    ) -> None:
        if mode not in ("probability", "generate"):
            raise RewardError(f"self_verification: mode={mode!r}; valid are probability, generate")
        if threshold is not None and not 0 <= threshold <= 1:
            raise RewardError(f"self_verification: threshold={threshold} is a share of probability from 0 to 1, or None")
        if isinstance(verdicts, str) or len(verdicts) != 2 or not all(verdicts) or verdicts[0] == verdicts[1]:
            raise RewardError(f"self_verification: verdicts={verdicts!r} must be two different texts, the one for yes first")
        ask = ask_for_a_word if mode == "probability" else ask_for_a_boxed_verdict
        self.prompt: VerificationPrompt = ask if prompt is None else prompt
        self.yes, self.no = verdicts
        self.mode, self.threshold = mode, threshold
        self.generates = mode == "generate"
        self.temperature, self.max_tokens = temperature, max_tokens
        self.question_column = question_column

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        if policy is None:
            raise RewardError("self_verification asks the policy for its verdicts, and there is none: call the reward with a policy")
        questions = [policy.render(self.question(batch, index)) for index in range(len(batch))]
        if self.mode == "generate":
            judged = policy.generate(questions, 1, temperature=self.temperature, max_tokens=self.max_tokens)
            return torch.tensor([parse_verdict(texts[0], self.yes, self.no) for texts in judged])
        share = self.share_of_yes(questions, policy)
        return share.float() if self.threshold is None else (share > self.threshold).float()

    def share_of_yes(self, questions: list[str], policy: Policy) -> Tensor:
        """P(yes) / (P(yes) + P(no)) after each prompt, (B,) float64."""
        n = len(questions)
        logp, _ = policy.likelihood([*questions, *questions], [self.yes] * n + [self.no] * n)
        return torch.sigmoid(logp[:n] - logp[n:])

    def question(self, batch: RolloutBatch, index: int) -> str:
        """What the judge is asked about rollout `index`: the texts as they are, never searched for a template's words, never escaped."""
        columns = {name: values[index] for name, values in batch.columns.items()}
        if self.question_column is None:
            return self.prompt(batch.prompts[index], batch.completions[index], columns)
        if not isinstance(columns.get(self.question_column), str):
            raise RewardError(
                f"self_verification: question_column={self.question_column!r} holds no text for {rollout_text(batch, index)}; "
                f"the batch has the columns {', '.join(columns) or 'none'}"
            )
        return self.prompt(columns[self.question_column], batch.completions[index], columns)


def ask_for_a_word(prompt: str, completion: str, columns: Mapping[str, Any]) -> str:
    """The default question of mode "probability". Texts are joined, not formatted: braces in them are theirs."""
    return shown(prompt, completion) + "Is the proposed solution correct? Answer with one word, True or False.\nAnswer:\n"


def ask_for_a_boxed_verdict(prompt: str, completion: str, columns: Mapping[str, Any]) -> str:
    """The default question of mode "generate"."""
    return shown(prompt, completion) + (
        "Check the proposed solution step by step: whether it answers the question, keeps to every condition in it and makes no mistake. "
        "End with \\boxed{True} if it is correct and with \\boxed{False} if it is not.\n"
    )


def shown(prompt: str, completion: str) -> str:
    return "Question:\n" + prompt + "\n\nProposed solution:\n" + completion + "\n\n"


def parse_verdict(text: str, yes: str = "True", no: str = "False") -> float:
    """1 for a judgement whose last box says yes, 0 for one that says no, case aside; where it says neither, 1 when the word for yes is in
    the text and the word for no is not, else 0 (the released code's rule)."""
    yes, no = yes.strip().casefold(), no.strip().casefold()
    boxed = extract_boxed(text) or ""
    if match := BOXED_WORD.fullmatch(boxed):
        boxed = match[1]
    boxed = boxed.strip().rstrip(".").casefold()
    if boxed in (yes, no):
        return float(boxed == yes)

    def said(word: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text.casefold()) is not None

    return float(said(yes) and not said(no))
