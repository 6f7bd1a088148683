"One row a group against one row an answer: log-probabilities, gradients, decoding"
import warnings
import numpy as np, pytest, torch
from families import config, shake, write_families
from finrl_grpo.logprobs import token_logprobs
from finrl_grpo.models import load_policy
from finrl_grpo.packed import HalvesAttention, check_groups, pack, packed_agrees, packed_error, packed_logprobs, plain_attention, share_attention
from finrl_grpo.rollout import Decoder, Group, QuickLayers, Sampling, SharedDecoder, can_lay_out, decode, decoding_error, half_attention, invert, pick, uniforms

PACKED = 'gpt2', 'llama', 'qwen2', 'qwen3', 'granite', 'gemma3'

@pytest.fixture(scope='session')
def folders(tmp_path_factory): return write_families(tmp_path_factory, PACKED)

def some_groups():
    "Groups of different make, some answers of one token, some far past an 8-token window"
    g = torch.Generator().manual_seed(0)
    draw = lambda k: torch.randint(4, 260, (k,), generator=g)
    return [Group(None, draw(P), [draw(n) for n in C], [], []) for P,C in ((19, (24, 1, 9)), (3, (12,)), (30, (1, 1)), (7, (5, 30, 2, 11)))]

def padded(policy, groups, **kw):
    return token_logprobs(policy, [g.prompt_ids for g in groups for _ in g.completions], [o for g in groups for o in g.completions], **kw)

def gradient(policy, logp):
    grads = torch.autograd.grad(logp.sin().sum(), [p for _,p in policy.trainable()], allow_unused=True)
    return torch.cat([o.flatten() for o in grads if o is not None])

# ---- log-probabilities and gradients

@pytest.mark.parametrize('checkpointing', [False, True], ids=['', 'checkpointing'])
@pytest.mark.parametrize('lora', [0, 4])
@pytest.mark.parametrize('family', PACKED)
def test_packed_equals_padded(folders, family, lora, checkpointing):
    policy,groups = shake(load_policy(config(folders[family], lora_rank=lora, gradient_checkpointing=checkpointing))),some_groups()
    assert share_attention(policy)
    plain,mask = padded(policy, groups)
    packed,packed_mask = packed_logprobs(policy, groups)
    assert torch.equal(mask, packed_mask)
    torch.testing.assert_close(plain, packed, atol=2e-5, rtol=0)
    a,b = gradient(policy, plain),gradient(policy, packed)
    assert (a-b).norm() < 1e-4*a.norm()

@pytest.mark.parametrize('family', ['llama', 'gemma3'])
def test_a_call_without_packing_is_as_before(folders, family):
    policy,groups = load_policy(config(folders[family])),some_groups()
    before = padded(policy, groups)[0]
    share_attention(policy)
    assert torch.equal(before, padded(policy, groups)[0])

def test_an_ignored_window_is_noticed(folders, monkeypatch):
    "What the self-check is for: Gemma-3 without its windows"
    from finrl_grpo import packed
    policy,real = load_policy(config(folders['gemma3'], max_length=64)),packed.plain_attention
    share_attention(policy)
    assert packed_error(policy) < 1e-4
    monkeypatch.setattr(packed, 'plain_attention', lambda q, k, v, sizes, scale, window=None: real(q, k, v, sizes, scale))
    assert packed_error(policy) > 1e-2
    with pytest.warns(UserWarning, match='padded'): assert not packed_agrees(policy)

def test_rounding_is_the_yardstick_in_bf16(folders, monkeypatch):
    "With a fixed tolerance far below a model's own rounding, packing stays; a forgotten window still ends it"
    from finrl_grpo import packed, rollout
    policy,real = load_policy(config(folders['gemma3'], max_length=64, precision='bf16', use_fp16=True)),packed.plain_attention
    monkeypatch.setattr(rollout, 'decoding_error', lambda *a: 0.)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in policy.causal.parameters(): w.copy_(torch.randn(w.shape, generator=g)*.3)
    monkeypatch.setitem(packed.TOLERANCE, 'bf16', 1e-3)
    share_attention(policy)
    assert 1e-3 < packed_error(policy) < packed.tolerance(policy) < .05
    assert packed_agrees(policy)
    monkeypatch.setattr(packed, 'plain_attention', lambda q, k, v, sizes, scale, window=None: real(q, k, v, sizes, scale))
    with pytest.warns(UserWarning, match='padded'): assert not packed_agrees(policy)

def test_a_model_with_its_own_attention_stays_padded(folders):
    policy = load_policy(config(folders['llama']))
    policy.causal.config._attn_implementation = 'eager'
    with pytest.warns(UserWarning, match='PyTorch'): assert not packed_agrees(policy)
    assert policy.causal.config._attn_implementation == 'eager'

@pytest.mark.parametrize('changes', [{}, dict(lora_rank=4), dict(lora_rank=4, load_in_4bit=True), dict(precision='bf16', use_fp16=True)], ids=['full', 'lora', 'qlora', 'bf16'])
def test_self_check_passes_silently(changes):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert packed_agrees(load_policy(config(**changes)))

def test_four_bit_base_trains():
    policy,groups = shake(load_policy(config(lora_rank=4, load_in_4bit=True))),some_groups()
    share_attention(policy)
    a,b = (gradient(policy, f(policy, groups)[0]) for f in (padded, packed_logprobs))
    assert (a-b).norm() < 1e-3*a.norm()

def test_reference_is_packed_too():
    for lora in (0, 4):
        policy,groups = load_policy(config(lora_rank=lora, beta=.1)),some_groups()
        share_attention(policy)
        with torch.no_grad():
            for n,p in policy.trainable(): p.add_(.05)
            with policy.reference() as r: torch.testing.assert_close(padded(r, groups)[0], packed_logprobs(r, groups)[0], atol=2e-5, rtol=0)

def test_values_come_from_the_same_states():
    policy,groups = load_policy(config(algorithm='ppo')),some_groups()
    share_attention(policy)
    with torch.no_grad(): policy.value_head.weight.normal_()
    a,b = padded(policy, groups, with_values=True),packed_logprobs(policy, groups, with_values=True)
    torch.testing.assert_close(a[2], b[2], atol=2e-5, rtol=0)

@pytest.mark.parametrize('dtype,limit', [(torch.float32, 1e-5), (torch.bfloat16, .03)])
def test_two_halves_equal_the_pieces(dtype, limit):
    torch.manual_seed(0)
    sizes = [(70, [40, 0, 33]), (3, [5])]
    n = sum(p+sum(a) for p,a in sizes)
    q,k,v = (torch.randn(1, h, n, 16).to(dtype).requires_grad_() for h in (6, 2, 2))
    found = []
    for attention in (plain_attention, HalvesAttention.apply):
        out = attention(q, k, v, sizes, .25)
        found.append([o.float() for o in (out, *torch.autograd.grad(out.sin().sum(), (q, k, v)))])
    for a,b in zip(*found): assert (a-b).norm() < limit*a.norm()

def test_a_row_holds_every_token_that_predicts_and_no_other():
    groups = some_groups()
    row = pack(groups)
    assert row.ids.shape[1] == sum(len(g.prompt_ids) + sum(len(o)-1 for o in g.completions) for g in groups) == sum(row.pieces)
    assert len(row.places) == len(row.targets) == sum(row.lengths)

# ---- decoding from a prompt stored once

def answers(policy, shared, G=5, prompts=None, ends=(), **kw):
    "Tokens, log-probabilities and ends of a rollout over ragged prompts"
    n = 24
    prompts = prompts or [g.prompt_ids for g in some_groups()]
    u = torch.as_tensor(np.stack([uniforms(0, 0, i, g, n) for i in range(len(prompts)) for g in range(G)]))
    with torch.no_grad(), policy.eval_mode():
        decoder = SharedDecoder(policy, prompts, G, n) if shared else Decoder(policy, prompts, G)
        return decode(decoder, u, Sampling(n, **kw), set(ends))

def same_answers(a, b, limit=1e-4):
    assert [o.tolist() for o in a[0]] == [o.tolist() for o in b[0]] and a[2] == b[2]
    torch.testing.assert_close(torch.cat(a[1]), torch.cat(b[1]), atol=limit, rtol=0)

@pytest.mark.parametrize('lora', [0, 4])
@pytest.mark.parametrize('family', PACKED)
def test_shared_cache_gives_the_answers_of_the_plain_one(folders, family, lora):
    "Ragged prompts, answers past the window, rows and whole prompts leaving"
    policy = shake(load_policy(config(folders[family], lora_rank=lora)))
    share_attention(policy)
    plain = answers(policy, False)
    same_answers(plain, answers(policy, True))
    ends = torch.cat(plain[0]).bincount().topk(12)[1].tolist()
    plain = answers(policy, False, ends=ends)
    assert len({len(o) for o in plain[0]}) > 2 and any(plain[2])
    same_answers(plain, answers(policy, True, ends=ends))

@pytest.mark.parametrize('sampling', [dict(greedy=True), dict(top_p=.8), dict(top_k=5, temperature=.7), dict(min_p=.1)], ids=['greedy', 'top_p', 'top_k', 'min_p'])
@pytest.mark.parametrize('G', [1, 4])
def test_shared_cache_under_every_sampling(folders, G, sampling):
    policy = load_policy(config(folders['qwen3']))
    share_attention(policy)
    same_answers(*(answers(policy, shared, G=G, ends=range(200, 230), **sampling) for shared in (False, True)))

@pytest.mark.parametrize('changes', [dict(lora_rank=4, load_in_4bit=True), dict(algorithm='ppo', num_generations=1), dict(gradient_checkpointing=True)], ids=['qlora', 'ppo', 'checkpointing'])
def test_shared_cache_of_other_policies(changes):
    policy = shake(load_policy(config(**changes)))
    share_attention(policy)
    same_answers(answers(policy, False, ends=range(4, 30)), answers(policy, True, ends=range(4, 30)), limit=1e-3)

@pytest.mark.parametrize('family', PACKED)
def test_the_check_decodes_too(folders, family):
    policy = load_policy(config(folders[family], max_length=64))
    share_attention(policy)
    assert decoding_error(policy, check_groups(policy)) < 1e-4
    policy = load_policy(config(folders[family], max_length=64, precision='bf16', use_fp16=True))
    share_attention(policy)
    assert decoding_error(policy, check_groups(policy)) < .1

def fed(policy, quick):
    "Scores of a decoder that is fed given tokens"
    prompts = [g.prompt_ids for g in some_groups()]
    tokens = torch.randint(4, 260, (6, 2*len(prompts)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), policy.eval_mode():
        decoder = SharedDecoder(policy, prompts, 2, 8, quick)
        found = [decoder.logits]
        for o in tokens:
            decoder.feed(o)
            found.append(decoder.logits)
    return torch.stack(found).log_softmax(-1),decoder

@pytest.mark.parametrize('family', PACKED)
def test_laid_out_matrices_give_the_scores_of_the_layers(folders, family):
    policy = shake(load_policy(config(folders[family], max_length=64, precision='bf16', use_fp16=True)))
    share_attention(policy)
    if not can_lay_out(policy): pytest.skip('no bf16 layouts here')
    (plain,without),(quick,used) = (fed(policy, o) for o in (False, True))
    assert not without.quick.forwards and used.quick.forwards or family=='gpt2'
    assert (plain-quick).abs().mean() < .02 and torch.equal(fed(policy, None)[0], quick)
    assert not any('forward' in vars(m) for m in policy.model.modules())

def test_layouts_follow_the_weights(folders):
    "A decoder made after an update computes with the new weights, and under an adapter only its own layers are replaced"
    policy = load_policy(config(folders['qwen2'], precision='bf16', use_fp16=True))
    share_attention(policy)
    if not can_lay_out(policy): pytest.skip('no bf16 layouts here')
    before = fed(policy, None)[0]
    with torch.no_grad():
        for p in policy.model.parameters(): p.mul_(1.5)
    after = fed(policy, None)[0]
    assert (after-before).abs().mean() > 5*(after-fed(policy, False)[0]).abs().mean()
    lora = load_policy(config(folders['qwen2'], precision='bf16', use_fp16=True, lora_rank=4))
    assert all(o.weight.requires_grad for o,_ in QuickLayers(lora).forwards)
    assert not can_lay_out(load_policy(config(folders['qwen2'])))

@pytest.mark.parametrize('dtype,limit', [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize('train_head', [True, False])
def test_scores_in_pieces_equal_scores_in_chunks(monkeypatch, dtype, limit, train_head):
    from finrl_grpo import logprobs
    torch.manual_seed(0)
    h,W,y = torch.randn(333, 16),torch.randn(200, 16)/4,torch.randint(200, (333,))
    def run(rows, chunk=150):
        monkeypatch.setattr(logprobs, 'piece_rows', lambda *_: rows)
        hidden,weight = h.to(dtype).requires_grad_(),W.to(dtype).requires_grad_(train_head)
        logp = logprobs.selected_logprobs(hidden, logprobs.Head(weight, scale=.5), y, .7, chunk)
        return logp.detach(),*torch.autograd.grad(logp.sin().sum(), [hidden, weight][:1+train_head])
    for rows in (40, 149, 1):
        for a,b in zip(run(0), run(rows)): assert (a-b).float().norm() <= limit*a.float().norm()
    plain = run(0, chunk=0)
    for a,b in zip(plain, run(40)): assert (a-b).float().norm() <= 2*limit*a.float().norm()

@pytest.mark.parametrize('lora', [0, 4])
def test_a_layer_computed_twice_computes_its_attention_once(folders, monkeypatch, lora):
    "In bf16 on a CPU, with the same bits; in fp32 as ever"
    from finrl_grpo import packed
    real,keeps,counted = packed._forward,packed.keeps_attention,[]
    monkeypatch.setattr(packed, '_forward', lambda *a: (counted.append(1), real(*a))[1])
    def run(keep, **kw):
        counted.clear()
        policy = shake(load_policy(config(folders['llama'], lora_rank=lora, gradient_checkpointing=True, **kw)))
        share_attention(policy)
        monkeypatch.setattr(packed, 'keeps_attention', keep)
        return gradient(policy, packed_logprobs(policy, some_groups())[0]),len(counted)
    half = dict(precision='bf16', use_fp16=True)
    (a,twice),(b,once) = run(lambda policy: False, **half),run(keeps, **half)
    assert twice == 2*once and torch.equal(a, b)
    assert run(keeps)[1] == twice

@pytest.mark.parametrize('n', [1, 40, 300])
def test_short_answers_go_backward_in_fp32(n):
    "No further from the truth than bf16's own backward"
    from finrl_grpo.packed import SHORT, _flash, _flash_backward, _own_backward
    torch.manual_seed(0)
    q,k,v,g = (torch.randn(1, 2, n, 16).bfloat16() for _ in range(4))
    def way(f, *x): return [o.float() for o in f(*x, *_flash(*x[1:], 0., True, scale=.25))]
    bf16 = lambda *x: _flash_backward(*x, 0., True, scale=.25)
    truth,own,mine = way(bf16, *(o.float() for o in (g, q, k, v))),way(lambda *x: _own_backward(*x, .25), g, q, k, v),way(bf16, g, q, k, v)
    off = lambda found: sum(float((a-b).norm()) for a,b in zip(found, truth))
    assert off(own) <= off(mine) + 1e-6 and (n < SHORT or off(own) == off(mine))

def test_halves_without_a_fused_kernel(monkeypatch):
    "The form for other devices against the CPU's"
    q,k,v = torch.randn(3, 2, 4, 8),torch.randn(3, 2, 7, 8),torch.randn(3, 2, 7, 8)
    mask = torch.zeros(3, 1, 1, 7).masked_fill_(torch.rand(3, 1, 1, 7) < .3, -1e30)
    class Elsewhere(torch.Tensor):
        device = type('', (), dict(type='elsewhere'))()
    plain = half_attention(q.as_subclass(Elsewhere), k, v, .4, mask)
    for a,b in zip(plain, half_attention(q, k, v, .4, mask)): torch.testing.assert_close(a.as_subclass(torch.Tensor), b, atol=1e-5, rtol=0)

def test_invert_draws_what_pick_draws():
    torch.manual_seed(0)
    for V in (7, 128, 1000, 4099):
        z,u = torch.randn(500, V)*4,torch.rand(500, dtype=torch.float64)
        z[:,::3] = -torch.inf
        z[:,1] = 0
        assert torch.equal(invert(z.exp(), u), pick(z, u))
        edge = invert(z.exp(), torch.tensor([1., 0.], dtype=torch.float64).repeat(250))
        assert (z.gather(1, edge[:,None]) > -torch.inf).all()

def test_rollout_uses_what_the_configuration_says(folders, monkeypatch):
    from finrl_grpo import rollout as R
    made = []
    for name in ('Decoder', 'SharedDecoder'):
        monkeypatch.setattr(R, name, lambda *a, kind=getattr(R, name): (made.append(kind.__name__), kind(*a))[1])
    for packed in (False, True):
        policy = load_policy(config(packed=packed))
        R.rollout(policy, [None], [[5, 6]], 2, Sampling(3))
    assert made[0] == 'Decoder' and made[-1] == 'SharedDecoder'

def test_two_threads_give_the_same_bits_each_time():
    "The prompt's last state predicts the first token of 64 answers, half of them on either thread; their gradients are added in one order"
    policy = load_policy(config('builtin:micro', gradient_checkpointing=False))
    assert share_attention(policy)
    g = torch.Generator().manual_seed(0)
    draw,threads = lambda k: torch.randint(4, 260, (k,), generator=g),torch.get_num_threads()
    groups = [Group(None, draw(9), [draw(40) for _ in range(64)], [], [])]
    torch.set_num_threads(2)
    try: seen = {gradient(policy, packed_logprobs(policy, groups)[0]).numpy().tobytes() for _ in range(25)}
    finally: torch.set_num_threads(threads)
    assert len(seen) == 1
