"""Killed anywhere and resumed, a run ends with the same bits.

Children train `builtin:micro` and are killed with SIGKILL at random moments: while they load, roll out, learn or save. What they leave
must equal an unbroken run: every row of metrics (but for time and memory), every sampled text, every number of the last checkpoint.
By default a share of the matrix runs; `--slow` runs all of it.
"""
import json, os, random, signal, subprocess, sys, time
import pytest, torch
from finrl_grpo import files
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import TrainConfig
from finrl_grpo.data import demo_examples
from finrl_grpo.run import StopFlag, run_training

SMALL = dict(model_name='builtin:micro', batch_size=2, gradient_accumulation_steps=1, num_generations=2, max_prompt_length=16, max_new_tokens=4, num_mini_batches=1,
    learning_rate=3e-3, use_fp16=False, use_wandb=False, gradient_checkpointing=False, eval_fraction=.8, eval_samples=1, num_train_epochs=3, kl_target=.5)
ROWS = demo_examples()[:20]
CASES = {f'{algorithm}-{"lora" if rank else "full"}-{epochs}':dict(algorithm=algorithm, lora_rank=rank, ppo_epochs=epochs,
    **(dict(num_generations=1) if algorithm=='ppo' else {})) for algorithm in ('grpo', 'ppo') for rank in (0, 2) for epochs in (1, 4)}
ENV = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))

WORKER = '''
import os, sys
exec(os.environ.get('BEFORE', ''))
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.data import demo_examples
from finrl_grpo.run import run_training
sys.exit(run_training(RunFolder.open(sys.argv[1]), demo_examples()[:20], progress=False))
'''

def start(folder, **changes): return RunFolder.create(folder, TrainConfig(**{**SMALL, 'save_steps':2, 'eval_steps':4, **changes}).to_dict(), 'hash')

def child(run, **env): return subprocess.Popen([sys.executable, '-c', WORKER, str(run.path)], env=ENV|env, stderr=subprocess.PIPE, text=True, encoding='utf-8')

def plain(rows): return [{k:v for k,v in r.items() if not k.startswith(('time/', 'system/'))} for r in rows]

def same_end(a, b):
    "Rows, texts, tensors and state of two runs are equal"
    assert plain(a.metrics()) == plain(b.metrics())
    assert a.samples() == b.samples()
    x,y = a.load_checkpoint(),b.load_checkpoint()
    assert x.step == y.step and x.state == y.state and {k:v.keys() for k,v in x.tensors.items()} == {k:v.keys() for k,v in y.tensors.items()}
    for stem,named in x.tensors.items():
        for name,t in named.items(): assert torch.equal(t, y.tensors[stem][name]), (stem, name)

SUICIDE = '''
import os, random, signal, threading, time
def act(rng=random.Random(int(os.environ['SEED'])), folder=os.environ['RUN'], step=int(os.environ['FROM'])):
    while not os.path.exists(folder+'/metrics.jsonl') or sum(1 for _ in open(folder+'/metrics.jsonl', 'rb')) < step: time.sleep(.005)
    time.sleep(rng.random()*float(os.environ['SPREAD']))
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=act, daemon=True).start()
'''

def kill_at_random(run, seed, first, spread):
    "Start a child that kills itself at a random moment after `first` rows are on disk"
    p = child(run, BEFORE=SUICIDE, SEED=str(seed), RUN=str(run.path), FROM=str(first), SPREAD=str(spread))
    p.communicate(timeout=120)
    return p.returncode

def kills_and_resumes(tmp_path, name, kills, **changes):
    "An unbroken run beside one that is killed `kills` times; the number of kills that met it alive"
    settings = CASES[name]|changes
    whole,cut = start(tmp_path/'whole', **settings),start(tmp_path/'cut', **settings)
    began = time.perf_counter()
    assert run_training(whole, ROWS, progress=False) == 0
    per_step,met = (time.perf_counter()-began)/len(whole.metrics()),0
    rng = random.Random(name)
    for i in range(kills):
        first = 0 if i==0 else min(len(cut.metrics())+rng.randint(0, 3), len(whole.metrics())-1)
        met += kill_at_random(cut, f'{i}{sum(map(ord, name))}', first, 3*per_step) == -signal.SIGKILL
    assert run_training(RunFolder.open(cut.path), ROWS, progress=False) == 0
    same_end(whole, cut)
    return met

posix = pytest.mark.skipif(os.name=='nt', reason='needs SIGKILL')

@posix
@pytest.mark.parametrize('name', ['grpo-full-4'])
def test_killed_at_random_moments(tmp_path, name):
    "The share that always runs: in every run a kill before the first row, and a resume of a resume"
    assert kills_and_resumes(tmp_path, name, 2, max_steps=6) >= 1

@posix
@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_killed_at_random_moments_all(tmp_path, name):
    "All of the matrix over three epochs, 32 kills in all; one may come when the run has just ended"
    assert kills_and_resumes(tmp_path, name, 4) >= 2

@pytest.mark.parametrize('name,looks', [('grpo-lora-1', 5), ('ppo-full-4', 2), ('ppo-full-4', 13)])
def test_stopped_in_mid_cycle(tmp_path, name, looks):
    "A stop between two updates keeps the answers in hand; also across the first epoch's end"
    class StopAt(StopFlag):
        def wants_stop(self, save=None):
            self.n = getattr(self, 'n', looks)-1
            self.reason = 'stop' if self.n <= 0 else None
            return self.reason
    from finrl_grpo.run import build_trainer
    whole,cut = (start(tmp_path/o, **CASES[name], max_steps=5) for o in ('whole', 'cut'))
    assert run_training(whole, ROWS, progress=False) == 0
    trainer = build_trainer(TrainConfig.from_dict(cut.config()), ROWS)
    with cut.session():
        trainer.train(cut, stop=StopAt())
        trainer.save(cut)
    assert trainer.steps_done < 5
    assert run_training(cut, ROWS, progress=False) == 0
    same_end(whole, cut)

@posix
def test_killed_before_anything_was_saved(tmp_path):
    "No checkpoint yet: the run starts again at step 0 with the same bits"
    whole,cut = (start(tmp_path/o, max_steps=4, save_steps=100) for o in ('whole', 'cut'))
    assert run_training(whole, ROWS, progress=False) == 0
    kill_at_random(cut, 1, 2, .01)
    assert cut.load_checkpoint() is None and 0 < len(cut.metrics())
    assert run_training(cut, ROWS, progress=False) == 0
    same_end(whole, cut)

def test_the_manifest_says_what_the_bits_rest_on_and_a_change_is_told(tmp_path, monkeypatch, caplog):
    run = start(tmp_path/'run', max_steps=2, save_steps=1)
    assert run_training(run, ROWS, progress=False) == 0
    manifest = json.loads((run.checkpoint_paths()[-1]/'manifest.json').read_text(encoding='utf-8'))
    assert {'machine', 'threads', 'torch', 'python', 'vector_unit'} <= set(manifest['environment'])
    monkeypatch.setattr('finrl_grpo.checkpoint.environment', lambda: manifest['environment']|dict(threads=99, torch='0.0'))
    assert run_training(run, ROWS, progress=False) == 0
    said = caplog.text
    assert 'threads was' in said and 'torch was' in said and 'the same bits are promised no longer' in said

# -- signals ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,code', [('SIGTERM', 75), ('SIGINT', 130)])
def test_first_signal_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys, name, code):
    "The signal comes in the middle of an update; the update is finished, and the end is the same as without it"
    from finrl_grpo.trainer import Trainer
    whole,cut = (start(tmp_path/o, max_steps=3, num_mini_batches=2) for o in ('whole', 'cut'))
    assert run_training(whole, ROWS, progress=False) == 0
    optimize = Trainer.optimize
    def interrupted(self, b):
        if self.updates_done==3: signal.raise_signal(getattr(signal, name))
        return optimize(self, b)
    with monkeypatch.context() as m:
        m.setattr(Trainer, 'optimize', interrupted)
        assert run_training(cut, ROWS, progress=False) == code
    status = cut.status()
    assert status['state'] == 'stopped' and status['exit_code'] == code and 'finrl-grpo resume' in capsys.readouterr().err
    assert run_training(cut, ROWS, progress=False) == 0
    same_end(whole, cut)

def test_second_signal_aborts_but_never_between_two_renames(tmp_path, monkeypatch):
    "Both signals come while best_model is being swapped: the swap is finished, then the run is left at once"
    run,moves = start(tmp_path/'run', max_steps=3, eval_steps=1, save_steps=1),[]
    move = files.move
    def signalling(source, target, *args):
        moves.append(target.name)
        if moves.count('.old-best_model')==1 and target.name=='.old-best_model':
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return move(source, target, *args)
    monkeypatch.setattr('finrl_grpo.checkpoint.move', signalling)
    monkeypatch.setattr('finrl_grpo.run.Trainer.measure_heldout', lambda self, name: None)
    with pytest.raises(KeyboardInterrupt): run_training(run, ROWS, progress=False)
    assert moves[-2:] == ['.old-best_model', 'best_model'] and (run.path/'best_model'/'config.json').is_file()
    assert run.status()['exit_code'] == 130 and not any(run.validate().values())
    monkeypatch.setattr('finrl_grpo.checkpoint.move', move)
    assert run_training(run, ROWS, progress=False) == 0

@posix
@pytest.mark.slow
def test_two_signals_to_a_child(tmp_path):
    "130 at once, and the folder resumes"
    run = start(tmp_path/'run', max_steps=400, num_generations=8, max_new_tokens=48)
    p = child(run)
    while p.poll() is None and len(run.metrics()) < 2: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    p.send_signal(signal.SIGTERM)
    _,err = p.communicate(timeout=60)
    assert p.returncode in (130, 1, -signal.SIGINT) and run.status()['state'] == 'stopped', err
    assert not any(run.validate().values())

# -- the folder ------------------------------------------------------------------------------------

def test_train_on_a_folder_that_holds_a_run_offers_resume(tmp_path, capsys):
    from finrl_grpo import cli
    run = start(tmp_path/'我的 run', max_steps=2)
    cli.main(['demo', '--dataset', str(tmp_path/'demo.jsonl'), '--samples', '24'])
    capsys.readouterr()
    assert cli.main(['train', '--dataset', str(tmp_path/'demo.jsonl'), '--output', str(run.path), '--model', 'builtin:micro']) == 3
    err = capsys.readouterr().err
    assert 'holds a run already' in err and f'finrl-grpo resume {run.path}' in err

def test_two_runs_on_one_folder(tmp_path):
    "The second ends with exit code 4, names the first, and changes nothing"
    from finrl_grpo.config import LockedError
    run = start(tmp_path/'run', max_steps=2)
    with run.lock():
        before = {o.name:o.read_bytes() for o in run.path.iterdir() if o.is_file()}
        with pytest.raises(LockedError, match=str(os.getpid())): run_training(RunFolder.open(run.path), ROWS, progress=False)
        assert {o.name:o.read_bytes() for o in run.path.iterdir() if o.is_file()} == before
    assert LockedError.exit_code == 4

@posix
def test_other_locales_and_clocks(tmp_path):
    "A C locale, a far time zone, Chinese characters and spaces in the path: the same bits"
    whole,cut = start(tmp_path/'whole', max_steps=2),start(tmp_path/'我的 訓練 紀錄', max_steps=2)
    assert run_training(whole, ROWS, progress=False) == 0
    p = child(cut, LC_ALL='C', LANG='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', TZ='Pacific/Kiritimati', BEFORE='import time\nreal = time.time\ntime.time = lambda: 4e9-real()')
    _,err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    same_end(whole, cut)
