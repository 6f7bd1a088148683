"""Memory: the budget's arithmetic, its formulas against the code as it is now, and what a user may get wrong."""
import json,subprocess,sys
from dataclasses import replace
import pytest
from finrl_grpo import memory, sizes
from finrl_grpo.config import ConfigError, OutOfMemoryError, TrainConfig, load_config
from finrl_grpo.memory import budget_command, estimate, fit, plan, symbols, value_of
from finrl_grpo.sizes import GIB, architecture, card, models_table

small = dict(max_length=256, mini_batch_size=1, num_generations=4, batch_size=2, head_chunk=128)

def off(name, layers, settings):
    "Relative error of each phase against a trace"
    torch = pytest.importorskip('torch')
    torch.set_num_threads(1)
    from finrl_grpo.memread import compare, errors
    return errors(compare(name, layers, settings))

# ---- sizes

@pytest.mark.parametrize('name,parameters,adapter', [('openai-community/gpt2', 124_439_808, None), ('microsoft/DialoGPT-medium', 354_823_168, None),
    ('Qwen/Qwen2.5-0.5B', 494_032_768, 8.80), ('Qwen/Qwen2.5-1.5B', 1_543_714_304, 18.46), ('Qwen/Qwen2.5-3B', 3_085_938_688, 29.93),
    ('Qwen/Qwen2.5-7B', 7_615_616_512, 40.37), ('Qwen/Qwen3-0.6B', 596_049_920, 10.09), ('Qwen/Qwen3-1.7B', 1_720_574_976, 17.43),
    ('Qwen/Qwen3-4B', 4_022_468_096, 33.03), ('meta-llama/Llama-3.2-1B', 1_235_814_400, 11.27), ('meta-llama/Llama-3.2-3B', 3_212_749_824, 24.31),
    ('google/gemma-3-270m', 268_098_176, 3.80), ('google/gemma-3-1b', 999_885_952, 13.05), ('HuggingFaceTB/SmolLM2-135M', 134_515_008, 4.88),
    ('taide/Llama3-TAIDE-LX-8B', 8_030_261_248, 41.94), ('MediaTek-Research/Breeze-7B', 7_487_098_880, 41.94)])
def test_parameters(name, parameters, adapter):
    a = architecture(name)
    assert a.parameters==parameters
    if adapter: assert round(a.adapter_parameters(16)/1e6, 2)==adapter

def test_builtin_sizes_are_those_of_the_models():
    from finrl_grpo import builtin
    for name,shape in (('builtin:micro', builtin.MICRO), ('builtin:tiny', builtin.TINY)):
        a = architecture(name)
        assert dict(hidden_size=a.hidden, intermediate_size=a.intermediate, num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads)==shape
    assert architecture('builtin:tiny').vocab==builtin.RECIPE['vocab']

def test_no_torch_to_ask_for_a_budget():
    code = 'import sys, finrl_grpo.memory as m; m.plan(m.TrainConfig(model_name="Qwen/Qwen2.5-1.5B")); print([o for o in ("torch", "transformers", "matplotlib") if o in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, encoding='utf-8').stdout.strip()=='[]'

def test_model_from_folder_file_configuration_and_live_model(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3Config
    config = Qwen3Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    count = sum(p.numel() for p in model.parameters())
    for given in (tmp_path, str(tmp_path), tmp_path/'config.json', config, config.to_dict(), model): assert architecture(given).parameters==count

def test_broken_folders(tmp_path):
    with pytest.raises(ConfigError, match='config.json'): architecture(tmp_path)
    (tmp_path/'config.json').write_text('{"model_type": "llama"', encoding='utf-8')
    with pytest.raises(ConfigError, match='cannot be read'): architecture(tmp_path)
    (tmp_path/'config.json').write_text('{"model_type": "llama", "hidden_size": 64}', encoding='utf-8')
    with pytest.raises(ConfigError, match='does not say layers'): architecture(tmp_path)

# ---- budget

def test_parts_and_phases_add_up():
    for name in ('Qwen/Qwen2.5-0.5B', 'meta-llama/Llama-3.2-1B', 'microsoft/DialoGPT-medium'):
        b = estimate(name, load_config(lora_rank=8))
        assert sum(b.parts.values())==b.peak_bytes==max(b.phases.values())
        assert b.fits==(b.peak_bytes <= b.card.usable)

def test_phases_that_a_run_does_not_have():
    assert 'reference' not in estimate('Qwen/Qwen2.5-0.5B', TrainConfig(beta=0.)).phases
    assert 'old log-probs' not in estimate('Qwen/Qwen2.5-0.5B', TrainConfig(ppo_epochs=1)).phases
    assert 'old log-probs' in estimate('Qwen/Qwen2.5-0.5B', TrainConfig(ppo_epochs=1, algorithm='ppo')).phases

@pytest.mark.parametrize('key,value', [('max_length', 1024), ('mini_batch_size', 4), ('num_generations', 16), ('head_chunk', 4096), ('batch_size', 16), ('lora_rank', 64)])
def test_more_of_anything_never_needs_less(key, value):
    c = TrainConfig(lora_rank=16, max_length=512, mini_batch_size=2)
    more = replace(c, **{key:value})
    for phase,n in estimate('Qwen/Qwen2.5-1.5B', c).phases.items(): assert estimate('Qwen/Qwen2.5-1.5B', more).phases[phase] >= n

def test_formulas_use_known_symbols():
    s,F = symbols(architecture('Qwen/Qwen2.5-0.5B'), TrainConfig(lora_rank=4)),memory.formulas()
    products = {k for kind in ('body', 'packed') for body in F[kind].values() for m,v in body.items() if m not in ('under', 'single') for f in v for k in f}
    assert products and all(value_of({k:(1, 0)}, s) > 0 for k in products)

def test_display_is_self_contained():
    html = estimate('Qwen/Qwen2.5-1.5B')._repr_html_()
    assert '<script' not in html and 'src=' not in html and 'currentColor' in html and '#000' not in html and '#fff' not in html

# ---- formulas against the code as it is now

@pytest.mark.parametrize('name,more', [('Qwen/Qwen2.5-0.5B', {}), ('Qwen/Qwen2.5-1.5B', dict(lora_rank=16, load_in_4bit=True)), ('meta-llama/Llama-3.2-1B', dict(algorithm='ppo', lora_rank=8)),
    ('microsoft/DialoGPT-medium', dict(lora_rank=16)), ('Qwen/Qwen3-0.6B', dict(gradient_checkpointing=False, lora_rank=8)), ('google/gemma-3-1b', dict(lora_rank=8, head_chunk=0)), ('Qwen/Qwen2.5-0.5B', dict(lora_rank=16, packed=False))])
def test_formulas_still_describe_the_code(name, more):
    found = off(name, 2, small|more)
    assert max(map(abs, found.values())) < .05, f'{found}: read the formulas again, see finrl_grpo.memread.derive'

def real_and_predicted(no_grad=True, ends=False, value=1., **settings):
    "Peaks of a whole real step of a small model on the CPU, and the budget's"
    torch = pytest.importorskip('torch')
    import transformers
    from finrl_grpo import models
    from finrl_grpo.data import Example
    from finrl_grpo.memtrace import hf_config, watch_step
    from finrl_grpo.trainer import Trainer
    a = sizes.Architecture('small', 'qwen2', 3, 128, 4, 2, 32, 384, 1024)
    c = TrainConfig(**dict(use_fp16=False, max_length=192, max_new_tokens=96, batch_size=4, gradient_accumulation_steps=2, ppo_epochs=2, head_chunk=256, max_steps=2) | settings)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(a), attn_implementation='sdpa')
    policy = models.Policy(model, models.load_tokenizer(models.model_folder('builtin:micro')), c, a.name, 'fp32')
    models.make_trainable(policy)
    if not ends: policy.tokenizer.eos_token = model.generation_config.eos_token_id = None
    trainer = Trainer(c, policy, lambda completions, **_: [value]*len(completions), [Example('定期定額投資台股的優點與風險是什麼？'*8)]*8)
    groups = trainer.rollout(trainer.examples_of(0))
    trainer.update(groups, trainer.score(groups))
    if not no_grad:
        from finrl_grpo.memtrace import Ledger, held_tensors
        ledger = Ledger()
        ledger.known(held_tensors(policy))
        ledger.enter('rollout')
        with ledger: trainer.rollout(trainer.examples_of(1))
        state = sum(t.numel()*4 for p in (p for _,p in policy.trainable()) for t in (p.grad, *(v for v in trainer.optimizer.state[p].values() if v.dim())))
        real = dict(rollout=ledger.peaks['rollout'] + state)
    else: real = watch_step(trainer).phases
    budget = estimate(a, c, 'this')
    return {k:budget.tensor_bytes(memory.NAMES[k])/n for k,n in real.items()}

@pytest.mark.parametrize('settings', [dict(), dict(algorithm='ppo'), dict(packed=False, algorithm='ppo')])
def test_real_step_on_the_cpu(settings):
    ratios = real_and_predicted(**settings)
    assert set(ratios)=={'rollout', 'reference', 'old', 'update'} and all(.95 < r < 1.05 for r in ratios.values()), ratios

def test_real_rollout_on_the_cpu():
    ratios = real_and_predicted(no_grad=False, algorithm='ppo')
    assert all(.95 < r < 1.05 for r in ratios.values()), ratios

def test_answers_left_out_and_early_ends_stay_under_the_bound():
    ratios = real_and_predicted(ends=True, beta=0.)
    assert all(r > .97 for r in ratios.values()), ratios

@pytest.mark.slow
def test_the_whole_sweep():
    pytest.importorskip('torch').set_num_threads(1)
    from finrl_grpo.memread import compare, errors, sweep
    found = [abs(e) for row in sweep() for e in errors(compare(*row)).values()]
    assert len(sweep()) >= 30 and sum(found)/len(found) < .02 and max(found) < .05

# ---- fit

@pytest.mark.parametrize('name', ['Qwen/Qwen2.5-0.5B', 'Qwen/Qwen2.5-1.5B', 'Qwen/Qwen2.5-7B', 'taide/Llama3-TAIDE-LX-8B', 'google/gemma-3-1b'])
def test_fit_keeps_the_effective_batch_and_fits(name):
    c = TrainConfig(model_name=name, batch_size=16, mini_batch_size=16, max_length=1024, gradient_checkpointing=False)
    b = plan(c)
    assert b.fits and estimate(b.config).fits
    for key in ('prompts_per_step', 'generations', 'ppo_epochs', 'num_mini_batches', 'beta', 'model_name', 'learning_rate'): assert getattr(b.config, key)==getattr(c, key)
    assert {o['setting'] for o in b.changes} >= {k for k in c.to_dict() if getattr(c, k)!=getattr(b.config, k)} - {'gradient_accumulation_steps'}

def test_what_fits_is_left_alone():
    c = load_config(preset='rtx4070-qlora')
    assert fit(c) is c and plan(c).changes==[]

def test_changes_add_up_to_what_was_saved():
    c = TrainConfig(model_name='Qwen/Qwen2.5-7B', mini_batch_size=4)
    b = plan(c)
    saved = sum(o['saves_bytes'] for o in b.changes if o['phase']=='update')
    assert saved==estimate(c).phases['update']-b.phases['update']

def test_what_cannot_fit():
    with pytest.raises(OutOfMemoryError, match='smallest possible need') as e: fit(TrainConfig(model_name='Qwen/Qwen2.5-7B', max_length=32768))
    assert e.value.exit_code==5 and 'a smaller model fits, e.g. ' in str(e.value)

@pytest.mark.parametrize('wrong,message', [(dict(model='Qwen/Qwen2.5-1.6B'), '`Qwen/Qwen2.5-1.5B`'), (dict(card='rtx4071'), 'rtx4070'), (dict(set_=['max_length=4']), 'least'),
    (dict(model='gpt2', set_=['max_length=5000']), '1024 positions'), (dict(model='gpt2', set_=['load_in_4bit=true']), 'without an adapter'), (dict(model='gpt2', set_=['max_lenght=5']), 'max_length')])
def test_mistakes(wrong, message):
    with pytest.raises(ConfigError) as e: budget_command(**wrong)
    assert message in str(e.value)

# ---- command

def test_command_json(capsys):
    assert budget_command('Qwen/Qwen2.5-7B', set_=['lora_rank=8'], json_=True)==0
    d = json.loads(capsys.readouterr().out)
    assert {'model', 'card', 'card_bytes', 'usable_bytes', 'parameters', 'parts', 'phases', 'peak_bytes', 'fits', 'changes'} <= set(d)
    assert not d['fits'] and d['changes'] and d['peak_bytes']==max(d['phases'].values())

def test_command_reports_what_cannot_fit(capsys):
    assert budget_command('Qwen/Qwen2.5-7B', set_=['max_length=32768'])==0
    assert 'smallest possible need' in capsys.readouterr().out
    assert budget_command('Qwen/Qwen2.5-7B', set_=['max_length=32768'], json_=True)==0
    assert 'smallest possible need' in json.loads(capsys.readouterr().out)['smallest_need']

def test_command_on_this_machine(capsys):
    assert budget_command('builtin:tiny', preset='quickstart', card='this')==0
    assert 'builtin:tiny' in capsys.readouterr().out

# ---- in a run

def little_machine(monkeypatch, mib):
    "This machine has so much memory and no card"
    monkeypatch.setattr(sizes, 'this_machine', lambda: sizes.Card('this', 'a little machine', mib*sizes.MIB, None, None, '', 0, 0))

def train(tmp_path, *more):
    from finrl_grpo.cli import guarded, run_command
    (tmp_path/'rows.jsonl').write_text('\n'.join(json.dumps(dict(query=f'台積電第{i}季的本益比是多少？', reference='約二十倍。'), ensure_ascii=False) for i in range(24)), encoding='utf-8')
    return guarded(run_command, ['train', '--dataset', str(tmp_path/'rows.jsonl'), '--output', str(tmp_path/'run'), '--model', 'builtin:tiny', '--dry-run', *more])

def test_train_fit_changes_nothing_that_fits(tmp_path, monkeypatch, capsys):
    little_machine(monkeypatch, 64_000)
    assert train(tmp_path, '--fit')==0
    assert 'nothing has to change' in capsys.readouterr().err

def test_train_fit_says_what_it_changes(tmp_path, monkeypatch, capsys):
    asked = ('--set', 'use_fp16=false', '--set', 'mini_batch_size=4', '--set', 'head_chunk=4096')
    c = load_config(model_name='builtin:tiny', use_fp16=False, mini_batch_size=4, head_chunk=4096)
    little_machine(monkeypatch, estimate(None, c, 'this').peak_bytes//sizes.MIB)
    assert train(tmp_path, *asked, '--fit')==0
    out = capsys.readouterr()
    assert 'fit: ' in out.err and 'saves' in out.err

def test_train_fit_ends_with_5_when_nothing_helps(tmp_path, monkeypatch, capsys):
    little_machine(monkeypatch, 8)
    assert train(tmp_path, '--fit')==5
    assert 'smallest possible need' in capsys.readouterr().err
    assert not (tmp_path/'run').exists()

def test_a_run_says_its_budget_and_keeps_both_peaks(tmp_path, capsys):
    pytest.importorskip('torch')
    from finrl_grpo.checkpoint import RunFolder
    from finrl_grpo.data import Example
    from finrl_grpo.run import run_training
    c = TrainConfig(model_name='builtin:micro', batch_size=2, gradient_accumulation_steps=1, num_generations=2, max_prompt_length=32, max_new_tokens=8, ppo_epochs=1,
        max_steps=1, use_fp16=False, use_wandb=False)
    run = RunFolder.create(tmp_path/'run', c.to_dict(), 'hash')
    assert run_training(run, [Example('台積電的本益比是多少？')]*2, lambda completions, **_: [float(len(o)) for o in completions])==0
    assert [o for o in capsys.readouterr().err.splitlines() if o.startswith('memory: builtin:micro fits')]
    stats = run.stats()
    assert stats['predicted_peak_bytes'] > 0 and stats['measured_peak_bytes'] > 0 and stats['measured_peak_of'] in ('process', 'tensors on the card')

def test_no_budget_line_for_what_has_no_formulas():
    assert memory.budget_line(TrainConfig(model_name='nobody/knows-this'))==''
    assert memory.peak_figures(TrainConfig(model_name='nobody/knows-this'), [])==dict(predicted_peak_bytes=None, measured_peak_bytes=None, measured_peak_of=None)
