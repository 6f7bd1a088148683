"A warm start, updates over model families and optimizers, and proof that the loop learns"
import pytest, torch
from finrl_grpo import losses
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import DataError, TrainConfig, UserError
from finrl_grpo.data import Example, demo_examples
from finrl_grpo.models import load_policy
from finrl_grpo.run import StopFlag, build_trainer, run_training
from finrl_grpo.trainer import Trainer, lr_factor
from finrl_grpo.warm_start import Fluency, advice, advise, fluency, warm_base, warm_start

MICRO = dict(model_name='builtin:micro', use_fp16=False, use_wandb=False, gradient_checkpointing=False, batch_size=2, gradient_accumulation_steps=1,
    max_prompt_length=32, max_new_tokens=12, num_generations=4, ppo_epochs=1, warmup_ratio=0., lr_scheduler='constant')
REFERENCES = [e for e in demo_examples() if e.reference][:8]

def config(**changes): return TrainConfig(**{**MICRO, **changes})

# ---- warm start

@pytest.mark.parametrize('lora', [0, 4])
def test_warm_start_is_the_base_and_the_reference_of_the_run(tmp_path, lora):
    "The policy starts at the warm model, and so does the KL: an adapter's references would otherwise be the cold base"
    c = config(warm_start_epochs=1., lora_rank=lora, beta=.1, max_steps=2, max_new_tokens=48)
    run = RunFolder.create(tmp_path/'run', c.to_dict(), 'hash')
    warm = build_trainer(c, REFERENCES, run=run)
    cold = fluency(load_policy(c), REFERENCES, c).loss
    assert fluency(warm.policy, REFERENCES, c).loss < cold
    groups = warm.rollout(warm.examples_of(0))
    assert warm.update(groups, warm.score(groups))['kl'] < 1e-6

def test_a_run_with_a_warm_start_resumes_to_the_same_bits(tmp_path):
    class AfterOne(StopFlag):
        def wants_stop(self, save=None): return 'stop' if len(cut.metrics())==1 else None

    c = config(warm_start_epochs=1., max_steps=3, save_steps=1, lora_rank=4, learning_rate=1e-2, eval_fraction=0.)
    whole,cut = (RunFolder.create(tmp_path/o, c.to_dict(), 'hash') for o in ('whole', 'cut'))
    assert run_training(whole, REFERENCES, progress=False) == 0
    with cut.session():
        t = build_trainer(c, REFERENCES, run=cut)
        t.train(cut, stop=AfterOne())
        t.save(cut)
    made = (cut.path/'warm_start'/'model.safetensors').stat().st_mtime_ns
    assert run_training(cut, REFERENCES, progress=False) == 0
    assert (cut.path/'warm_start'/'model.safetensors').stat().st_mtime_ns == made
    plain = lambda run: [{k:v for k,v in r.items() if not k.startswith(('time/', 'system/'))} for r in run.metrics()]
    assert plain(whole) == plain(cut)
    files = [(o.path/'best_model'/'model.safetensors').read_bytes() for o in (whole, cut)]
    assert files[0] == files[1]

def test_the_same_warm_start_twice_gives_the_same_bits():
    c = config(warm_start_epochs=1., beta=0.)
    a,b = load_policy(c),load_policy(c)
    for p in (a, b): warm_start(p, REFERENCES, c, learning_rate=1e-2)
    assert all(torch.equal(x, y) for x,y in zip(a.state_tensors().values(), b.state_tensors().values()))

def test_a_warm_start_needs_references_and_a_folder():
    c = config(warm_start_epochs=1.)
    with pytest.raises(DataError, match='no row has a reference'): warm_start(load_policy(c), [Example('甲？')], c)
    with pytest.raises(UserError, match='without a run folder'): build_trainer(c, REFERENCES)

def test_advice_names_the_model_and_only_where_it_helps(capsys, monkeypatch):
    assert 'warm_start_epochs' in advice(Fluency(2.9, 12.), 'gpt2') and 'gpt2' in advice(Fluency(2.9, 12.), 'gpt2')
    assert advice(Fluency(.7, 3.), 'qwen') == ''
    c = config(max_new_tokens=48)
    t = Trainer(c, load_policy(c), None, REFERENCES)
    advise(t)
    assert capsys.readouterr().err == ''
    t.cfg.model_name = 'some/model'
    advise(t)
    assert 'some/model has hardly seen Chinese' in capsys.readouterr().err
    t.cfg.warm_start_epochs = 1.
    advise(t)
    assert capsys.readouterr().err == ''

# ---- what the settings of an update mean

FEW = [Example('甲？'), Example('乙？'), Example('丙和丁？'), Example('戊？')]

def letters(completions, **_):
    "Share of Latin letters: the optimum is 1, random weights reach 0.2"
    return [sum(c.isascii() and c.isalpha() for c in o)/max(1, len(o)) for o in completions]

def make(reward=letters, rows=FEW, **changes):
    c = config(**changes)
    return Trainer(c, load_policy(c), reward, rows)

def turn(t):
    groups = t.rollout(t.examples_of(t.steps_done))
    return t.update(groups, t.score(groups))

def gradient(**changes):
    "The gradient of one update of four questions, before clipping"
    t = make(max_grad_norm=0., **changes)
    turn(t)
    return torch.cat([p.grad.flatten() for _,p in t.policy.trainable()])

@pytest.mark.parametrize('changes', [dict(beta=.1), dict(algorithm='ppo', beta=.1), dict(loss_type='dr_grpo'), dict(packed=False)], ids=['grpo', 'ppo', 'dr_grpo', 'padded'])
def test_no_cut_of_the_work_changes_a_gradient(changes):
    "Neither the rollout's chunk (`batch_size`) nor the update's (`mini_batch_size`)"
    cuts = [dict(batch_size=4, mini_batch_size=4), dict(batch_size=4, mini_batch_size=1), dict(batch_size=1, gradient_accumulation_steps=4, mini_batch_size=4),
        dict(batch_size=2, gradient_accumulation_steps=2, mini_batch_size=3)]
    whole,*others = [gradient(**c, **changes) for c in cuts]
    assert whole.norm() > 0
    for other in others: assert (other-whole).norm() < 1e-4*whole.norm()

def test_the_learning_rate_rises_and_falls_by_update():
    c = TrainConfig(warmup_ratio=.1, lr_scheduler='linear')
    assert [lr_factor(u, 40, c) for u in (0, 1, 3, 4, 22, 40)] == [.25, .5, 1., 1., .5, 0.]
    assert lr_factor(22, 40, TrainConfig(warmup_ratio=.1, lr_scheduler='cosine')) == pytest.approx(.5)
    assert lr_factor(39, 40, TrainConfig(warmup_ratio=.1, lr_scheduler='constant')) == 1.

def test_the_optimizer_follows_the_schedule_over_updates_not_steps():
    t = make(algorithm='ppo', learning_rate=1e-3, value_learning_rate=4e-3, warmup_ratio=.5, ppo_epochs=2, num_mini_batches=2, max_steps=2)
    seen,step = [],t.optimizer.step
    t.optimizer.step = lambda *a: (seen.append([g['lr'] for g in t.optimizer.param_groups]), step(*a))
    for _ in range(2): turn(t)
    assert seen == [pytest.approx([1e-3*f, 4e-3*f]) for f in (.25, .5, .75, 1., 1., 1., 1., 1.)]

def test_gradients_are_clipped_to_the_norm_asked_for():
    free,held = make(max_grad_norm=0.),make(max_grad_norm=1e-3)
    norms = [turn(t)['grad_norm'] for t in (free, held)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1e-3
    for (_,a),(_,b) in zip(free.policy.trainable(), held.policy.trainable()): torch.testing.assert_close(b.grad, a.grad*1e-3/norms[0], atol=1e-9, rtol=1e-3)

def test_the_passes_end_when_the_policy_has_moved_too_far():
    "The update that finds the policy past the limit is not made and ends the passes"
    updates = {}
    for limit in (None, 1e-12, 1e9):
        t = make(ppo_epochs=4, learning_rate=1e-2, early_stop_kl=limit)
        turn(t)
        updates[limit] = t.updates_done
    assert updates == {None:4, 1e-12:2, 1e9:4}
    once,stopped = make(ppo_epochs=1, learning_rate=1e-2),make(ppo_epochs=4, learning_rate=1e-2, early_stop_kl=1e-12)
    for t in (once, stopped):
        t.total_updates = 4
        turn(t)
    for (_,a),(_,b) in zip(once.policy.trainable(), stopped.policy.trainable()): assert torch.equal(a, b)

def test_clip_higher_widens_only_the_upper_side(monkeypatch):
    seen,clipped = [],losses.clipped_loss
    monkeypatch.setattr(losses, 'clipped_loss', lambda ratio, A, low, high, delta=None: (seen.append((low, high)), clipped(ratio, A, low, high, delta))[1])
    turn(make(clip_range=.2, clip_range_high=.28, loss_type='dapo'))
    turn(make(clip_range=.2))
    assert seen[0] == (.2, .28) and seen[-1] == (.2, .2)

def test_overlong_answers_pay_on_top_of_the_reward():
    free,paid = make(),make(overlong_buffer=6)
    groups = free.rollout(FEW[:2])
    lengths = torch.tensor([g.lengths for g in groups])
    difference = paid.score(groups).rewards - free.score(groups).rewards
    torch.testing.assert_close(difference, losses.overlong_penalty(lengths, 12, 6))
    assert difference.min() == -1

def test_dynamic_sampling_equals_training_on_the_other_groups_alone():
    "Groups of equal reward leave no trace in an update, not even in its denominator"
    judge = lambda prompts, completions, **_: [1.]*len(completions) if '甲' in prompts[0] else letters(completions)
    t = make(judge, batch_size=2, dynamic_sampling=True, loss_type='dapo', max_grad_norm=0.)
    groups = t.rollout(FEW[:2])
    t.update(groups, t.score(groups))
    alone = make(judge, batch_size=2, loss_type='dapo', max_grad_norm=0.)
    alone.update(groups[1:], alone.score(groups[1:]))
    for (_,a),(_,b) in zip(t.policy.trainable(), alone.policy.trainable()): torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-4)

def test_the_kl_price_follows_the_measured_kl_of_whole_answers():
    t = make(beta=.1, kl_target=.5, kl_horizon=16, learning_rate=1e-2)
    price = losses.AdaptiveKL(.1, .5, 16)
    for _ in range(4):
        stats = turn(t)
        assert stats['beta'] == pytest.approx(price.value)
        price.update(stats['kl']*stats['completion_length'], 8)
    assert t.beta.value == pytest.approx(price.value) != .1

def test_the_best_model_is_the_one_with_the_best_greedy_answers(tmp_path, monkeypatch):
    "Whatever the training reward, whose noise would crown a lucky step"
    heldout = iter([0., .2, .9, .1, .4])
    def measured(self, name): return dict(reward=next(heldout))
    monkeypatch.setattr(Trainer, 'measure_heldout', measured)
    c = config(max_steps=4, eval_steps=1, save_steps=10, learning_rate=1e-2)
    run = RunFolder.create(tmp_path/'run', c.to_dict(), 'hash')
    t,kept = Trainer(c, load_policy(c), letters, FEW[:3], FEW[3:]),{}
    with run.session():
        monkeypatch.setattr(type(t.policy), 'save', lambda self, folder: kept.update({t.steps_done:self.state_tensors()}) or (folder/'x').write_text('', encoding='utf-8'))
        t.train(run)
    assert t.progress['best'] == dict(step=2, reward=.9) and sorted(kept) == [1, 2]

def test_held_out_questions_are_answered_greedily(monkeypatch):
    from finrl_grpo import rollout
    greedy,of = [],rollout.Sampling.of
    class Judge:
        def score_batch(self, *a): return []
    monkeypatch.setattr(rollout.Sampling, 'of', lambda c, g=False: (greedy.append(g), of(c, g))[1])
    t = Trainer(config(), load_policy(config()), Judge(), FEW[:3], FEW[3:])
    t.measure_heldout('before')
    assert greedy == [True]

# ---- the proof and what it is made with

def test_a_financial_run_measures_with_all_guards_whatever_it_trained_with():
    from finrl_grpo.proof import financial_run
    runs = [financial_run(config(max_steps=1), demo_examples()[:4], demo_examples()[4:7], answers=2, guard=g) for g in (True, False)]
    assert runs[0]['before'] == runs[1]['before'] and [r['guard'] for r in runs] == [True, False]
    assert all(len(r[side][k]) == 3 for r in runs for side in ('before', 'after') for k in ('reward', 'promises', 'repetition', 'relevance'))

def test_results_are_kept_with_machine_and_date(tmp_path):
    import json
    from finrl_grpo.proof import record
    made = json.loads(record('toy', [dict(case='a')], tmp_path).read_text(encoding='utf-8'))
    assert made['runs'] == [dict(case='a')] and {'date', 'torch', 'machine'} <= made['made'].keys()

def test_proof_says_how_it_is_called(capsys):
    from finrl_grpo.proof import main
    assert main([]) == main(['nothing']) == 2
    assert 'python -m finrl_grpo.proof toy' in capsys.readouterr().err

def test_the_toy_repeats_what_was_recorded():
    "Five steps of the first recorded run, to the digit: an older result would not pass for a new one"
    from finrl_grpo.proof import CASES, recorded, toy_run
    if recorded('toy')['made']['torch'] != torch.__version__: pytest.skip('recorded with another torch')
    for name in ('GRPO', 'PPO'):
        old = next(r for r in recorded('toy')['runs'] if (r['case'], r['seed'])==(name, 0))
        assert toy_run(CASES[name], 0, steps=5)['curve'] == old['curve'][:5]
