"""Reinforcement learning of a language model on financial advice in Traditional Chinese, on one 12 GB card, explained cell by cell

A language model that answers questions about money learns quickly to please: it promises profit, and it leaves out the risk. This package trains it the other way, with GRPO or PPO, against a reward that reads Traditional Chinese and can show what it read: which keywords, which warnings, which promise.

Everything is written as notebooks. Each page explains one idea, derives its formula, shows it on a case small enough to check by hand, and exports one module. The same loop runs on two CPU cores in minutes and is sized for a 12 GB card such as the RTX 4070.

Modules:

- `finrl_grpo.advantages`: From REINFORCE to an advantage: a score means nothing until it is compared
- `finrl_grpo.bench`: Training steps of ours beside TRL's, in the same minutes on the same machine, and where the time goes
- `finrl_grpo.builtin`: `builtin:micro` in no time for tests, `builtin:tiny` in about a minute for a first run, and a place to keep them
- `finrl_grpo.bulk`: Scores in the order of the file, from several processes, in memory that does not grow
- `finrl_grpo.card`: A score with its parts, and the evidence marked where it stands
- `finrl_grpo.careful`: It may raise, hang, return nothing, text or too few numbers: each is named, counted and stored, and none becomes a zero
- `finrl_grpo.charts`: A line over the steps as a few kilobytes of SVG that fit a light and a dark page
- `finrl_grpo.chat`: A small chat for the terminal and for notebooks, with the evidence behind every score
- `finrl_grpo.checkpoint`: The run folder: everything that training leaves on disk, and how a run goes on from it with the same bits
- `finrl_grpo.cli`: What each command does, where its settings come from, and what it says when it cannot
- `finrl_grpo.codes`: All characters and all pairs of a text looked up at once, in arrays
- `finrl_grpo.config`: What a word of a configuration means, where its value came from, and what happens when it is wrong
- `finrl_grpo.critic`: How PPO gives every token an advantage of its own, and how its critic learns
- `finrl_grpo.data`: A whole data file with its hash, questions held back, token ids of a prompt, and a demo set to start with
- `finrl_grpo.dimensions`: Four dimensions that start at nothing, and gates that nothing empty passes
- `finrl_grpo.display`: A setting, a question, a group of answers, a run: named on the last line of a cell, each shows what it is
- `finrl_grpo.doctor`: Each thing a run leans on, tried on your own machine: fine, worth knowing, or broken, with the mend beside it
- `finrl_grpo.evaluate`: Held-back questions, greedy answers, and the measures that show a reward being gamed
- `finrl_grpo.export`: A folder that verl, OpenRLHF or lm-eval runs as it is: rows, reward file, start scripts, README
- `finrl_grpo.figures`: A number with its company, quantity, unit and time
- `finrl_grpo.files`: How bytes get to the disk so that a killed process, a full disk or a flipped bit cannot fool a later reader
- `finrl_grpo.fit`: Overlap weighted by surprise, names that mean the same company, and subjects
- `finrl_grpo.flow`: One small map, drawn on top of every page with that page's room marked
- `finrl_grpo.guard`: One look at every update before it may touch the weights: is it finite, and is it like the others?
- `finrl_grpo.health`: Rows of numbers become a few plain sentences, in English and in Chinese
- `finrl_grpo.interop`: One model behind the reward protocols of TRL, verl and OpenRLHF
- `finrl_grpo.kl`: The ratio to the policy that sampled, three estimators of the divergence from the reference, and what a distance is good for
- `finrl_grpo.lexicon`: One reviewable file of words, found in an answer in one pass
- `finrl_grpo.logprobs`: The one forward pass that training rests on: log-probabilities of given tokens, rightly placed and without a table of the vocabulary
- `finrl_grpo.losses`: Clip, average and add up: GRPO with its relatives and PPO, each a pure function on tensors
- `finrl_grpo.memory`: What a run needs on a card, phase by phase, before it starts; and what to change so that it fits
- `finrl_grpo.memread`: Where the numbers of the memory budget come from, and how far they agree with the code they describe
- `finrl_grpo.memtrace`: The real training code runs on tensors without data, and a ledger keeps count
- `finrl_grpo.models`: From a name to a policy: weights, adapter, value head, reference, and a folder that others can open
- `finrl_grpo.monitor`: One row of numbers per step, told to the disk first and then to whoever listens
- `finrl_grpo.packed`: All answers to a question in one row behind it, each blind to the others
- `finrl_grpo.panel`: Training in a process of its own, watched and steered from a notebook, and found again after the tab was closed
- `finrl_grpo.plots`: What reward cost in KL, what changed in each dimension, and where the memory goes, as PNG or SVG for a paper or a talk
- `finrl_grpo.promise_fit`: Labelled sentences of many writers, a logistic regression, and one writer left out at a time
- `finrl_grpo.promise_model`: A linear model over characters and pairs of characters, clause by clause
- `finrl_grpo.promises`: Predicates composed with objects, and the scope of a denial
- `finrl_grpo.proof`: A problem whose best answer is known, each part of the algorithms taken away in turn, and the financial reward on a small model
- `finrl_grpo.quickstart`: The whole way in three minutes on a CPU: a small model, a few dozen steps, and the same questions before and after
- `finrl_grpo.reader`: From bytes to rows without surprises: encodings, layouts, bad rows, and files larger than memory
- `finrl_grpo.reading`: What counts in a text, what does not, and how much it runs like Chinese
- `finrl_grpo.recover`: The same answers and the same gradient in smaller pieces, one rung at a time, and a message with numbers when no rung is left
- `finrl_grpo.report`: Two models, the same held-back questions: measures with intervals, and every answer beside the other
- `finrl_grpo.reward`: Parts, gates and a veto, as one number with its evidence
- `finrl_grpo.rollout`: Sampling in groups, with random numbers that do not depend on how the work was cut
- `finrl_grpo.rows`: One line of text becomes a question, or a message that says where the flaw is and how to mend it
- `finrl_grpo.run`: The loop with everything around it: checkpoints, evaluation, a stop that loses nothing, and the commands that start it
- `finrl_grpo.sizes`: A model in nine numbers, a card in three, wherever they are to be found
- `finrl_grpo.text`: One spelling for every spelling, and a way back to the original
- `finrl_grpo.trainer`: GRPO and PPO on one trainer, whose steps can be run one cell at a time
- `finrl_grpo.trl_engine`: What becomes of each setting when TRL's GRPOTrainer makes the steps
- `finrl_grpo.trl_run`: The same data, reward, evaluation and run folder around `trl.GRPOTrainer`, in one process or several
- `finrl_grpo.view`: What lies in a run folder, read once and drawn as a page of HTML that needs nothing else
- `finrl_grpo.warm_start`: A model that has never seen Chinese cannot be rewarded for it, so show it the references first
- `finrl_grpo.watch`: The same run as text: a screen that renews itself, or plain lines where there is no screen"""

__version__ = "0.1.0"
