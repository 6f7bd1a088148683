"Parity of the loss functions with TRL, and properties that no single example shows"
import collections, itertools, types
import pytest, torch

from finrl_grpo.losses import (aggregate, clip_fraction, gae, group_advantages, k1, k2, k3, kl_estimate, kl_loss, loss_weights,
    masked_mean, masked_var, policy_loss, policy_ratio, token_rewards, value_loss, whiten)


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


settings = list(itertools.product(('grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo'), ('token', 'sequence'), (0., .04, 1.),
    (True, False), (.2, .28, 4.), (None, 1.5)))

@pytest.mark.parametrize('loss_type', ('grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo'))
def test_loss_and_gradient_equal_trl(trl_loss, loss_type):
    "Every combination of level, beta, bias correction, clip-higher and two-sided clip, on three batches"
    for seed, (kind, level, beta, bias, high, delta) in itertools.product(range(3), settings):
        if kind != loss_type: continue
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
