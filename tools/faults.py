"""The table of faults: what breaks, what we do, and what the Hugging Face Trainer and TRL do under the same injector.

    python tools/faults.py            runs every fault on both sides and writes FAULTS.md
    python tools/faults.py --ours     runs our side of the quick faults and says whether FAULTS.md is current

Each fault is one function per side. It gets an empty folder, injects the fault, lets the library do what it does and says in a few
words what came of it. A side that goes on rightly or stops with a clear message gets ✓, one that loses something gets ✗, one that
does half of it gets ~. Runs on a CPU under Linux; nothing is downloaded.
"""
import argparse, contextlib, io, json, logging, math, multiprocessing, os, pickle, resource, shutil, signal, sys, tempfile, time, warnings
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.update(WANDB_MODE='disabled', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
warnings.filterwarnings('ignore')
TOP = Path(__file__).parent.parent
GOOD,BAD,HALF = '✓','✗','~'

@dataclass
class Fault:
    "One row of the table"
    what:str # The fault, as a reader would meet it
    ours:object # Takes a folder, returns (mark, words)
    theirs:object # The same for the peer
    quick:bool=True # Part of the share that the tests repeat

FAULTS = {}

def fault(what, quick=True):
    "Enter a class with two functions `ours` and `theirs` into the table"
    def enter(cls):
        FAULTS[cls.__name__] = Fault(what, cls.ours, cls.theirs, quick)
        return cls
    return enter

# -- our side ----------------------------------------------------------------------------------------

SMALL = dict(model_name='builtin:micro', batch_size=2, mini_batch_size=2, gradient_accumulation_steps=1, num_generations=2, max_prompt_length=16, max_new_tokens=4, ppo_epochs=1,
    max_steps=4, save_steps=1, eval_fraction=0., learning_rate=1e-3, use_fp16=False, use_wandb=False, gradient_checkpointing=False, packed=False, device='cpu')

def lengths(completions, **_): return [len(o)/10 for o in completions]

def rows():
    from finrl_grpo.data import demo_examples
    return demo_examples()[:4]

def new_run(folder, **changes):
    from finrl_grpo.checkpoint import RunFolder
    from finrl_grpo.config import TrainConfig
    return RunFolder.create(Path(folder)/'run', TrainConfig(**{**SMALL, **changes}).to_dict(), 'faults')

def train(run, reward=lengths):
    "Train quietly; the exit code, also of an exception, and the message"
    from finrl_grpo.checkpoint import exit_code
    from finrl_grpo.run import run_training
    with contextlib.redirect_stderr(io.StringIO()):
        try: return run_training(run, rows(), reward, progress=False),''
        except Exception as e: return exit_code(e),str(e).splitlines()[0]

@contextlib.contextmanager
def unlogged():
    "No log lines for one block: the faults are meant"
    logging.disable(logging.CRITICAL)
    try: yield
    finally: logging.disable(logging.NOTSET)

_base = {}

def our_run(folder):
    "A copy of one finished run with checkpoints of steps 3 and 4"
    from finrl_grpo.checkpoint import RunFolder
    if 'ours' not in _base:
        _base['ours'] = tempfile.TemporaryDirectory()
        train(new_run(_base['ours'].name))
    shutil.copytree(Path(_base['ours'].name)/'run', Path(folder)/'run')
    return RunFolder.open(Path(folder)/'run')

def our_resume(run):
    "What loading says after damage to the newest checkpoint"
    from finrl_grpo.config import CheckpointError
    try:
        with unlogged(): found = run.load_checkpoint()
    except CheckpointError as e: return GOOD,f'exit {e.exit_code}: every reason listed, nothing deleted'
    aside = [o['reason'] for o in run.events('quarantined')]
    return (GOOD if found.step==3 or not aside else BAD),(f'{", ".join(aside)} found; set aside, step {found.step} used' if aside else f'step {found.step} used')

def newest(run): return run.checkpoint_paths()[-1]

# -- the peers' side ---------------------------------------------------------------------------------

def peer_trainer(out, nan_at=(), oom_at=(), sampler=None, callbacks=(), **arguments):
    "A Hugging Face Trainer on a model with one weight: 8 rows, 3 epochs, 12 steps, a checkpoint every 2"
    import torch, transformers
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
    transformers.logging.set_verbosity_error()
    class Config(PretrainedConfig): model_type = 'one_weight'
    class Model(PreTrainedModel):
        config_class = Config
        def __init__(self, config):
            super().__init__(config)
            self.weight,self.calls,self.seen = torch.nn.Linear(1, 1),0,[]
            self.dropout = torch.nn.Dropout(.3)
            self.post_init()
        def _init_weights(self, module): pass
        def forward(self, x=None, number=None):
            self.calls += 1
            self.seen += number.flatten().int().tolist()
            if self.calls in oom_at: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
            loss = (self.weight(self.dropout(x))-2*x).pow(2).mean()
            return dict(loss=loss*math.nan if self.calls in nan_at else loss)
    data = [dict(x=torch.tensor([i/8.]), number=torch.tensor([float(i)])) for i in range(8)]
    class Own(Trainer):
        def _get_train_sampler(self, *args, **kw): return sampler(data) if sampler else super()._get_train_sampler(*args, **kw)
    torch.manual_seed(0)
    settings = dict(per_device_train_batch_size=2, num_train_epochs=3, save_strategy='steps', save_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=.05, seed=7)
    return Own(Model(Config()), TrainingArguments(str(out), **{**settings, **arguments}), train_dataset=data, callbacks=list(callbacks))

def quietly(action):
    "Run a peer without its prints; (result, error as 'Type: text')"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try: return action(),''
        except Exception as e: return None,f'{type(e).__name__}: {" ".join(str(e).split())[:60]}'

def peer_run(folder):
    "A copy of the folder of one finished peer run, without its last checkpoints, and the weight it ended with"
    if 'peer' not in _base:
        _base['peer'] = tempfile.TemporaryDirectory()
        trainer = peer_trainer(_base['peer'].name)
        quietly(trainer.train)
        _base['weight'] = trainer.model.weight.weight.item()
    shutil.copytree(_base['peer'].name, Path(folder)/'peer')
    for o in ('checkpoint-10', 'checkpoint-12'): shutil.rmtree(Path(folder)/'peer'/o)
    return Path(folder)/'peer'

def peer_resume(out):
    "Resume from the newest checkpoint (of step 8) and compare the end with the unbroken run"
    trainer = peer_trainer(out)
    _,error = quietly(lambda: trainer.train(resume_from_checkpoint=True))
    if error: return BAD,f'ends with {error}'
    same = trainer.model.weight.weight.item()==_base['weight']
    return (GOOD if same else BAD),('resumes exactly' if same else 'resumes without a word, other weights at the end')

def cut_half(path): os.truncate(path, path.stat().st_size//2)
def flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 64
    path.write_bytes(data)

# -- damaged checkpoints -----------------------------------------------------------------------------

def damage(what, our_file, peer_file, harm):
    "A fault that is one harm done to one file of the newest checkpoint"
    class Row:
        @staticmethod
        def ours(folder):
            run = our_run(folder)
            harm(newest(run)/our_file)
            return our_resume(run)
        @staticmethod
        def theirs(folder):
            out = peer_run(folder)
            harm(out/'checkpoint-8'/peer_file)
            return peer_resume(out)
    FAULTS[f'{harm.__name__}_{our_file}_{peer_file}'] = Fault(what, Row.ours, Row.theirs)

damage('weights of the newest checkpoint cut in half', 'policy.safetensors', 'model.safetensors', cut_half)
damage('one bit of the weights flipped', 'policy.safetensors', 'model.safetensors', flip)
damage('weights missing', 'policy.safetensors', 'model.safetensors', Path.unlink)
damage('optimizer state missing', 'optimizer.safetensors', 'optimizer.pt', Path.unlink)
damage('optimizer state cut in half', 'optimizer.safetensors', 'optimizer.pt', cut_half)
damage('counters and random state missing', 'state.json', 'rng_state.pth', Path.unlink)
damage('scheduler missing (ours is a counter in the state)', 'state.json', 'scheduler.pt', Path.unlink)
damage('record of the run cut in half', 'state.json', 'trainer_state.json', cut_half)

@fault('an empty folder with a higher step number')
class EmptyFolder:
    def ours(folder):
        run = our_run(folder)
        (run.checkpoints_path/'step-99').mkdir()
        mark,words = our_resume(run)
        return GOOD if 'step 4 used' in words else BAD,words
    def theirs(folder):
        out = peer_run(folder)
        (out/'checkpoint-99').mkdir()
        return peer_resume(out)

@fault('every checkpoint damaged')
class AllBad:
    def ours(folder):
        run = our_run(folder)
        for o in run.checkpoint_paths(): flip(o/'policy.safetensors')
        return our_resume(run)
    def theirs(folder):
        out = peer_run(folder)
        for o in out.glob('checkpoint-*/model.safetensors'): flip(o)
        return peer_resume(out)

class Bomb:
    def __init__(self, trace): self.trace = trace
    def __reduce__(self): return os.mkdir,(self.trace,)

@fault('a pickle that runs code in place of the optimizer state')
class PickleBomb:
    def ours(folder):
        run,trace = our_run(folder),Path(folder)/'exploded'
        (newest(run)/'optimizer.safetensors').write_bytes(pickle.dumps(Bomb(str(trace))))
        mark,words = our_resume(run)
        return (BAD if trace.exists() else mark),words
    def theirs(folder):
        out,trace = peer_run(folder),Path(folder)/'exploded'
        import torch
        torch.save(Bomb(str(trace)), out/'checkpoint-8'/'optimizer.pt')
        _,words = peer_resume(out)
        return (BAD,'runs the code') if trace.exists() else (HALF,f'refuses to run it; {words}')

# -- disks and processes -----------------------------------------------------------------------------

@contextlib.contextmanager
def full_disk(limit):
    "No file may grow beyond `limit` bytes"
    old,before = resource.getrlimit(resource.RLIMIT_FSIZE),signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)

@fault('the disk is full during one save')
class FullDisk:
    def ours(folder):
        from finrl_grpo.checkpoint import RunFolder
        save,run = RunFolder._save,new_run(folder)
        def limited(self, step, *args):
            if step!=2: return save(self, step, *args)
            with full_disk(20_000): return save(self, step, *args)
        RunFolder._save = limited
        try: code,error = train(run)
        finally: RunFolder._save = save
        good = code==0 and len(run.events('save_failed'))==1 and not any(run.validate().values()) and not list(run.checkpoints_path.glob('.tmp*'))
        return (GOOD,'that checkpoint is given up, training goes on, the next save succeeds') if good else (BAD,f'exit {code}: {error}')
    def theirs(folder):
        from transformers import TrainerCallback
        class Limit(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step==3: self.limit.__enter__()
        limit = Limit()
        limit.limit = full_disk(700)
        trainer = peer_trainer(Path(folder)/'peer', callbacks=[limit])
        _,error = quietly(trainer.train)
        limit.limit.__exit__(None, None, None)
        _,again = quietly(lambda: peer_trainer(Path(folder)/'peer').train(resume_from_checkpoint=True))
        return BAD,f'ends with {error.split(":")[0]}; a later resume {"ends with "+again.split(":")[0] if again else "works"}'

def in_fork(action, number=None, ready=None):
    "Run an action in a forked process, send it a signal once `ready()`; its exit code"
    child = multiprocessing.get_context('fork').Process(target=action)
    child.start()
    end = time.monotonic()+120
    while number and child.is_alive() and not ready() and time.monotonic() < end: time.sleep(.02)
    if number and child.is_alive(): os.kill(child.pid, number)
    child.join(120)
    return child.exitcode

def our_signal(folder, number):
    run = new_run(folder, max_steps=2000, save_steps=1000)
    def work():
        code,_ = train(run)
        os._exit(code)
    code = in_fork(work, number, lambda: len(run.metrics()) >= 2)
    saved = run.load_checkpoint()
    return (GOOD if saved else BAD),f'exit {code}, {"state saved" if saved else "nothing saved"}'

def peer_signal(folder, number):
    from transformers import TrainerCallback
    out,mark = Path(folder)/'peer',Path(folder)/'begun'
    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step==2: mark.touch()
            time.sleep(.02)
    def work():
        sys.stderr = io.StringIO()
        try: peer_trainer(out, callbacks=[Slow()], num_train_epochs=500, save_steps=100_000).train()
        except KeyboardInterrupt: os._exit(130)
    code = in_fork(work, number, mark.exists)
    saved = list(out.glob('checkpoint-*'))
    return (GOOD if saved else BAD),f'exit {code}, {"state saved" if saved else "nothing saved"}'

@fault('SIGTERM in the middle of a step', quick=False)
class Terminated:
    def ours(folder): return our_signal(folder, signal.SIGTERM)
    def theirs(folder): return peer_signal(folder, signal.SIGTERM)

@fault('Ctrl-C (SIGINT) in the middle of a step', quick=False)
class Interrupted:
    def ours(folder): return our_signal(folder, signal.SIGINT)
    def theirs(folder): return peer_signal(folder, signal.SIGINT)

@fault('a second run in the same folder')
class TwoRuns:
    def ours(folder):
        from finrl_grpo.checkpoint import RunFolder
        run = our_run(folder)
        with run.lock(): code,error = train(RunFolder.open(run.path))
        return (GOOD if code==4 else BAD),f'exit {code}, names the process that holds it'
    def theirs(folder):
        from transformers import TrainerCallback
        class Second(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step==5: peer_trainer(out).train()
        out = Path(folder)/'peer'
        _,error = quietly(peer_trainer(out, callbacks=[Second()]).train)
        return BAD,error or 'both train and overwrite each other'

# -- exactness ---------------------------------------------------------------------------------------

@fault('killed (SIGKILL) in the second epoch and resumed', quick=False)
class Killed:
    def ours(folder):
        import torch
        whole,run = new_run(Path(folder)/'a', max_steps=6, save_steps=2),new_run(Path(folder)/'b', max_steps=6, save_steps=2)
        def deadly(completions, **_):
            if len(run.metrics()) >= 5: os.kill(os.getpid(), signal.SIGKILL)
            return lengths(completions)
        code = in_fork(lambda: train(run, deadly))
        for o in (whole, run): train(o)
        a,b = (o.load_checkpoint().tensors for o in (whole, run))
        same = all(torch.equal(a[stem][k], b[stem][k]) for stem in a for k in a[stem])
        return (GOOD if same and code==-9 else BAD),'same bits at the end' if same else 'other weights at the end'
    def theirs(folder):
        from trl.trainer.utils import RepeatSampler
        sampler = lambda data: RepeatSampler(data, mini_repeat_count=1, batch_size=2, seed=42)
        whole = peer_trainer(Path(folder)/'a', sampler=sampler)
        quietly(whole.train)
        again = peer_trainer(Path(folder)/'a', sampler=sampler)
        quietly(lambda: again.train(resume_from_checkpoint=str(Path(folder)/'a'/'checkpoint-6')))
        same = again.model.seen==whole.model.seen[12:]
        return (GOOD if same else BAD),"with TRL's sampler: " + ('same order of prompts' if same else 'the first epoch is replayed, other weights at the end')

# -- numbers -----------------------------------------------------------------------------------------

def our_nan(folder, when):
    from finrl_grpo.trainer import Trainer
    loss,run = Trainer.loss,new_run(folder, max_steps=8, save_steps=2)
    def broken(self, *args):
        l,stats = loss(self, *args)
        return (l*math.nan if when(self.updates_done) else l),stats
    Trainer.loss = broken
    try:
        with unlogged(): code,error = train(run)
    finally: Trainer.loss = loss
    finite = all(t.isfinite().all() for named in run.load_checkpoint().tensors.values() for t in named.values())
    return run,code,finite

def peer_nan(folder, calls):
    import torch
    trainer = peer_trainer(Path(folder)/'peer', nan_at=calls)
    _,error = quietly(trainer.train)
    losses = [o['loss'] for o in trainer.state.log_history if 'loss' in o]
    lost = math.isnan(trainer.model.weight.weight.item())
    if error: return BAD,f'ends with {error}'
    return (BAD if lost else GOOD),(f'weights are NaN, logged losses {"finite" if all(map(math.isfinite, losses)) else "NaN"}, checkpoints saved, exit 0' if lost else 'weights stay finite')

@fault('one NaN loss')
class OneNan:
    def ours(folder):
        run,code,finite = our_nan(folder, lambda n: n==3)
        good = code==0 and finite and len(run.events('update_skipped'))==1
        return (GOOD if good else BAD),'update left out and told, weights unchanged by it, training goes on'
    def theirs(folder): return peer_nan(folder, {5})

@fault('NaN losses from some step on')
class ManyNan:
    def ours(folder):
        run,code,finite = our_nan(folder, lambda n: n >= 3)
        good = code==7 and finite and len(run.events('rolled_back'))==1
        return (GOOD if good else BAD),f'back to the last good checkpoint once, then exit {code}; every checkpoint finite'
    def theirs(folder): return peer_nan(folder, set(range(5, 100)))

# -- memory ------------------------------------------------------------------------------------------

WORDS = ['CUDA out of memory. Tried to allocate 2.00 GiB.', 'CUDA error: out of memory', 'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`',
    'cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.', "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", 'DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.',
    'Error out of memory at line 380 in file ops.cu']

@fault('out of memory in the forward pass')
class OutOfMemory:
    def ours(folder):
        import torch
        from finrl_grpo import run as module
        build,small,tight = module.build_trainer,new_run(Path(folder)/'a', batch_size=1, gradient_accumulation_steps=2, mini_batch_size=1),new_run(Path(folder)/'b')
        train(small)
        def check(m, args, kwargs):
            if len(kwargs['input_ids']) > 2: raise torch.OutOfMemoryError(WORDS[0])
        def limited(*args):
            trainer = build(*args)
            trainer.policy.backbone().register_forward_pre_hook(check, with_kwargs=True)
            return trainer
        module.build_trainer = limited
        try:
            with unlogged(): code,error = train(tight)
        finally: module.build_trainer = build
        a,b = (o.load_checkpoint().tensors['policy'] for o in (small, tight))
        same = code==0 and all(torch.equal(a[k], b[k]) for k in a)
        return (GOOD if same else BAD),'same prompts in smaller pieces; same bits as a run that was started with these' if same else f'exit {code}: {error}'
    def theirs(folder):
        _,error = quietly(peer_trainer(Path(folder)/'peer', oom_at={5}).train)
        from trl import GRPOConfig
        _,refused = quietly(lambda: GRPOConfig(str(Path(folder)/'trl'), auto_find_batch_size=True, use_cpu=True, report_to=[]))
        return BAD,f'ends with {error.split(":")[0]}; TRL\'s GRPO ' + ('refuses `auto_find_batch_size`' if refused else 'takes `auto_find_batch_size`, which restarts the run with another batch size')

@fault('the other spellings of out of memory')
class Spellings:
    def ours(folder):
        from finrl_grpo.recover import is_out_of_memory
        known = sum(is_out_of_memory(RuntimeError(o)) for o in WORDS if 'cuDNN' not in o) + is_out_of_memory(MemoryError())
        return (GOOD if known==7 else BAD),f'{known} of 7 recognised'
    def theirs(folder):
        from accelerate.utils.memory import should_reduce_batch_size
        known = sum(should_reduce_batch_size(RuntimeError(o)) for o in WORDS if 'cuDNN' not in o) + should_reduce_batch_size(MemoryError())
        return (GOOD if known==7 else BAD),f'{known} of 7 recognised (accelerate)'

# -- reward functions --------------------------------------------------------------------------------

def our_reward(folder, reward):
    run = new_run(folder, reward_timeout=.5)
    with unlogged(): code,error = train(run, reward)
    return run,code,error

def trl_reward(folder, reward):
    "One step of TRL's GRPOTrainer with a reward function; (loss history, error)"
    from datasets import Dataset
    from finrl_grpo.models import load_tokenizer, load_weights, model_folder
    from trl import GRPOConfig, GRPOTrainer
    import torch
    where = model_folder('builtin:micro')
    arguments = GRPOConfig(str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=4, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, bf16=False, save_strategy='no', logging_steps=1)
    def go():
        trainer = GRPOTrainer(load_weights(where, torch.float32, torch.device('cpu')), [reward], arguments, train_dataset=Dataset.from_dict(dict(prompt=['分析台積電', '公債殖利率'])), processing_class=load_tokenizer(where))
        trainer.train()
        return trainer.state.log_history
    return quietly(go)

def reward_fault(what, action, expected):
    "A reward function that does something else than returning a number for each answer"
    class Row:
        def ours(folder):
            def mine(completions, **_): return action(completions)
            run,code,error = our_reward(folder, mine)
            named = 'reward function `mine`' in error and (run.path/'bad_rewards.jsonl').exists()
            return (GOOD if named else BAD),f'exit {code}: named, with the answer it failed on; all stored'
        def theirs(folder):
            def mine(completions, **_): return action(completions)
            history,error = trl_reward(folder, mine)
            if error: return (HALF if 'mine' in error else BAD),f'TRL ends with {error}'
            return BAD,f'TRL goes on, logged reward {next((o["reward"] for o in history if "reward" in o), None)}'
    FAULTS[f'reward_{expected}'] = Fault(what, Row.ours, Row.theirs)

def _raise(completions): raise ValueError('no such answer')

@fault('a reward function that raises on one answer')
class OneBadAnswer:
    def ours(folder):
        seen = []
        def mine(completions, **_):
            seen.extend(completions[:1] if not seen else [])
            if seen[0] in completions: raise ValueError('no such answer')
            return lengths(completions)
        run,code,error = our_reward(folder, mine)
        first = run.metrics()[0]['unscored'] if run.metrics() else None
        return (GOOD if code==0 and first else BAD),'that answer has no score and is stored; the others are learned from'
    def theirs(folder):
        def mine(completions, **_): return [1/0 if i==0 else 1. for i,_ in enumerate(completions)]
        _,error = trl_reward(folder, mine)
        return (BAD if error else GOOD),f'TRL ends with {error}' if error else 'TRL goes on'

reward_fault('a reward function that always raises', _raise, 'raise')
reward_fault('a reward function that returns text', lambda completions: ['good']*len(completions), 'text')
reward_fault('a reward function that returns NaN', lambda completions: [math.nan]*len(completions), 'nan')
reward_fault('a reward function that returns too many values', lambda completions: [1.]*(len(completions)+1), 'length')

@fault('a reward function that never returns')
class Endless:
    def ours(folder):
        run,code,error = our_reward(folder, lambda completions, **_: time.sleep(30))
        return (GOOD if 'did not return' in error else BAD),f'exit {code} after its time limit, by name'
    def theirs(folder): return BAD,'TRL has no time limit: it waits (read in its source, not run)'

# -- data --------------------------------------------------------------------------------------------

ROW = '{"query": "分析台積電的投資價值", "reference": "毛利率約55%。"}\n'

def data_fault(what, content, name):
    "A data file with a flaw"
    class Row:
        def ours(folder):
            from finrl_grpo.config import UserError
            from finrl_grpo.data import load_dataset
            path = Path(folder)/'data.jsonl'
            path.write_bytes(content)
            try: return BAD,f'{len(load_dataset(path))} rows'
            except UserError as e: return GOOD,str(e).splitlines()[0].replace(str(folder)+'/', '')[:90]
        def theirs(folder):
            from datasets import load_dataset
            path = Path(folder)/'data.jsonl'
            path.write_bytes(content)
            found,error = quietly(lambda: load_dataset('json', data_files=str(path), cache_dir=str(Path(folder)/'cache'))['train'].to_list())
            return BAD,f'datasets: {error}' if error else f'datasets loads {[list(o.values())[0] for o in found]}'
    FAULTS[f'data_{name}'] = Fault(what, Row.ours, Row.theirs)

data_fault('the last line of a data file is cut off', (ROW*2 + ROW[:20]).encode(), 'cut')
data_fault('a data file in Big5', ROW.encode('cp950'), 'big5')
data_fault('a row without a question', (ROW + '{"query": null}\n').encode(), 'null')
data_fault('NaN in a row', (ROW + '{"query": "本益比", "reference": NaN}\n').encode(), 'nan')
data_fault('an empty data file', b'', 'empty')

# -- the outside world -------------------------------------------------------------------------------

@fault('the hub cannot be reached and the model is not on this machine')
class NoHub:
    def ours(folder):
        from finrl_grpo.config import ConfigError, check_model_name
        began = time.monotonic()
        try: check_model_name('microsoft/no-such-model-here')
        except ConfigError as e: return (GOOD if time.monotonic()-began < 5 else BAD),f'exit {e.exit_code} within 5 s, before anything heavy, with what else works'
        return BAD,'goes on'
    def theirs(folder):
        from transformers import AutoTokenizer
        _,error = quietly(lambda: AutoTokenizer.from_pretrained('microsoft/no-such-model-here'))
        return HALF,f'with HF_HUB_OFFLINE=1: {error.split(":")[0]} at once'

# -- the table ---------------------------------------------------------------------------------------

def one(f, side):
    "Run one side of one fault in a folder of its own; a harness that breaks says so"
    with tempfile.TemporaryDirectory() as folder:
        try: mark,words = getattr(f, side)(folder)
        except Exception as e: mark,words = BAD,f'{type(e).__name__}: {e}'
        words = ' '.join(str(words).replace(folder, '…').replace('|', '/').split())
    return f'{mark} {words}'

HEAD = '''# Faults, and what becomes of them

Written by `python tools/faults.py`, which injects each fault into both sides in one process and records what happens: ✓ goes on rightly or stops with
a clear message, ~ does half of it, ✗ loses something or leaves the reader alone. `tests/test_faults.py` repeats our side of the quick ones and fails
when this file is not current; `tests/test_resume.py`, `test_checkpoint.py`, `test_oom.py`, `test_data.py`, `test_monitor.py` and `test_security.py` hold many more.

The peer is the Hugging Face Trainer on a model with one weight (8 rows, 12 steps, a checkpoint every 2, damage done to the checkpoint of step 8),
and TRL's `GRPOTrainer` for reward functions. Versions: {versions}. CPU only: faults of a card (a lost device, a hang in a kernel) are not in the table.

| fault | finrl_grpo | Hugging Face Trainer, TRL |
|---|---|---|
'''

def versions():
    from importlib.metadata import version
    return ', '.join(f'{o} {version(o)}' for o in ('finrl_grpo', 'transformers', 'trl', 'accelerate', 'datasets', 'torch'))

def write(path=TOP/'FAULTS.md'):
    "Run everything and write the table"
    lines = []
    for f in FAULTS.values():
        began = time.monotonic()
        lines.append(f'| {f.what} | {one(f, "ours")} | {one(f, "theirs")} |')
        print(f'{time.monotonic()-began:5.1f} s {lines[-1]}', file=sys.stderr, flush=True)
    Path(path).write_text(HEAD.format(versions=versions()) + '\n'.join(lines) + '\n', encoding='utf-8')

def recorded(path=TOP/'FAULTS.md'):
    "Our column of the written table, by fault"
    cells = [o.strip('| ').split(' | ') for o in Path(path).read_text(encoding='utf-8').splitlines() if o.startswith('| ')]
    return {o[0]:o[1] for o in cells[1:]}

def stale(names=None):
    "Quick faults whose outcome on our side is not what FAULTS.md says"
    was = recorded()
    return {f.what:(was.get(f.what), now) for k,f in FAULTS.items() if f.quick and (names is None or k in names) and (now := one(f, 'ours')) != was.get(f.what)}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ours', action='store_true', help='compare our side of the quick faults with FAULTS.md')
    if not parser.parse_args().ours: write()
    elif found := stale(): sys.exit('\n'.join(f'{k}: {v}' for k,v in found.items()))
