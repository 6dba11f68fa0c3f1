"""Makes the fixed prompt sets in `experiments/prompts/`: `python -m experiments.choose_prompts`. They are committed; a run's key holds
their hash, so making them anew on another machine, where samples may differ, makes new runs.

  aligned.jsonl, misaligned.jsonl   32 training prompts each, by 64 samples of the base model: the commonest answer is right, or it is
                                    wrong though the right one was sampled. Without the sure ones (a share of 0.9 or more), on which
                                    nothing is left to sharpen
  test40.jsonl                      40 prompts of the test split
"""

from __future__ import annotations

import json
from pathlib import Path

VOTES, SIZE, SURE = 64, 32, 0.9
FOLDER = Path(__file__).parent / "prompts"


def main() -> None:
    from experiments.settings import resolved, spec
    from urlvr_fast.rewards.ensemble import vote
    from urlvr_fast.rewards.external import correct
    from urlvr_fast.tasks import arithmetic
    from urlvr_fast.trainer.data import load_encoded
    from urlvr_fast.trainer.evaluate import sample_batch
    from urlvr_fast.trainer.model import build_rollout, load_model
    from urlvr_fast.trainer.rollout import Sampling

    config = resolved(spec())
    loaded = load_model(config, config.model)
    prompts, encoded = load_encoded(config, loaded, "arithmetic", "train", 512, 1)
    rollout = build_rollout(config, loaded, 32)
    batch = sample_batch(rollout, prompts, encoded, range(len(encoded)), Sampling(VOTES, 1.0, config.rollout.max_tokens), 1, loaded.decode)
    votes, truth = vote(batch, prompts.checker), correct(batch, prompts.answers, prompts.checker)
    chosen: dict[str, list[dict[str, object]]] = {"aligned": [], "misaligned": []}
    for group, rows in batch.groups().items():
        prompt_id = batch.prompt_ids[rows[0]]
        right = votes.labels[group] == prompts.answers[prompt_id]
        if votes.ratios[group] >= SURE or (not right and not truth[rows].any()):
            continue
        name = "aligned" if right else "misaligned"
        if len(chosen[name]) < SIZE:
            chosen[name].append(
                {"prompt": prompts.prompts[prompt_id], "answer": prompts.answers[prompt_id], "majority_share": votes.ratios[group]}
            )
    chosen["test40"] = [{"prompt": p.prompt, "answer": str(p.answer)} for p in arithmetic.draw("test", limit=40, seed=40)]
    FOLDER.mkdir(exist_ok=True)
    for name, lines in chosen.items():
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{name}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
