"""Numbers that went bad, disks that are full, reward functions that fail, and the table of all faults"""
import importlib.util, json, math, threading, time
import pytest, torch
from finrl_grpo import run as run_module
from finrl_grpo.careful import CarefulReward
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import DivergedError, OutputError, TrainConfig, UserError
from finrl_grpo.data import demo_examples
from finrl_grpo.run import run_training
from finrl_grpo.trainer import Trainer

ROWS = demo_examples()[:20]
SMALL = dict(model_name='builtin:micro', batch_size=2, mini_batch_size=2, gradient_accumulation_steps=1, num_generations=2, max_prompt_length=16, max_new_tokens=6, ppo_epochs=2,
    max_steps=5, learning_rate=3e-3, use_fp16=False, use_wandb=False, gradient_checkpointing=False, save_steps=1, eval_steps=9, eval_fraction=0.)

def start(folder, **changes): return RunFolder.create(folder, TrainConfig(**{**SMALL, **changes}).to_dict(), 'hash')
def finite(run): return all(t.isfinite().all() for named in run.load_checkpoint().tensors.values() for t in named.values())

def bad_loss(monkeypatch, when, value=math.nan):
    "Multiply the loss of the updates for which `when(trainer)` holds"
    loss = Trainer.loss
    def broken(self, *args):
        l,stats = loss(self, *args)
        return (l*value, stats) if when(self) else (l, stats)
    monkeypatch.setattr(Trainer, 'loss', broken)

# -- numbers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('value', [math.nan, pytest.param(-math.inf, marks=pytest.mark.slow)])
def test_one_bad_loss_is_left_out_and_told(tmp_path, monkeypatch, value):
    run = start(tmp_path/'run', max_steps=3)
    bad_loss(monkeypatch, lambda t: t.updates_done==3, value)
    assert run_training(run, ROWS, progress=False) == 0
    assert [r['skipped_updates'] for r in run.metrics()] == [0, .5, 0]
    told, = run.events('update_skipped')
    assert told['update'] == 4 and 'not finite' in told['reason'] and finite(run)

@pytest.mark.parametrize('where', ['gradient', 'ratio'])
def test_a_bad_gradient_or_ratio_is_left_out(tmp_path, monkeypatch, where):
    run = start(tmp_path/'run', max_steps=3)
    if where == 'gradient':
        optimize = Trainer.optimize
        def poisoned(self, b):
            name,p = self.policy.trainable()[0]
            hook = p.register_hook(lambda g: g*math.nan if self.updates_done==2 else g)
            try: return optimize(self, b)
            finally: hook.remove()
        monkeypatch.setattr(Trainer, 'optimize', poisoned)
    else:
        stats = Trainer._ratio_stats
        monkeypatch.setattr(Trainer, '_ratio_stats', lambda self, *a: stats(self, *a)|(dict(step_kl=torch.tensor(math.inf)) if self.updates_done==2 else {}))
    assert run_training(run, ROWS, progress=False) == 0
    assert [r['skipped_updates'] for r in run.metrics()] == [0, .5, 0] and finite(run)
    assert ('grad_norm' if where == 'gradient' else 'step_kl') in run.events('update_skipped')[0]['reason']

def test_back_to_the_last_good_checkpoint_once(tmp_path, monkeypatch, capsys):
    "Bad as long as the first seed is in use: the run goes back, takes another seed, and ends well"
    run = start(tmp_path/'run')
    bad_loss(monkeypatch, lambda t: t.cfg.seed==0 and t.updates_done >= 4)
    assert run_training(run, ROWS, progress=False) == 0
    back, = run.events('rolled_back')
    assert back['to'] == 3 and '4 updates in a row' in back['reason'] and 'going back to step 3' in capsys.readouterr().err
    assert [r['step'] for r in run.metrics()] == [1, 2, 3, 4, 5] and finite(run) and run.status()['exit_code'] == 0

def test_a_roll_back_survives_a_resume(tmp_path, monkeypatch):
    "Stopped after it, or not: the same bits"
    results = []
    for name,cut in (('whole', 0), ('cut', 4)):
        run = start(tmp_path/name, max_steps=6)
        with monkeypatch.context() as m:
            bad_loss(m, lambda t: t.cfg.seed==0 and t.updates_done >= 4)
            if cut:
                step = Trainer.one_step
                def until(self, stop, save):
                    if self.steps_done==cut: stop.reason = 'stop'
                    return None if self.steps_done==cut else step(self, stop, save)
                with monkeypatch.context() as n:
                    n.setattr(Trainer, 'one_step', until)
                    assert run_training(run, ROWS, progress=False) == 75
            assert run_training(run, ROWS, progress=False) == 0
        rows = [{k:v for k,v in r.items() if not k.startswith(('time/', 'system/'))} for r in run.metrics()]
        results.append((rows, run.samples(), {k:v.tolist() for k,v in run.load_checkpoint().tensors['policy'].items()}))
    assert results[0] == results[1]

def test_bad_for_ever_is_exit_7_and_the_last_good_checkpoint_loads(tmp_path, monkeypatch):
    run = start(tmp_path/'run')
    bad_loss(monkeypatch, lambda t: t.updates_done >= 4)
    with pytest.raises(DivergedError) as e: run_training(run, ROWS, progress=False)
    assert e.value.exit_code == 7 and run.status()['exit_code'] == 7 and run.stats()['state'] == 'failed'
    assert len(run.events('rolled_back')) == 1 and finite(run)
    assert all(math.isfinite(o['reward_mean']) for o in run.metrics())

def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    "Neither in a checkpoint nor as best model, however it came about"
    run = start(tmp_path/'run', eval_steps=1)
    end = Trainer.end
    def poisoned(self):
        if self.steps_done==2: self.policy.trainable()[0][1].data[0] = math.nan
        return end(self)
    monkeypatch.setattr(Trainer, 'end', poisoned)
    with pytest.raises(DivergedError, match='NaN or infinite'): run_training(run, ROWS, progress=False)
    from safetensors.torch import load_file
    kept = [o for o in run.path.rglob('*.safetensors')]
    assert kept and all(t.isfinite().all() for o in kept for t in load_file(o).values())

def test_a_spike_is_left_out_and_does_not_count_against_the_run():
    from finrl_grpo.guard import NumberGuard
    guard = NumberGuard()
    for i in range(100): assert not guard.judge(i, loss=.1*(i%3), grad_norm=1+.1*(i%5))
    assert 'grad_norm 100 is a spike' in guard.judge(100, loss=.1, grad_norm=100.)
    assert 'loss 9 is a spike' in guard.judge(101, loss=9., grad_norm=1.)
    assert guard.in_a_row == 0 and not guard.judge(102, loss=.1, grad_norm=1.)

def test_the_guard_goes_on_after_a_resume_as_it_was(tmp_path):
    run = start(tmp_path/'run', max_steps=2)
    assert run_training(run, ROWS, progress=False) == 0
    state = run.load_checkpoint().state['guard']
    assert len(state['verdicts']) == 4 and set(state['windows']) == {'loss', 'grad_norm', 'step_kl'}
    from finrl_grpo.guard import NumberGuard
    other = NumberGuard()
    other.load_state_dict(state)
    assert other.state_dict() == state

@pytest.mark.gpu
def test_float16_scales_its_loss(tmp_path):
    "On a card: gradients of a scaled loss equal the plain ones, and an absurd scale comes down by itself"
    run = start(tmp_path/'run', precision='fp16', use_fp16=True)
    assert run_training(run, ROWS, progress=False) == 0
    assert run.load_checkpoint().state['scale']['value'] >= 1 and finite(run)

# -- reward functions of the user ------------------------------------------------------------------

def stored(run):
    path = run.path/'bad_rewards.jsonl'
    return [json.loads(o) for o in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []

def test_one_answer_that_cannot_be_scored_costs_that_answer(tmp_path):
    hit = []
    def once(completions, **_):
        if not hit or completions == hit:
            hit[:] = completions[:1] if not hit else hit
            raise ValueError('cannot read this')
        return [len(o)/10 for o in completions]
    run = start(tmp_path/'run', max_steps=3)
    assert run_training(run, ROWS, once, progress=False) == 0
    row, = stored(run)
    assert row['function'] == 'once' and row['fault'] == 'raised ValueError: cannot read this' and row['step'] == 1 and row['answer'] == hit[0]
    assert [r['unscored'] for r in run.metrics()] == [.25, 0, 0]
    first = [o for o in run.samples() if o['text']==row['answer'] and o['step']==1]
    assert first and first[0]['reward'] is None and first[0]['advantage'] == 0, 'no silent zero'

CASES = dict(raises=(lambda n: 1/0, 'raised ZeroDivisionError'), nan=(lambda n: [math.nan]*n, 'returned nan'), infinite=(lambda n: [math.inf]*n, 'returned inf'),
    text=(lambda n: ['good']*n, "returned 'good', a str"), truth=(lambda n: [True]*n, 'a bool'), length=(lambda n: [1.]*(n+1), 'values for'), nothing=(lambda n: None, 'returned None, not a list'),
    number=(lambda n: 1., 'returned 1.0, not a list'), hangs=(lambda n: time.sleep(30), 'did not return within 0.2 s'))

@pytest.mark.parametrize('name', CASES)
def test_a_reward_function_that_always_fails_is_named(tmp_path, name):
    action,words = CASES[name]
    def mine(completions, **_): return action(len(completions))
    run,before = start(tmp_path/'run'),threading.active_count()
    with pytest.raises(UserError) as e: CarefulReward(mine, run, timeout=.2)(completions=['甲', '乙', '丙', '丁'], query=['問']*4)
    assert 'reward function `mine`' in str(e.value) and words in str(e.value) and 'bad_rewards.jsonl' in str(e.value) and '丁' in str(e.value)
    assert len(stored(run)) == 4 and threading.active_count() <= before+1

def test_a_function_that_hangs_ends_the_run(tmp_path):
    run = start(tmp_path/'run', num_generations=4, reward_timeout=.2)
    with pytest.raises(UserError, match='did not return within 0.2 s'): run_training(run, ROWS, lambda completions, **_: time.sleep(30), progress=False)
    assert run.status()['exit_code'] == 2 and run.stats()['state'] == 'failed' and not run.metrics()

def test_none_says_on_purpose_that_there_is_no_score(tmp_path):
    run = start(tmp_path/'run', max_steps=2)
    assert run_training(run, ROWS, lambda completions, **_: [None]*len(completions), progress=False) == 0
    assert [r['unscored'] for r in run.metrics()] == [1, 1] and len(stored(run)) == 8 and {o['fault'] for o in stored(run)} == {'returned None'}

# -- disks -----------------------------------------------------------------------------------------

def test_too_little_room_is_told_before_the_first_step(tmp_path, monkeypatch):
    import types
    run = start(tmp_path/'run')
    monkeypatch.setattr('finrl_grpo.checkpoint.shutil.disk_usage', lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match='needed for checkpoints') as e: run_training(run, ROWS, progress=False)
    assert e.value.exit_code == 3 and not run.metrics() and not run.checkpoint_paths()

def test_a_disk_that_fills_up_during_a_save_costs_a_checkpoint(tmp_path, monkeypatch):
    import errno
    run,write,tries = start(tmp_path/'run', max_steps=4),run_module.RunFolder._save,[]
    def full(self, step, *args):
        tries.append(step)
        if step==2: raise OSError(errno.ENOSPC, 'No space left on device')
        return write(self, step, *args)
    monkeypatch.setattr(run_module.RunFolder, '_save', full)
    assert run_training(run, ROWS, progress=False) == 0
    failed, = run.events('save_failed')
    assert failed['step'] == 2 and 'No space left' in failed['reason'] and [o['step'] for o in run.ls()] == [3, 4]

# -- the table -------------------------------------------------------------------------------------

def faults_tool(repo):
    spec = importlib.util.spec_from_file_location('faults_tool', repo/'tools'/'faults.py')
    module = importlib.util.module_from_spec(spec)
    import sys
    sys.modules['faults_tool'] = module
    spec.loader.exec_module(module)
    return module

CHEAP = ('cut_half_policy.safetensors_model.safetensors', 'flip_policy.safetensors_model.safetensors', 'unlink_optimizer.safetensors_optimizer.pt', 'EmptyFolder', 'AllBad', 'PickleBomb',
    'Spellings', 'data_cut', 'data_big5', 'data_null', 'data_nan', 'data_empty')

@pytest.mark.skipif(not hasattr(__import__('os'), 'fork'), reason='the injectors need POSIX')
def test_the_table_of_faults_is_current(repo):
    tool = faults_tool(repo)
    assert set(CHEAP) <= set(tool.FAULTS) and tool.stale(CHEAP) == {}
    written = tool.recorded()
    assert {o.what for o in tool.FAULTS.values()} == set(written) and all(o.startswith(tool.GOOD) for o in written.values())

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__('os'), 'fork'), reason='the injectors need POSIX')
def test_every_quick_fault_of_the_table_is_current(repo): assert faults_tool(repo).stale() == {}
