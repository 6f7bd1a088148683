"The loop learns, and means what its settings say"
import pytest, torch
from finrl_grpo.config import DivergedError, TrainConfig
from finrl_grpo.data import Example
from finrl_grpo.models import load_policy
from finrl_grpo import losses
from finrl_grpo.trainer import Trainer

FEW = [Example('甲？'), Example('乙？'), Example('丙和丁？'), Example('戊？')]
SMALL = dict(model_name='builtin:micro', batch_size=2, gradient_accumulation_steps=1, num_generations=8, max_prompt_length=16, max_new_tokens=8,
    ppo_epochs=1, max_steps=40, learning_rate=1e-2, use_fp16=False, gradient_checkpointing=False, beta=0., warmup_ratio=0., lr_scheduler='constant')
PPO = dict(algorithm='ppo', vf_coef=.5, ppo_epochs=2)

def letters(completions, **_):
    "Share of the eight tokens that are Latin letters: the optimum is 1, random weights reach 0.2"
    return [sum(c.isascii() and c.isalpha() for c in o)/8 for o in completions]

def make(rows=FEW, reward=letters, **changes):
    c = TrainConfig(**{**SMALL, **changes})
    return Trainer(c, load_policy(c), reward, rows)

def turn(t):
    groups = t.rollout(t.examples_of(t.steps_done))
    return t.update(groups, t.score(groups))

def weights(t): return {n:p.detach().clone() for n,p in t.policy.trainable()}

@pytest.mark.parametrize('changes', [{}, PPO, dict(loss_type='dapo', clip_range_high=.28), dict(loss_type='gspo'), dict(scale_rewards='loo')],
    ids=['grpo', 'ppo', 'dapo', 'gspo', 'loo'])
def test_reaches_a_known_optimum(changes):
    t = make(FEW[:2], **changes)
    rewards = [turn(t)['reward_mean'] for _ in range(40)]
    assert rewards[0] < .4 and max(rewards[-5:]) > .9, rewards

@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
def test_lora_trains_the_adapter_and_nothing_else(algorithm):
    t = make(lora_rank=4, beta=.1, **(PPO if algorithm=='ppo' else {}))
    base = {n:p.detach().clone() for n,p in t.policy.model.named_parameters() if not p.requires_grad}
    adapter = weights(t)
    stats = [turn(t) for _ in range(2)]
    assert stats[0]['kl'] < 1e-6 < stats[1]['kl']
    assert all(torch.equal(p, base[n]) for n,p in t.policy.model.named_parameters() if n in base)
    assert any(not torch.equal(adapter[k], v) for k,v in weights(t).items())

@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
def test_same_seed_same_bits(algorithm):
    a,b = (make(**(PPO if algorithm=='ppo' else {})) for _ in range(2))
    assert [turn(a) for _ in range(3)] == [turn(b) for _ in range(3)]
    assert all(torch.equal(x, y) for x,y in zip(weights(a).values(), weights(b).values()))

@pytest.mark.parametrize('changes', [dict(beta=.1), dict(beta=.1, **PPO), dict(loss_type='bnpo', beta=.1, ppo_epochs=2), dict(loss_type='dr_grpo')], ids=['grpo', 'ppo', 'bnpo', 'dr_grpo'])
def test_mini_batch_size_changes_no_gradient(changes):
    "It bounds memory: the weights after a step agree to rounding, for any cut"
    results = []
    for m in (1, 3, 4):
        t = make(batch_size=4, mini_batch_size=m, learning_rate=1e-3, **changes)
        turn(t)
        results.append(torch.cat([o.flatten() for o in weights(t).values()]))
    start = torch.cat([o.flatten() for o in weights(make(batch_size=4, **changes)).values()])
    moved = (results[0]-start).norm()
    assert moved > 0
    for other in results[1:]: assert (other-results[0]).norm() < 2e-3*moved

def test_the_rollout_chunk_changes_no_answer():
    sizes = [dict(batch_size=b, gradient_accumulation_steps=4//b) for b in (1, 2, 4)]
    answers = [[o.tolist() for g in t.rollout(t.examples_of(0)) for o in g.completions] for t in (make(**s) for s in sizes)]
    assert answers[0] == answers[1] == answers[2]

def test_counts_of_steps_and_updates():
    t = make(ppo_epochs=2, num_mini_batches=2, batch_size=2, gradient_accumulation_steps=2)
    turn(t)
    assert (t.steps_done, t.updates_done) == (1, 4)
    assert t.total_updates == 160

def test_reference_pulls_back():
    "A strong KL penalty keeps the policy near its reference"
    free,held = make(FEW[:2]),make(FEW[:2], beta=5.)
    for _ in range(12):
        turn(free)
        held_stats = turn(held)
    with torch.no_grad():
        base = weights(make(FEW[:2]))
        far = [sum((w[k]-base[k]).square().sum() for k in base).sqrt() for w in (weights(free), weights(held))]
    assert far[1] < far[0] and held_stats['kl'] < .2

def test_equal_rewards_teach_nothing():
    t = make(reward=lambda completions, **_: [1.]*len(completions))
    before = weights(t)
    stats = turn(t)
    assert stats['groups_without_signal'] == 1
    assert all(torch.equal(before[k], v) for k,v in weights(t).items())

def test_dynamic_sampling_leaves_out_groups_that_teach_nothing():
    t = make(dynamic_sampling=True, reward=lambda prompts, completions, **_: [1.]*len(completions) if '甲' in prompts[0] else letters(completions), batch_size=4)
    groups = t.rollout(t.examples_of(0))
    cycle = t.begin(groups, t.score(groups))
    assert {groups[i].example.query for part in cycle.plan for i in part} == {'乙？', '丙和丁？', '戊？'}

def test_unscored_answers_teach_nothing():
    t = make(reward=lambda completions, **_: [None, *letters(completions)[1:]])
    groups = t.rollout(t.examples_of(0))
    batch = t.prepare(groups, t.score(groups))
    assert (batch.advantages[::8] == 0).all() and batch.advantages.isfinite().all()

def test_bad_gradients_never_reach_the_weights():
    t = make(max_grad_norm=1.)
    before = weights(t)
    good = t.loss
    t.loss = lambda *a: (lambda l, s: (l*float('nan'), s))(*good(*a))
    for _ in range(3): assert turn(t)['skipped_updates'] == 1
    assert all(torch.equal(before[k], v) for k,v in weights(t).items())
    with pytest.raises(DivergedError, match='not finite'): turn(t)

def test_classic_step():
    "Old TRL's call: queries, responses, scores"
    t = make(**{**PPO, 'num_generations':1})
    queries = [torch.tensor(t.policy.tokenizer.encode(e.query)) for e in FEW]
    groups = t.rollout(FEW)
    stats = t.step(queries, [g.completions[0] for g in groups], [torch.tensor(.1), torch.tensor(.9), .5, -.2])
    assert t.steps_done == 1 and stats['reward_mean'] == pytest.approx(.325) and 'value_loss' in stats
    from finrl_grpo.config import UserError
    with pytest.raises(UserError, match='go together'): t.step(queries, [], [])

def test_early_stop_ends_the_passes():
    t = make(**{**PPO, 'ppo_epochs':4, 'early_stop_kl':1e-9})
    turn(t)
    assert t.updates_done < 4

@pytest.mark.parametrize('kind', ['auto', 'k1', 'k2', 'k3'])
def test_the_kl_in_the_reward_is_the_one_that_was_asked_for(kind, monkeypatch):
    seen,real = [],losses.kl_estimate
    monkeypatch.setattr(losses, 'kl_estimate', lambda logp, ref, kind='k3': (seen.append(kind), real(logp, ref, kind))[1])
    turn(make(**{**PPO, 'beta':.1, 'kl_estimator':kind}))
    assert seen == ['k1' if kind=='auto' else kind]

def test_kl_price_adapts():
    t = make(beta=.1, kl_target=1e-4, kl_horizon=20)
    for _ in range(4): stats = turn(t)
    assert stats['beta'] > .1

# ---- fast forms against plain ones

def step_gradient(t, groups=None):
    "Gradient and statistics of the first update of a step"
    seen = []
    apply = t._apply
    t._apply = lambda stats: (seen.append(torch.cat([p.grad.flatten().clone() for _,p in t.policy.trainable()])), apply(stats))[1]
    groups = groups or t.rollout(t.examples_of(0))
    stats = t.update(groups, t.score(groups))
    return seen[0],stats

def some_silence(prompts, completions, **_):
    "Two of the four questions score all their answers alike"
    return [0.]*len(completions) if prompts[0][0] in '甲戊' else letters(completions)

@pytest.mark.parametrize('changes', [{}, dict(beta=.1), dict(beta=.1, gradient_checkpointing=True, lora_rank=4), dict(beta=.1, **PPO), {**PPO, 'num_generations':1},
    dict(loss_type='gspo', ppo_epochs=2), dict(loss_type='dr_grpo', mask_truncated=True)], ids=['grpo', 'kl', 'lora', 'ppo', 'ppo1', 'gspo', 'truncated'])
def test_packed_and_skipping_change_no_gradient(changes):
    "Gradient to 1e-4 of its length, statistics to 1e-4; `step_kl` is measured on the answers that were computed"
    plain,fast = (make(batch_size=4, reward=some_silence, packed=packed, **changes) for packed in (False, True))
    assert fast.packed and fast.skip_idle and not plain.packed and not plain.skip_idle
    groups = plain.rollout(plain.examples_of(0))
    a,b = step_gradient(plain, groups),step_gradient(fast, groups)
    assert (a[0]-b[0]).norm() <= 1e-4*a[0].norm()
    met = {'step_kl'} if changes.get('ppo_epochs', 1) > 1 and 'algorithm' not in changes else set()
    for k in a[1].keys()-met: assert a[1][k] == pytest.approx(b[1][k], rel=1e-4, abs=1e-4), k

def rows_met(t, groups):
    "Answers that an update sends through the model with gradient"
    met,forward = [],t.forward
    def counted(groups, *args, **kw):
        if torch.is_grad_enabled(): met.append(sum(map(len, groups)))
        return forward(groups, *args, **kw)
    t.forward = counted
    t.update(groups, t.score(groups))
    return sum(met)

@pytest.mark.parametrize('changes,rows', [({}, 16), (dict(beta=.1), 32), (dict(early_stop_kl=10.), 32), ({**PPO, 'ppo_epochs':1}, 32)], ids=['grpo', 'kl', 'early_stop', 'ppo'])
def test_answers_that_move_nothing_are_left_out(changes, rows):
    t = make(batch_size=4, reward=some_silence, **changes)
    assert rows_met(t, t.rollout(t.examples_of(0))) == rows

def test_truncated_answers_are_left_out():
    t = make(batch_size=4, mask_truncated=True, beta=.1, max_new_tokens=40)
    groups = t.rollout(t.examples_of(0))
    finished = sum(f for g in groups for f in g.finished)
    assert 0 < finished < 32 and rows_met(t, groups) == finished

def test_an_update_of_zeros_is_still_an_update():
    "Adam's momentum moves on exactly as when every answer is computed"
    results = []
    for skip in (False, True):
        t = make(batch_size=4)
        turn(t)
        t.skip_idle,t.reward = skip,lambda completions, **_: [1.]*len(completions)
        turn(t)
        results.append(weights(t))
    assert all(torch.equal(a, b) for a,b in zip(results[0].values(), results[1].values()))
