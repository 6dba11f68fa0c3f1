"""What a training step costs, beside its floor and beside the same step of TRL's GRPOTrainer.

`python -m benches.grpo_step` measures, `benches/table.py` writes it up in the README.

Conventions, the same for both sides:

* Processes are loaded once and then take turns, one at work at any time, each round in a random order of its own: ours (which runs
  `urlvr_fast.trainer.loop.train`), TRL (which runs `GRPOTrainer.train`) and the floor. Medians of the rounds are compared.
* TRL takes part twice: with an allocator that keeps its pages, which is its best and what targets are held against, and with glibc's
  defaults, which is how ours and the floor run. `benches/grpo_step/trl.py` says what else was set for it.
* The same random model in fp32, the same prompts in every step, the same group size, lengths, number of threads, loss (dapo, one update a
  batch, no KL), AdamW, clipping at norm 1, and a reward that costs nothing. TRL writes no log.
* Before anything is timed, both turn the same rollouts into the gradient of the same weights; unless the two agree, nothing is reported.
* `step` is everything from prompts to the next step's prompts: ours with its metrics, votes and log, TRL with its metrics.
* `learn` is what turns rollouts and advantages into new weights. The rollouts are given, and preparing them is not timed on either side.
* The floor of `learn`: forward and backward of the model's body, the three products that logits, their gradient's way to the hidden states
  and to the weight need, by the faster of MKL and oneDNN, with nothing between them, and one fused AdamW step. The floor of `step` adds
  what the engine took to generate and to take over the weights in the same round's step.
* Engines are named, because generation is most of a step: ours is vLLM in the trainer's process, TRL's is vLLM where TRL can use the one
  that is installed (it is tried, and the reason is kept), else transformers' `generate`.
* Memory is measured apart from time: by how much `learn` raised what torch had allocated, by how much it raised the resident memory of its
  process, and the largest resident memory that a process ever had, its engine included.
"""
