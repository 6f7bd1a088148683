"TRL as the engine: nothing is ignored, the run folder is the same, several processes make one run"
import os, subprocess, sys
from dataclasses import fields, replace
import pytest
from finrl_grpo import trl_engine
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.cli import main
from finrl_grpo.config import ConfigError, TrainConfig, UserError
from finrl_grpo.data import demo_examples, load_dataset, write_demo
from finrl_grpo.reward import FinancialRewardModel, RewardBreakdown
from finrl_grpo.trl_engine import ALWAYS, FIXED, KEYS, check_engine, check_settings, check_versions, engine_table, make_plan, trl_settings

pytest.importorskip('trl')
SMALL = dict(model_name='builtin:micro', engine='trl', batch_size=2, mini_batch_size=1, gradient_accumulation_steps=1, num_generations=2, max_prompt_length=32,
    max_new_tokens=8, max_steps=2, ppo_epochs=1, use_fp16=False, use_wandb=False, gradient_checkpointing=False, eval_fraction=.2, eval_samples=3, learning_rate=.01)
ROWS = demo_examples()[:24]

def words(out, data, *more):
    "The command line of a small run"
    flags = [f'--set={k}={v}' for k,v in SMALL.items() if k not in ('engine', 'model_name')]
    return ['train', '--engine', 'trl', '--dataset', str(data), '--output', str(out), '--model', 'builtin:micro', *flags, *more]

@pytest.fixture
def data(tmp_path): return write_demo(tmp_path/'demo.jsonl', 24)

class Toy(FinancialRewardModel):
    "A reward that differs between any two answers of the untrained micro model, so that there is something to learn"
    def score_batch(self, queries, responses, references=None, contexts=None):
        return [RewardBreakdown(sum(map(ord, o))%17/17, .1, .2, .3, .4, answer=o) for o in responses]

# The table

def test_every_setting_has_a_row():
    assert set(KEYS) == set(TrainConfig().to_dict())
    assert all(f'`{k}`' in engine_table() for k in KEYS)

def test_every_name_is_a_field_of_trl():
    "Fails when TRL renames one"
    from trl import GRPOConfig
    known = {f.name for f in fields(GRPOConfig)}
    assert {t for k in KEYS.values() for t in k.to} | {*FIXED, *ALWAYS} <= known

def test_a_renamed_field_is_named():
    c = TrainConfig(**SMALL)
    known = set(trl_settings(c, make_plan(c)))
    with pytest.raises(UserError, match='has no `epsilon`'): trl_settings(c, make_plan(c), tuple(known - {'epsilon'}))

@pytest.mark.parametrize('change', [dict(algorithm='ppo'), dict(kl_estimator='k2'), dict(kl_in='reward', algorithm='ppo'), dict(kl_target=.1), dict(kl_horizon=5),
    dict(early_stop_kl=.1), dict(scale_rewards='loo'), dict(dynamic_sampling=True), dict(gamma=.9), dict(lam=.9), dict(vf_coef=.2), dict(value_clip_range=.1),
    dict(value_learning_rate=.1), dict(whiten_advantages=False), dict(whiten_rewards=True), dict(head_chunk=0), dict(device='cuda:1'),
    dict(save_steps=3), dict(keep_checkpoints=5), dict(warm_start_epochs=1.)], ids=lambda o: '-'.join(o))
def test_what_trl_lacks_is_refused(change):
    with pytest.raises(ConfigError) as e: check_settings(TrainConfig(**SMALL | change))
    assert all(f'`{k}: {v}`' in str(e.value) for k,v in change.items()) and 'native' in e.value.fix

@pytest.mark.parametrize('change,field,value', [(dict(loss_type='gspo'), 'importance_sampling_level', 'sequence'), (dict(loss_type='gspo'), 'loss_type', 'grpo'),
    (dict(loss_type='cispo', clip_range_high=.3), 'epsilon_high', 1.3), (dict(clip_range=.1), 'epsilon_high', .1), (dict(lr_scheduler='constant'), 'lr_scheduler_type', 'constant_with_warmup'),
    (dict(optimizer='adamw_8bit'), 'optim', 'adamw_bnb_8bit'), (dict(min_p=0.), 'min_p', None), (dict(mask_truncated=True), 'mask_truncated_completions', True),
    (dict(max_steps=5, ppo_epochs=3), 'max_steps', 15), (dict(max_steps=5, ppo_epochs=3), 'logging_steps', 3), (dict(warmup_ratio=.5), 'warmup_steps', 1)])
def test_values_are_translated(change, field, value):
    c = TrainConfig(**SMALL | change)
    assert trl_settings(c, make_plan(c))[field] == value

@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_a_step_is_dealt_out_whole(ranks):
    "Whatever the processes, TRL sees the same answers and makes the same number of updates"
    c = TrainConfig(**SMALL | dict(batch_size=4, gradient_accumulation_steps=2, num_generations=4, num_mini_batches=2, ppo_epochs=3))
    p = make_plan(c, ranks, 100)
    said = trl_settings(c, p)
    assert said['per_device_train_batch_size']*said['steps_per_generation']*ranks == p.rows == 32
    assert said['steps_per_generation'] == said['gradient_accumulation_steps']*c.num_mini_batches
    assert p.micro <= c.mini_batch_size*c.generations and said['max_steps'] == p.steps*6

# Bad input

def test_ranks_that_do_not_fit(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '3')
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setattr('finrl_grpo.models.load_policy', None)
    assert main(words(tmp_path/'run', data)) == 2
    said = capsys.readouterr().err
    assert '4 answers a step cannot be dealt out to 3 processes' in said and 'use 1, 2, 4 processes' in said and not (tmp_path/'run').exists()
    monkeypatch.setenv('RANK', '1')
    assert main(words(tmp_path/'run', data)) == 2
    assert capsys.readouterr() == ('', '')

def test_native_engine_is_one_process(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main([o if o!='trl' else 'native' for o in words(tmp_path/'run', data)]) == 2
    assert 'add `--engine trl`' in capsys.readouterr().err and not (tmp_path/'run').exists()

def test_ppo_is_refused_before_a_folder_is_made(tmp_path, data, capsys):
    assert main(words(tmp_path/'run', data, '--algorithm', 'ppo')) == 2
    assert 'TRL has no PPO' in capsys.readouterr().err and not (tmp_path/'run').exists()

def test_missing_and_other_versions(monkeypatch):
    monkeypatch.setattr(trl_engine, 'version', lambda _: '1.12.0')
    assert '1.12.0' in check_versions() and '1.16' in check_versions()
    assert check_engine(TrainConfig(**SMALL)) == [check_versions()]
    monkeypatch.setattr(trl_engine, 'find_spec', lambda name: None if name=='trl' else 1)
    with pytest.raises(UserError, match='pip install "trl>=1.16,<1.17" accelerate datasets'): check_engine(TrainConfig(**SMALL))

def test_the_tested_range_is_what_is_installed():
    assert check_versions() == ''

# Runs

def start(folder, **changes):
    c = TrainConfig(**{**SMALL, **changes})
    return c,RunFolder.create(folder, c.to_dict(), 'hash')

def test_same_folder_as_a_native_run(tmp_path):
    "Same files, names and prompts; the model has learned and loads in plain transformers"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from finrl_grpo.models import load_policy
    from finrl_grpo.run import run_training
    from finrl_grpo.trl_run import train_trl
    c,trl = start(tmp_path/'trl')
    assert train_trl(c, ROWS, trl, Toy(), progress=False) == 0
    _,own = start(tmp_path/'own', engine='native')
    assert run_training(own, ROWS, Toy(), progress=False) == 0
    own_only = {'out_of_memory'} # Recovery that TRL does not have
    assert set(own.stats()) - own_only <= set(trl.stats()) and trl.status()['state'] == own.status()['state'] == 'finished'
    core = {k for k in own.metrics()[0] if not k.startswith(('time/', 'system/'))} - {'policy_loss', 'kl_loss', 'step_kl', 'skipped_updates'}
    assert core <= set(trl.metrics()[0]), core - set(trl.metrics()[0])
    assert [(o['step'], o['prompt'], o['answer'], o['query']) for o in trl.samples()] == [(o['step'], o['prompt'], o['answer'], o['query']) for o in own.samples()]
    assert set(own.samples()[0]) <= set(trl.samples()[0])
    group = [o for o in trl.samples() if o['step']==1 and o['prompt']==0]
    assert len(group) == 2 and abs(sum(o['advantage'] for o in group)) < 1e-5 and trl.metrics()[0]['reward_std'] > 0
    best = AutoModelForCausalLM.from_pretrained(trl.path/'best_model')
    AutoTokenizer.from_pretrained(trl.path/'best_model')
    old = load_policy(replace(c, beta=0.)).model.state_dict()
    assert any(not torch.equal(v, old[k]) for k,v in best.state_dict().items())
    assert trl.stats()['world_size'] == 1

def test_stopped_run_keeps_its_model_and_is_not_resumed(tmp_path, data, capsys):
    from finrl_grpo.trl_run import train_trl
    c,run = start(tmp_path/'run', max_steps=50)
    class Stopper(Toy):
        def score_batch(self, *args):
            run.request('stop')
            return super().score_batch(*args)
    assert train_trl(c, ROWS, run, Stopper(), progress=False) == 75
    assert run.status()['state'] == 'stopped' and 0 < run.status()['step'] < 50 and (run.path/'best_model'/'config.json').is_file()
    rows = load_dataset(data)
    run.write_json('data.json', dict(path=str(data), hash=rows.hash, rows=len(rows), on_bad_row='error', encoding=None))
    capsys.readouterr()
    assert main(['resume', str(run.path)]) == 2
    assert 'cannot go on' in capsys.readouterr().err and run.status()['state'] == 'stopped'

def test_two_processes(tmp_path, data):
    "The issue's own command: world size 2 recorded, one writer, one voice"
    out = tmp_path/'run'
    env = os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', WANDB_MODE='disabled')
    for k in ('RANK', 'WORLD_SIZE'): env.pop(k, None)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0', '-m', 'finrl_grpo.cli']
    r = subprocess.run([*launch, *words(out, data)], env=env, capture_output=True, text=True, encoding='utf-8', timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    run = RunFolder.open(out)
    assert run.stats()['world_size'] == 2 and run.stats()['engine'] == 'trl' and run.stats()['heldout_rows'] == 3
    assert [o['step'] for o in run.metrics()] == [1, 2] and r.stdout.count('plan\n') == 1 and run.status()['state'] == 'finished'
    assert sorted(o.name for o in out.iterdir() if o.suffix != '.log' and o.name != 'run.lock') == ['best_model', 'checkpoints', 'data.json', 'events.jsonl',
        'metrics.jsonl', 'run.json', 'run_status.json', 'samples.jsonl', 'training_config.json', 'training_stats.json']
    assert len(run.events('ended')) == 1

def test_adapter_is_the_one_load_policy_adds():
    from finrl_grpo.models import load_policy
    from finrl_grpo.trl_run import base_policy, lora_config
    c = TrainConfig(**SMALL | dict(lora_rank=2))
    ours,theirs = lora_config(base_policy(c).model, c).to_dict(),load_policy(c).model.peft_config['default'].to_dict()
    for o in (ours, theirs):
        for k in ('target_modules', 'inference_mode', 'base_model_name_or_path', 'runtime_config'): o.pop(k, None)
    assert ours == theirs

@pytest.mark.slow
def test_adapter_run(tmp_path):
    "An adapter is trained, merged into best_model, and the reference is the model without it"
    import torch
    from transformers import AutoModelForCausalLM
    from finrl_grpo.models import load_policy
    from finrl_grpo.trl_run import train_trl
    c,run = start(tmp_path/'run', lora_rank=2, ppo_epochs=2, num_mini_batches=2)
    assert train_trl(c, ROWS, run, Toy(), progress=False) == 0
    assert run.stats()['trainable'] < run.stats()['parameters']/2 and [o['optimizer_step'] for o in run.metrics()] == [4, 8]
    old,new = load_policy(c, trainable=False).model.state_dict(),AutoModelForCausalLM.from_pretrained(run.path/'best_model').state_dict()
    assert old.keys() == new.keys() and any(not torch.equal(old[k], new[k]) for k in old)
    assert run.metrics()[0]['kl'] == pytest.approx(0, abs=1e-3) and run.metrics()[-1]['kl'] > 0

@pytest.mark.slow
def test_sharded_weights_are_gathered_at_the_end(tmp_path, monkeypatch):
    "The path that FSDP and DeepSpeed stage 3 take, on one process that holds everything"
    from transformers import AutoModelForCausalLM
    from finrl_grpo import trl_run
    monkeypatch.setattr(trl_run, 'weights_are_sharded', lambda trainer: True)
    c,run = start(tmp_path/'run', eval_steps=1)
    assert trl_run.train_trl(c, ROWS, run, Toy(), progress=False) == 0
    AutoModelForCausalLM.from_pretrained(run.path/'best_model')
    assert sorted(o.name for o in (run.path/'best_model').iterdir()) == ['config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    assert not any(k.startswith('eval/') for o in run.metrics() for k in o) and run.stats()['heldout_after'] and run.stats()['heldout_before']
    c,run = start(tmp_path/'lora', lora_rank=2)
    with pytest.raises(ConfigError, match='adapter with sharded weights'): trl_run.train_trl(c, ROWS, run, Toy(), progress=False)
