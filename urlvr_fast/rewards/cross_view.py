"""Voting across phrasings of a question (paper, Table 2; Co-rewarding-I): one phrasing's rollouts label the other's."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError, rollout_text
from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.ensemble import answer_classes, elect, mean_logp

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

View = tuple[Hashable, str]  # a question, and one prompt that asks it


class CrossViewVoting:
    """r(y) = 1[ans(y) is in the class that wins the vote of the question's OTHER views] (Co-rewarding-I, arXiv 2508.00410).

    A view is one phrasing: prompts whose column `question` agrees ask the same thing, and those of them that differ in text are its views.
    A rollout's own view has no vote on it. Views in one batch label each other; for a question with one view in the batch, the policy is
    asked for `votes` rollouts of the text in the column `rephrased`. The winner, ties and classes are those of majority voting.

    question, rephrased: names of the two columns.
    votes: rollouts of a rephrased question; None takes the size of the batch's largest group. max_tokens: their longest length. They are
        sampled at the batch's temperature, and equally common answers among them go by string order.

    No answer gives 0, and so does a vote in which nothing parses. Fails more slowly than majority voting, as a phrasing's quirks earn
    nothing, and in the same way where all phrasings suggest the same wrong answer. Raises RewardError when a question has neither a second
    view nor a rephrased text, and when there is no policy to ask.
    """

    needs: frozenset[str] = frozenset()
    generates = True

    def __init__(
        self,
        checker: AnswerChecker,
        question: str = "question",
        rephrased: str = "rephrased",
        votes: int | None = None,
        max_tokens: int = 1024,
    ) -> None:
        if (votes is not None and votes < 1) or max_tokens < 1:
            raise RewardError(f"cross_view_voting: votes={votes} and max_tokens={max_tokens} must be at least 1")
        self.checker, self.question, self.rephrased = checker, question, rephrased
        self.votes, self.max_tokens = votes, max_tokens

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        views = self.views(batch)
        of_question: dict[Hashable, list[int]] = {}
        for (question, _), rows in views.items():
            of_question.setdefault(question, []).extend(rows)
        voters = {view: sorted(set(of_question[view[0]]) - set(rows)) for view, rows in views.items()}
        asked = self.ask(batch, policy, {view: rows[0] for view, rows in views.items() if not voters[view]})
        completions, likelihood = list(batch.completions), mean_logp(batch)
        for view, texts in asked.items():
            voters[view] = list(range(len(completions), len(completions) + len(texts)))
            completions += texts
            likelihood += [0.0] * len(texts)  # unknown: ties among them go by string order
        answers = [self.checker.extract(completion) for completion in completions]
        rewards = torch.zeros(len(batch))
        for view, rows in views.items():
            rewards[self.agreeing(rows, voters[view], answers, likelihood)] = 1.0
        return rewards

    def views(self, batch: RolloutBatch) -> dict[View, list[int]]:
        """The rollouts of each phrasing. Without the column every prompt is a question of its own, as is one whose question is None."""
        questions = batch.columns.get(self.question, [None] * len(batch))
        views: dict[View, list[int]] = {}
        for index, (question, prompt) in enumerate(zip(questions, batch.prompts, strict=True)):
            if not isinstance(question, (str, int, type(None))):
                raise RewardError(
                    f"cross_view_voting: column {self.question!r} names a question by a text or a whole number, "
                    f"not by {question!r:.80}; {rollout_text(batch, index)}"
                )
            own = ("prompt", batch.prompt_ids[index]) if question is None else ("question", question)
            views.setdefault((own, prompt), []).append(index)
        return views

    def ask(self, batch: RolloutBatch, policy: Policy | None, alone: dict[View, int]) -> dict[View, list[str]]:
        """Rollouts of the rephrased text of each of these views, given with one of its rollouts."""
        if not alone:
            return {}
        texts = []
        for index in alone.values():
            text = batch.columns.get(self.rephrased, [None] * len(batch))[index]
            if not isinstance(text, str) or not text.strip():
                raise RewardError(
                    f"cross_view_voting has no other phrasing for {rollout_text(batch, index)}. Put two phrasings of a question into a "
                    f"step, with the same value in a column {self.question!r}, or add a column {self.rephrased!r} with a second phrasing"
                )
            texts.append(text)
        if policy is None:
            raise RewardError("cross_view_voting asks the policy about rephrased questions, and there is none: call it with a policy")
        n = self.votes or max(map(len, batch.groups().values()))
        prompts = [policy.render(text) for text in texts]
        generated = policy.generate(prompts, n, temperature=batch.temperature, max_tokens=self.max_tokens)
        return dict(zip(alone, generated, strict=True))

    def agreeing(self, rows: list[int], voters: list[int], answers: Sequence[str | None], likelihood: Sequence[float]) -> list[int]:
        """Those of `rows` whose answer is in the class that `voters` elect."""
        _, members = answer_classes(answers, {0: [*rows, *voters]}, self.checker)
        electorate = set(voters)
        of_voters = {number: voted for number, every in members[0].items() if (voted := [row for row in every if row in electorate])}
        winner, _ = elect(of_voters, answers, likelihood)
        return [row for row in members[0].get(winner, []) if row not in electorate]
