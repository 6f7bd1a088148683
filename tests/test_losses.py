"Parity of the loss functions with TRL, and properties that no single example shows"
import collections, copy, itertools, json, types
from pathlib import Path

import numpy as np, pytest, torch

from finrl_grpo.losses import (AdaptiveKL, aggregate, clip_fraction, gae, group_advantages, has_signal, k1, k2, kl_estimate, kl_loss,
    loss_types, loss_weights, masked_mean, masked_var, policy_loss, policy_ratio, token_rewards, value_loss, whiten)


def batch(seed=0, B=6, T=7, G=3):
    "Right-padded tensors of one update; the log-ratios are wide enough that every clip bites"
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 3, 5, 1, 7, 4])[:B]
    mask = torch.arange(T)[None] < lengths[:,None]
    old = -3*torch.rand(B, T, generator=g)
    logp = (old + .5*torch.randn(B, T, generator=g)).requires_grad_()
    ref = old + .3*torch.randn(B, T, generator=g)
    advantages = torch.tensor([1., -1., .5, -.5, 2., -2.])[:B]
    return types.SimpleNamespace(mask=mask, old=old, logp=logp, ref=ref, advantages=advantages)


# ---- GRPO: loss and gradient equal TRL's own -----------------------------------------------------------------------

@pytest.fixture(scope='module')
def trl_loss():
    "TRL's `_compute_loss` on given log-probs: no model, no dataset, only the attributes it reads"
    from trl.trainer.grpo_trainer import GRPOTrainer

    def run(b, loss_type, level, beta, bias, low, high, delta, max_length):
        t = GRPOTrainer.__new__(GRPOTrainer)
        t.model = types.SimpleNamespace(training=True)
        t.args = types.SimpleNamespace(delta=delta, use_bias_correction_kl=bias, steps_per_generation=1)
        t.accelerator = types.SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x,
            reduce=lambda x, reduction=None: x, pad_across_processes=lambda x, **kw: x)
        t._metrics = {'train': collections.defaultdict(list)}
        t.loss_type, t.importance_sampling_level, t.beta = loss_type, level, beta
        t.epsilon_low, t.epsilon_high, t.max_completion_length = low, high, max_length
        t.current_gradient_accumulation_steps, t.top_entropy_quantile, t.off_policy_mask_threshold = 1, 1., None
        t.use_vllm = t.vllm_importance_sampling_correction = t.aux_loss_enabled = t._entropy_bonus_enabled = False
        t._get_per_token_logps_and_entropies = lambda *a, **kw: (b.logp, torch.zeros_like(b.logp), None)
        ids, mask = torch.ones(b.mask.shape, dtype=torch.long), b.mask.long()
        loss = t._compute_loss(None, dict(prompt_ids=ids[:,:2], prompt_mask=ids[:,:2], completion_ids=ids, completion_mask=mask,
            advantages=b.advantages, old_per_token_logps=b.old, ref_per_token_logps=b.ref, num_items_in_batch=mask.sum()))
        return loss, {k: v[-1] for k, v in t._metrics['train'].items()}
    return run


def our_loss(b, loss_type, level, beta, bias, low, high, delta, max_length):
    per_token = policy_loss(b.logp, b.old, b.advantages, b.mask, loss_type, low, high, delta, level)
    if beta: per_token = per_token + beta*kl_loss(b.logp, b.ref, b.mask, 'k3', b.old if bias else None, level)
    return aggregate(per_token, b.mask, loss_type, max_length=max_length)


settings = list(itertools.product(('token', 'sequence'), (0., .04, 1.), (True, False), (.2, .28, 4.), (None, 1.5)))

@pytest.mark.parametrize('loss_type', ('grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo'))
def test_loss_and_gradient_equal_trl(trl_loss, loss_type):
    "Every combination of level, beta, bias correction, clip-higher and two-sided clip, on three batches"
    for seed, (level, beta, bias, high, delta) in itertools.product(range(3), settings):
        b = batch(seed)
        trl_high = 1+high if loss_type == 'cispo' else high    # TRL's cispo reads epsilon_high as the cap itself
        theirs, _ = trl_loss(b, loss_type, level, beta, bias, .2, trl_high, delta, 9)
        ours = our_loss(b, loss_type, level, beta, bias, .2, high, delta, 9)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        g1, g2 = (torch.autograd.grad(l, b.logp)[0] for l in (ours, theirs))
        torch.testing.assert_close(g1, g2, atol=1e-6, rtol=1e-6)


def test_gspo_is_trl_grpo_at_sequence_level(trl_loss):
    b = batch()
    theirs, _ = trl_loss(b, 'grpo', 'sequence', .04, True, 3e-4, 4e-4, None, 9)
    kl = kl_loss(b.logp, b.ref, b.mask, 'k3', b.old, 'sequence')
    ours = aggregate(policy_loss(b.logp, b.old, b.advantages, b.mask, 'gspo', 3e-4, 4e-4) + .04*kl, b.mask, 'gspo')
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


# ---- advantages ----------------------------------------------------------------------------------------------------

def trl_advantages(rewards, scale):
    "The formula of TRL 1.16 (inline in `_generate_and_score_completions`), rewritten with numpy in double precision"
    r = rewards.double().numpy()
    above = r - np.nanmean(r, 1, keepdims=True)
    if scale == 'group': above = above / (np.nanstd(r, 1, ddof=1, keepdims=True)+1e-4)
    if scale == 'batch': above = above / (np.nanstd(r, ddof=1)+1e-4)
    return torch.tensor(np.nan_to_num(above)).float()


@pytest.mark.parametrize('scale', ('group', 'batch', 'none'))
def test_advantages_equal_trl(scale):
    "With unscored answers, a group scored only once, and groups of equal reward"
    for seed in range(20):
        r = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed))
        r[0,2] = r[1,:3] = torch.nan
        r[2,1:] = torch.nan
        r[3] = .5
        ours = group_advantages(r, scale)
        torch.testing.assert_close(ours, trl_advantages(r, scale), atol=1e-6, rtol=1e-5)
        assert (ours[r.isnan()] == 0).all() and (ours[2:4] == 0).all()


def test_leave_one_out_is_its_definition():
    r = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    byhand = torch.stack([torch.stack([row[i] - torch.cat([row[:i], row[i+1:]]).mean() for i in range(4)]) for row in r])
    torch.testing.assert_close(group_advantages(r, 'loo'), byhand)


@pytest.mark.parametrize('scale', ('group', 'batch', 'none', 'loo'))
def test_equal_rewards_give_exactly_zero(scale):
    "float32 means are not exact: .1 eight times has a mean that is not .1"
    for value in torch.linspace(-1, 1, 401):
        r = torch.stack([value.repeat(7), torch.arange(7.)])
        assert (group_advantages(r, scale)[0] == 0).all()


def test_advantages_of_nothing_scored():
    r = torch.full((3, 4), torch.nan)
    for scale in ('group', 'batch', 'none', 'loo'): assert (group_advantages(r, scale) == 0).all()
    assert not has_signal(r).any()


def test_words_that_do_not_exist_are_refused():
    b = batch()
    with pytest.raises(ValueError, match='scale'): group_advantages(torch.rand(2, 2), 'std')
    with pytest.raises(ValueError, match='level'): policy_ratio(b.logp, b.old, b.mask, 'word')
    with pytest.raises(ValueError, match='kind'): kl_estimate(b.logp, b.ref, 'k4')
    with pytest.raises(ValueError, match='loss_type'): policy_loss(b.logp, b.old, b.advantages, b.mask, 'sapo')
    with pytest.raises(ValueError, match='loss_type'): loss_weights(b.mask, 'sapo')


# ---- micro-batches and padding -------------------------------------------------------------------------------------

@pytest.mark.parametrize('loss_type', loss_types)
def test_micro_batches_never_change_the_gradient(loss_type):
    "Split and trimmed any way, the pieces add up to the whole; double precision, so that rounding cannot hide a factor"
    b = batch()
    logp, old, ref = b.logp.detach().double(), b.old.double(), b.ref.double()
    whole = logp.clone().requires_grad_()
    def loss(logp, i, t, **kw):
        per_token = policy_loss(logp, old[i,:t], b.advantages[i].double(), b.mask[i,:t], loss_type) + .04*kl_loss(logp, ref[i,:t], b.mask[i,:t])
        return aggregate(per_token, b.mask[i,:t], loss_type, **kw)
    loss(whole, slice(None), 7, max_length=7).backward()
    for split in ([[0,1,2], [3,4,5]], [[5], [0,3], [1,2,4]], [[i] for i in range(6)]):
        parts = logp.clone().requires_grad_()
        for i in split:
            t = int(b.mask[i].sum(1).max())
            loss(parts[i,:t], i, t, rows=6, tokens=int(b.mask.sum()), max_length=7).backward()
        torch.testing.assert_close(parts.grad, whole.grad, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize('junk', (torch.nan, torch.inf, -torch.inf, 1e30))
@pytest.mark.parametrize('loss_type', loss_types)
def test_padding_has_no_influence(loss_type, junk):
    "Neither on a value nor on a gradient, whatever stands there"
    b, grads = batch(), []
    for fill in (0., junk):
        pad = lambda x: x.detach().masked_fill(~b.mask, fill).requires_grad_()
        logp, old, ref, values = (pad(o) for o in (b.logp, b.old, b.ref, b.logp))
        advantages, returns = gae(token_rewards(b.advantages, kl_estimate(old, ref).detach(), b.mask, .1), old.detach(), b.mask)
        advantages = whiten(advantages, b.mask)
        per_token = policy_loss(logp, old, advantages, b.mask, loss_type) + .04*kl_loss(logp, ref, b.mask, 'k3', old)
        per_token = per_token + .1*value_loss(values, pad(b.old), returns, b.mask)
        loss = aggregate(per_token, b.mask, loss_type)
        grads.append((loss.detach(), *torch.autograd.grad(loss, (logp, values))))
    for plain, filled in zip(*grads): torch.testing.assert_close(plain, filled, atol=0, rtol=0)


def test_an_empty_answer_is_harmless():
    b = batch()
    b.mask[2] = False
    for loss_type in loss_types:
        per_token = policy_loss(b.logp, b.old, b.advantages, b.mask, loss_type) + kl_loss(b.logp, b.ref, b.mask, 'k3', b.old)
        grad, = torch.autograd.grad(aggregate(per_token, b.mask, loss_type), b.logp)
        assert grad.isfinite().all() and (grad[2] == 0).all()
    assert (token_rewards(b.advantages, b.ref, b.mask, .1)[2] == 0).all()


def test_far_log_ratios_stay_finite():
    "A token the policy has all but forgotten, and one it has learned to insist on"
    logp = torch.tensor([[-200., -1e-3]], requires_grad=True)
    old, mask = torch.tensor([[-1e-3, -200.]]), torch.ones(1, 2)
    for kind in ('k1', 'k2', 'k3'):
        for loss_type in loss_types:
            loss = aggregate(policy_loss(logp, old, torch.tensor([-1.]), mask, loss_type) + kl_loss(logp, old, mask, kind, old), mask, loss_type)
            assert loss.isfinite() and torch.autograd.grad(loss, logp)[0].isfinite().all()


def test_clip_fractions_equal_trl(trl_loss):
    for seed in range(3):
        b = batch(seed)
        _, stats = trl_loss(b, 'dapo', 'token', 0., False, .2, .28, None, 9)
        low, high = clip_fraction(policy_ratio(b.logp, b.old, b.mask), b.advantages, b.mask, .2, .28)
        assert stats['clip_ratio/low_mean'] == pytest.approx(float(low), abs=1e-6)
        assert stats['clip_ratio/high_mean'] == pytest.approx(float(high), abs=1e-6)


# ---- PPO: values recorded from the code of trl 0.11.4 --------------------------------------------------------------

recorded = json.loads((Path(__file__).parent/'data'/'ppo_trl_0_11_4.json').read_text(encoding='utf-8'))

def close(ours, theirs, tol=1e-6): torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=tol, rtol=tol)


@pytest.mark.parametrize('case', recorded['cases'])
def test_ppo_equals_trl_0_11_4(case):
    "Rewards, advantages, returns, both losses and their gradients"
    s, want = types.SimpleNamespace(**case['settings']), case['outputs']
    x = types.SimpleNamespace(**{k: torch.tensor(v) for k, v in case['inputs'].items()})
    mask, logp, vpred = x.mask, x.logp.requires_grad_(), x.vpred.requires_grad_()
    kl = kl_estimate(x.old, x.ref, dict(kl='k1', mse='k2')[s.kl_penalty])
    rewards = token_rewards(x.scores, kl, mask, s.kl_coef)
    close(rewards, torch.tensor(want['rewards'])*mask)
    if s.whiten_rewards: rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, x.values, mask, s.gamma, s.lam)
    close(returns, want['returns'])
    advantages = whiten(advantages, mask)
    close(advantages, want['advantages'])
    policy = aggregate(policy_loss(logp, x.old, advantages, mask, 'ppo', s.cliprange), mask, 'ppo')
    value = s.vf_coef * aggregate(value_loss(vpred, x.values*mask, returns, mask, s.cliprange_value), mask, 'ppo')
    close(policy, want['policy_loss'])
    close(value, want['value_loss_times_coef'])
    (policy+value).backward()
    close(logp.grad, want['grad_logp'])
    close(vpred.grad, want['grad_vpred'])
    close(masked_mean(k2(logp, x.old), mask), want['approxkl'])
    close(masked_mean(k1(x.old, logp), mask), want['policykl'])
    close(sum(clip_fraction(policy_ratio(logp, x.old, mask), advantages, mask, s.cliprange)), want['clipfrac'])
    close(masked_var(returns, mask), want['returns_var'])


def test_adaptive_kl_equals_trl_0_11_4():
    r = recorded['adaptive_kl']
    ours = AdaptiveKL(r['start'], r['target'], r['horizon'])
    for u in r['updates']:
        assert ours.update(u['kl'], u['n']) == pytest.approx(u['value'], rel=1e-12)
        resumed = AdaptiveKL()
        resumed.load_state_dict(json.loads(json.dumps(ours.state_dict())))
        assert vars(resumed) == vars(ours)


def test_gae_is_its_definition():
    "Against the double sum of Schulman et al. (2016), eq. 16, in double precision"
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(4, 9, generator=g).double(), torch.randn(4, 9, generator=g).double()
    lengths = torch.tensor([9, 4, 1, 6])
    mask = torch.arange(9)[None] < lengths[:,None]
    advantages, returns = gae(rewards, values, mask, .97, .9)
    for i, n in enumerate(lengths.tolist()):
        surprise = [rewards[i,t] + .97*(values[i,t+1] if t+1 < n else 0) - values[i,t] for t in range(n)]
        byhand = torch.stack([sum((.97*.9)**(u-t) * surprise[u] for u in range(t, n)) for t in range(n)])
        torch.testing.assert_close(advantages[i,:n], byhand)
        assert (advantages[i,n:] == 0).all() and (returns[i,n:] == 0).all()


def test_a_whole_step_equals_trl_0_11_4():
    "Two calls of its `step()` on a small GPT-2, replayed with these functions: statistics and every weight"
    from transformers import GPT2Config, GPT2LMHeadModel
    saved = json.loads((Path(__file__).parent/'data'/'ppo_step_trl_0_11_4.json').read_text(encoding='utf-8'))
    cfg, pad = types.SimpleNamespace(**saved['config']), torch.nn.utils.rnn.pad_sequence
    weights = {k: torch.tensor(v) for k, v in saved['start'].items()}
    model, head = GPT2LMHeadModel(GPT2Config(**saved['model'])), torch.nn.Linear(8, 1)
    named = {'pretrained_model.'+k: v for k, v in model.named_parameters()} | {'v_head.summary.'+k: v for k, v in head.named_parameters()}
    for k, v in named.items(): v.data.copy_(weights[k])
    reference = copy.deepcopy(model)
    optimizer = torch.optim.Adam(named.values(), lr=cfg.learning_rate)
    price = AdaptiveKL(cfg.init_kl_coef, cfg.target, cfg.horizon)

    def forward(model, queries, responses):
        "Log-probs and values of the responses, right-padded (B, T)"
        ids = pad([torch.tensor(q+r) for q, r in zip(queries, responses)], batch_first=True)
        seen = pad([torch.ones(len(q+r)) for q, r in zip(queries, responses)], batch_first=True)
        out = model(ids, attention_mask=seen, output_hidden_states=True)
        logp = out.logits.log_softmax(-1)[:,:-1].gather(2, ids[:,1:,None])[:,:,0]
        values = head(out.hidden_states[-1])[:,:-1,0]
        spans = [slice(len(q)-1, len(q+r)-1) for q, r in zip(queries, responses)]
        return tuple(pad([row[s] for row, s in zip(x, spans)], batch_first=True) for x in (logp, values))

    for step in saved['steps']:
        queries, responses, scores = step['queries'], step['responses'], torch.tensor(step['scores'])
        mask = pad([torch.ones(len(r), dtype=torch.bool) for r in responses], batch_first=True)
        with torch.no_grad():
            old, old_values = forward(model, queries, responses)
            kl = k1(old, forward(reference, queries, responses)[0])
            advantages, returns = gae(token_rewards(scores, kl, mask, price.value), old_values, mask, cfg.gamma, cfg.lam)
            advantages = whiten(advantages, mask)
        losses = []
        for order in step['permutations']:
            for i in torch.tensor(order).split(cfg.mini_batch_size):
                logp, values = forward(model, [queries[j] for j in i], [responses[j] for j in i])
                m, n = mask[i,:logp.shape[1]], logp.shape[1]
                policy = aggregate(policy_loss(logp, old[i,:n], advantages[i,:n], m, 'ppo', cfg.cliprange), m, 'ppo')
                value = aggregate(value_loss(values, old_values[i,:n], returns[i,:n], m, cfg.cliprange_value), m, 'ppo')
                optimizer.zero_grad()
                (policy + cfg.vf_coef*value).backward()
                optimizer.step()
                losses.append((policy.item(), value.item()))
        mean_kl = (kl*mask).sum(1).mean().item()
        assert price.value == pytest.approx(step['stats']['objective/kl_coef'], rel=1e-6)
        price.update(mean_kl, cfg.batch_size)
        assert mean_kl == pytest.approx(step['stats']['objective/kl'], abs=1e-6)
        assert price.value == pytest.approx(step['kl_coef_after'], rel=1e-6)
        policy, value = torch.tensor(losses).mean(0).tolist()
        assert policy == pytest.approx(step['stats']['ppo/loss/policy'], abs=1e-6)
        assert value == pytest.approx(step['stats']['ppo/loss/value'], abs=1e-6)
        for k, v in named.items():
            counts = torch.ones_like(v, dtype=torch.bool)
            if k.endswith('attn.c_attn.bias'): counts[8:16] = False    # a key bias cancels in the softmax: its gradient is rounding, which Adam inflates
            close(v[counts], torch.tensor(step['after'][k])[counts])


def test_the_trainers_step_equals_trl_0_11_4(monkeypatch):
    "The same two calls through `Trainer.step`: same losses, same order of updates, same weights"
    from transformers import GPT2Config, GPT2LMHeadModel
    from finrl_grpo import trainer
    from finrl_grpo.config import TrainConfig
    from finrl_grpo.models import Policy, ValueHead
    saved = json.loads((Path(__file__).parent/'data'/'ppo_step_trl_0_11_4.json').read_text(encoding='utf-8'))
    old = saved['config']
    config = TrainConfig(model_name='builtin:micro', algorithm='ppo', batch_size=4, gradient_accumulation_steps=1, mini_batch_size=2,
        num_mini_batches=2, ppo_epochs=2, learning_rate=old['learning_rate'], value_learning_rate=old['learning_rate'], weight_decay=0.,
        beta=old['init_kl_coef'], kl_target=old['target'], kl_horizon=old['horizon'], vf_coef=old['vf_coef'], clip_range=old['cliprange'],
        value_clip_range=old['cliprange_value'], gamma=old['gamma'], lam=old['lam'], max_grad_norm=0., warmup_ratio=0., lr_scheduler='constant',
        max_steps=2, use_fp16=False, gradient_checkpointing=False)
    model, head = GPT2LMHeadModel(GPT2Config(**saved['model'])), ValueHead(8)
    named = {'pretrained_model.'+k: v for k, v in model.named_parameters()} | {'v_head.summary.'+k: v for k, v in head.named_parameters()}
    for k, v in named.items(): v.data.copy_(torch.tensor(saved['start'][k]))
    tokenizer = types.SimpleNamespace(pad_token_id=0, eos_token_id=1, batch_decode=lambda o, **kw: ['']*len(o), decode=lambda o, **kw: '')
    t = trainer.Trainer(config, Policy(model, tokenizer, config, value_head=head, frozen=copy.deepcopy(model)), None, [])
    for step in saved['steps']:
        plan = [o.tolist() for order in step['permutations'] for o in torch.tensor(order).split(2)]
        monkeypatch.setattr(trainer, 'update_plan', lambda *a: plan)
        stats = t.step(*([torch.tensor(o) for o in step[k]] for k in ('queries', 'responses')), step['scores'])
        assert stats['policy_loss'] == pytest.approx(step['stats']['ppo/loss/policy'], abs=1e-6)
        assert stats['beta'] == pytest.approx(step['stats']['objective/kl_coef'], rel=1e-6)
        for k, v in named.items():
            counts = torch.ones_like(v, dtype=torch.bool)
            if k.endswith('attn.c_attn.bias'): counts[8:16] = False
            close(v[counts], torch.tensor(step['after'][k])[counts], tol=2e-6)
