"""The run folder under attack: kills, full disks, flipped bits, two writers. One test a clause of the recovery contract."""
import builtins, errno, json, math, os, re, shutil, signal, subprocess, sys, textwrap, types
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file
from finrl_grpo import checkpoint, files
from finrl_grpo.checkpoint import RunFolder, ckpt_command, exit_code, preflight, step_order, take_lock
from finrl_grpo.config import CheckpointError, LockedError, OutputError
from finrl_grpo.files import (NonFiniteError, append_rows, cut_rows, find_fault, move, pack, plain, random_state, read_rows, read_tensors, seal,
    set_random_state, sync_folder, unpack, write_atomic, write_tensors)

posix = pytest.mark.skipif(os.name == 'nt', reason='needs fork and signals')
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def tensors_of(step): return dict(policy=dict(w=torch.arange(5.)+step, b=torch.tensor([step/3])), rollout=dict(ids=torch.arange(step+1)))
def state_of(step): return dict(step=step, lr=.1/step, schedule=(step, {0: 'x'}), rng=torch.arange(step, dtype=torch.uint8))

def is_state_of(found, step):
    "Did exactly what was saved at `step` come back?"
    same = all(torch.equal(found.tensors[k][n], t) for k,named in tensors_of(step).items() for n,t in named.items())
    want = state_of(step)
    return same and found.step == step and torch.equal(found.state.pop('rng'), want.pop('rng')) and found.state == want

def save(run, step, keep=2): return run.save_checkpoint(step, tensors_of(step), state_of(step), keep=keep)

@pytest.fixture
def run(tmp_path): return RunFolder.create(tmp_path/'run', dict(model_name='builtin:micro', seed=0), 'd'*64)

@pytest.fixture(autouse=True, scope='module')
def quick_disk():
    "A killed process loses nothing that the system holds, so waiting for the disk tests nothing here; that it is asked for is tested below"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, 'fsync', lambda fd: None)
        yield

def names(run): return sorted(o.name for o in run.checkpoints_path.iterdir())

# -- a process that dies at any of its disk operations ---------------------------------------------

class Killed(BaseException): "Stands for SIGKILL: no `except Exception` and no `except OSError` sees it"

class DyingDisk:
    "Counts disk operations and dies in the middle of the one it is told to, leaving `share` of a write behind"
    def __init__(self, at=10**9, share=.5, die=None):
        self.count,self.at,self.share,self.die = 0,at,share,die or self.raise_killed
        self.real = {name:getattr(os, name) for name in ('replace', 'fsync', 'unlink', 'rmdir', 'mkdir')}

    def raise_killed(self): raise Killed

    def tick(self):
        self.count += 1
        if self.count > self.at: self.die()

    def __enter__(self):
        for name,f in self.real.items(): setattr(os, name, self.wrap(f))
        files.open = self.open
        return self

    def __exit__(self, *_):
        for name,f in self.real.items(): setattr(os, name, f)
        del files.open

    def wrap(self, f):
        def call(*args, **kwargs):
            self.tick()
            return f(*args, **kwargs)
        return call

    def open(self, *args, **kwargs):
        f = builtins.open(*args, **kwargs)
        if 'x' not in f.mode and 'a' not in f.mode: return f
        write = f.write
        def half_then_die(data):
            self.count += 1
            if self.count <= self.at: return write(data)
            write(bytes(data)[:int(len(data)*self.share)])
            if hasattr(f, 'flush'): f.flush()
            self.die()
        return Spy(f, half_then_die)

class Spy:
    "A file whose `write` is somebody else's"
    def __init__(self, f, write): self.f,self.write = f,write
    def __enter__(self): return self
    def __exit__(self, *_): self.f.close()
    def __getattr__(self, name): return getattr(self.f, name)

def two_saves(run):
    for step in (3, 4):
        run.append_metrics(dict(step=step, reward_mean=step/7))
        save(run, step)

def prepare(folder):
    run = RunFolder.create(folder, dict(seed=0), 'd'*64)
    for step in (1, 2):
        run.append_metrics(dict(step=step, reward_mean=step/7))
        save(run, step)
    return run

def check_recovery(folder):
    "What a new process finds is whole, at most one step back, and can be gone on from"
    run = RunFolder.open(folder)
    with run.lock():
        found = run.load_checkpoint()
        step = found.step
        assert 2 <= step <= 4 and is_state_of(found, step)
        run.truncate(step)
        assert [o['step'] for o in run.metrics()] == list(range(1, step+1))
        assert not [o for o in names(run) if o.startswith('.')], 'nothing half-done is left'
        assert not [o for o in names(run) if 'corrupt' in o], 'a kill is no damage'
        for later in range(step+1, 6):
            run.append_metrics(dict(step=later, reward_mean=later/7))
            assert save(run, later)
    assert is_state_of(RunFolder.open(folder).load_checkpoint(), 5)
    assert [o['step'] for o in run.metrics()] == [1, 2, 3, 4, 5]
    return step

@pytest.fixture(scope='module')
def operations(tmp_path_factory):
    "Disk operations that two saves take"
    run = prepare(tmp_path_factory.mktemp('count')/'run')
    with DyingDisk() as disk: two_saves(run)
    return disk.count

def test_there_are_many_places_to_die(operations): assert operations > 50

@relaxed
@given(where=st.floats(0, 1, exclude_max=True), share=st.floats(0, 1))
def test_any_prefix_of_the_writes_resumes(tmp_path_factory, operations, where, share):
    folder = tmp_path_factory.mktemp('prefix')/'run'
    run = prepare(folder)
    with pytest.raises(Killed), DyingDisk(int(where*operations), share): two_saves(run)
    check_recovery(folder)

@posix
def test_sigkill_at_every_file_boundary(tmp_path, operations):
    seen = set()
    for at in range(operations):
        folder = tmp_path/f'run-{at}'
        run = prepare(folder)
        child = os.fork()
        if child == 0:
            try:
                with DyingDisk(at, .5, die=lambda: os.kill(os.getpid(), signal.SIGKILL)): two_saves(run)
            finally: os._exit(1)
        _,code = os.waitpid(child, 0)
        assert os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGKILL, at
        seen.add(check_recovery(folder))
        shutil.rmtree(folder)
    assert seen == {2, 3, 4}

@posix
def test_killed_before_the_run_existed(tmp_path):
    with DyingDisk() as disk: RunFolder.create(tmp_path/'whole', dict(seed=0), '')
    for at in range(disk.count):
        folder = tmp_path/f'run-{at}'
        with pytest.raises(Killed), DyingDisk(at): RunFolder.create(folder, dict(seed=0), '')
        if not (folder/'run.json').exists(): RunFolder.create(folder, dict(seed=0), '')
        run = RunFolder.open(folder)
        with run.lock(): assert run.load_checkpoint() is None and run.config() == dict(seed=0)
        assert not list(folder.glob('.tmp*'))

def test_a_staged_folder_is_the_old_or_the_new_one(tmp_path):
    def replace(run, text):
        with run.staged('best_model') as folder: write_atomic(folder/'config.json', text)
    run = prepare(tmp_path/'count')
    replace(run, 'old')
    with DyingDisk() as disk: replace(run, 'new')
    seen = set()
    for at in range(disk.count):
        run = prepare(tmp_path/f'run-{at}')
        replace(run, 'old')
        with pytest.raises(Killed), DyingDisk(at): replace(run, 'new')
        with RunFolder.open(run.path).lock(): seen.add((run.path/'best_model'/'config.json').read_text(encoding='utf-8'))
        assert not list(run.path.glob('.*'))
    assert seen == {'old', 'new'}

def test_everything_reaches_the_disk_before_the_name_does(run, monkeypatch):
    run.append_metrics(dict(step=1))
    log,real = [],os.replace
    def replace(a, b):
        log.append(('replace', Path(b).name))
        return real(a, b)
    monkeypatch.setattr(os, 'fsync', lambda fd: log.append(('fsync', Path(os.readlink(f'/proc/self/fd/{fd}')).name if sys.platform == 'linux' else '')))
    monkeypatch.setattr(os, 'replace', replace)
    save(run, 1)
    if sys.platform != 'linux': return
    renamed = log.index(('replace', 'step-1'))
    before = [name for kind,name in log[:renamed] if kind == 'fsync']
    parts = ['policy.safetensors', 'rollout.safetensors', 'state.safetensors', 'state.json', 'manifest.json']
    assert [o for o in before if o in parts] == parts, 'the manifest comes last'
    assert 'metrics.jsonl' in before and before[-1].startswith('.tmp-step-1-'), 'the rows before it, the folder after it'
    assert log[renamed+1] == ('fsync', 'checkpoints')

# -- damage ----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return save(prepare(tmp_path_factory.mktemp('damage')/'run'), 3)

@settings(relaxed, max_examples=300)
@given(data=st.data())
def test_any_single_damaged_byte_is_found(whole, data):
    path = data.draw(st.sampled_from(sorted(whole.iterdir())))
    good = path.read_bytes()
    at,flip = data.draw(st.integers(0, len(good)-1)),data.draw(st.integers(1, 255))
    try:
        path.write_bytes(good[:at] + bytes([good[at]^flip]) + good[at+1:])
        assert find_fault(whole)
    finally: path.write_bytes(good)
    assert not find_fault(whole)

@settings(relaxed, max_examples=100)
@given(data=st.data())
def test_lost_and_added_bytes_are_found(whole, data):
    path = data.draw(st.sampled_from(sorted(whole.iterdir())))
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good)-1))
    try:
        for bad in (good[:at], good[:at] + b'x' + good[at:], good + b'\n'):
            path.write_bytes(bad)
            assert find_fault(whole)
    finally: path.write_bytes(good)

def test_a_manifest_rewritten_by_hand_is_found(whole):
    path = whole/'manifest.json'
    good = path.read_bytes()
    try:
        for text in (json.dumps(json.loads(good)), json.dumps(json.loads(good)|dict(step=9), indent=1), '[]', '', '{}'):
            path.write_text(text, encoding='utf-8')
            assert find_fault(whole) == 'damaged-manifest'
    finally: path.write_bytes(good)

def truncate_half(path): path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
def turn_a_bit(path): path.write_bytes(path.read_bytes()[:-2] + bytes([path.read_bytes()[-2]^64]) + path.read_bytes()[-1:])
def empty_folder(path): [o.unlink() for o in path.parent.iterdir()]

@pytest.mark.parametrize('file', ['policy.safetensors', 'rollout.safetensors', 'state.safetensors', 'state.json', 'manifest.json'])
@pytest.mark.parametrize('harm,word', [(truncate_half, 'size-|damaged-'), (turn_a_bit, 'hash-|damaged-'), (Path.unlink, 'missing-|no-'), (empty_folder, 'no-')])
def test_a_bad_checkpoint_is_set_aside_and_the_one_before_is_used(run, file, harm, word):
    for step in (1, 2): save(run, step)
    harm(run.checkpoints_path/'step-2'/file)
    found = run.load_checkpoint()
    assert is_state_of(found, 1)
    aside = [o for o in names(run) if '.corrupt-' in o]
    assert len(aside) == 1 and re.match(rf'step-2\.corrupt-({word})', aside[0]) and re.match(r'[\w.-]+$', aside[0])
    assert 'step-2 is damaged' in found.notes[0] and run.events('quarantined')[0]['name'] == 'step-2'
    assert is_state_of(RunFolder.open(run.path).load_checkpoint(), 1), 'and again'

def test_all_bad_is_exit_6_and_stays_so(run):
    for step in (1, 2): truncate_half(save(run, step)/'policy.safetensors')
    for _ in range(2):
        with pytest.raises(CheckpointError) as e: run.load_checkpoint()
        assert e.value.exit_code == 6 and 'step-1.corrupt-size' in str(e.value) and 'step-2.corrupt-size' in str(e.value)
    assert len([o for o in names(run) if 'corrupt' in o]) == 2, 'nothing was deleted'

def test_the_same_step_may_go_bad_twice(run):
    save(run, 1)
    for _ in range(2):
        truncate_half(save(run, 2)/'policy.safetensors')
        assert run.load_checkpoint().step == 1
    assert [o for o in names(run) if 'corrupt' in o] == ['step-2.corrupt-size-policy.safetensors', 'step-2.corrupt-size-policy.safetensors-2']

def test_strangers_are_left_alone(run):
    save(run, 3)
    for name in ('step-abc', 'checkpoint-9', 'step-9x', 'step-'): (run.checkpoints_path/name).mkdir()
    (run.checkpoints_path/'step-7').write_text('a file', encoding='utf-8')
    (run.checkpoints_path/'step-3'/'Thumbs.db').write_bytes(b'x')
    (run.checkpoints_path/'step-3'/'extra.safetensors').write_bytes(b'not one of ours')
    assert is_state_of(run.load_checkpoint(), 3)
    assert {'step-abc', 'checkpoint-9', 'step-9x', 'step-', 'step-7'} <= set(names(run))

def test_a_newer_format_is_no_damage(run):
    path = save(run, 1)/'manifest.json'
    manifest = files.read_manifest(path)
    path.write_bytes(seal(manifest|dict(schema=99)))
    with pytest.raises(CheckpointError, match='newer finrl_grpo'): run.load_checkpoint()
    assert names(run) == ['step-1']

def test_what_exactness_rests_on_is_recorded_and_changes_are_told(run, monkeypatch):
    manifest = files.read_manifest(save(run, 1)/'manifest.json')
    assert {'machine', 'threads', 'torch', 'python'} <= set(manifest['environment'])
    assert manifest['data_hash'] == 'd'*64 and len(manifest['config_hash']) == 64 and manifest['code']
    assert run.load_checkpoint().notes == []
    monkeypatch.setattr(checkpoint, 'environment', lambda: manifest['environment']|dict(threads=999))
    run.write_json('training_config.json', run.config()|dict(seed=1))
    notes = ' '.join(run.load_checkpoint().notes)
    assert 'threads was' in notes and 'training_config.json was changed' in notes

# -- what is kept ----------------------------------------------------------------------------------

@pytest.mark.parametrize('keep', [0, 1, 2, 3])
def test_at_least_two_are_kept(run, keep):
    for step in range(1, 6): save(run, step, keep)
    assert names(run) == [f'step-{o}' for o in range(6-max(2, keep), 6)]

def test_the_best_is_kept(run):
    run.mark_best(save(run, 1), reward=.5)
    for step in range(2, 6): save(run, step)
    assert [o['name'] for o in run.ls() if o['best']] == ['step-1'] and len(run.ls()) == 3
    shutil.rmtree(run.checkpoints_path/'step-1')
    assert run.best() == {}

def test_order_is_by_step_not_by_time(run):
    for step in (9, 10, 11): save(run, step, keep=3)
    for i,name in enumerate(['step-11', 'step-10', 'step-9']): os.utime(run.checkpoints_path/name, (i, i))
    assert run.load_checkpoint().step == 11
    save(run, 12, keep=2)
    assert names(run) == ['step-11', 'step-12']

def test_a_clock_that_runs_backwards_changes_nothing(run, monkeypatch):
    times = iter(range(10**6, 0, -1))
    monkeypatch.setattr(checkpoint.time, 'time', lambda: next(times))
    for step in (1, 2, 3): save(run, step)
    assert run.load_checkpoint().step == 3 and names(run) == ['step-2', 'step-3']

def test_pruning_waits_for_the_new_one_to_prove_itself(run, monkeypatch):
    for step in (1, 2): save(run, step)
    real = checkpoint.find_fault
    monkeypatch.setattr(checkpoint, 'find_fault', lambda path: 'hash-policy' if path.name == 'step-3' else real(path))
    assert save(run, 3) is None
    assert [o for o in names(run) if step_order(o)] == ['step-1', 'step-2']
    assert 'what was read back' in run.events('save_failed')[0]['reason']

def test_a_second_state_of_one_step_gets_its_own_folder(run):
    save(run, 1)
    assert save(run, 1).name == 'step-1', 'the same content is not written twice'
    other = run.save_checkpoint(1, tensors_of(1), state_of(1)|dict(phase='update'))
    assert other.name == 'step-1.1' and run.load_checkpoint().state['phase'] == 'update'
    assert names(run) == ['step-1', 'step-1.1']

def test_rm(run):
    for step in (1, 2): save(run, step)
    truncate_half(run.checkpoints_path/'step-2'/'state.json')
    assert run.validate() == {'step-1': '', 'step-2': 'size-state.json'}
    with pytest.raises(OutputError, match='last whole'): run.rm('step-1')
    for name in ('../run', 'step-1/../step-2', 'step-9', ''):
        with pytest.raises(OutputError, match='no checkpoint'): run.rm(name)
    run.rm('step-2')
    run.rm('step-1', force=True)
    assert names(run) == []

def test_the_command(run, capsys):
    for step in (1, 2): save(run, step)
    assert ckpt_command(run.path, 'verify') == 0
    truncate_half(run.checkpoints_path/'step-2'/'state.json')
    assert ckpt_command(run.path, 'verify') == 6 and 'size-state.json' in capsys.readouterr().out
    assert ckpt_command(run.path, 'rm', name='step-2') == 0 and names(run) == ['step-1']

# -- numbers gone bad ------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_a_bad_number_is_never_saved(run, bad, dtype):
    save(run, 1)
    w = torch.zeros(4, dtype=dtype)
    w[2] = bad
    for tensors,state in ((dict(policy=dict(w=w)), {}), (dict(policy={}), dict(adam=[dict(exp_avg=w)]))):
        with pytest.raises(NonFiniteError) as e: run.save_checkpoint(2, tensors, state)
        assert e.value.exit_code == 7 and '1 of 4' in str(e.value)
    assert names(run) == ['step-1'] and is_state_of(run.load_checkpoint(), 1)

# -- full disks ------------------------------------------------------------------------------------

class FullDisk:
    "Every new file breaks off after its first bytes"
    def __enter__(self):
        files.open = self.open
        return self
    def __exit__(self, *_): del files.open
    def open(self, *args, **kwargs):
        f = builtins.open(*args, **kwargs)
        if 'x' not in f.mode and 'a' not in f.mode: return f
        def write(data):
            f.write(bytes(data)[:3])
            raise OSError(errno.ENOSPC, 'No space left on device')
        return Spy(f, write)

def test_a_full_disk_costs_a_checkpoint_not_the_run(run, caplog):
    run.append_metrics(dict(step=1))
    save(run, 1)
    for step in (2, 3):
        with FullDisk():
            run.append_metrics(dict(step=step))
            run.set_status('running', step)
            assert save(run, step) is None
    assert 'No space left' in caplog.text and run.status().get('step') == 0
    assert not [o for o in names(run) if o.startswith('.')]
    assert save(run, 4).name == 'step-4' and run.failed_saves == 0
    assert [o['step'] for o in run.metrics()] == [1, 2, 3], 'rows waited in memory'
    assert len(run.events('save_failed')) == 2 and run.events('save_failed')[0]['bytes'] > 0

def test_three_failures_in_a_row_stop_the_run(run):
    save(run, 1)
    with FullDisk():
        assert save(run, 2) is None and save(run, 3) is None
        with pytest.raises(OutputError, match='GiB') as e: save(run, 4)
    assert e.value.exit_code == 3 and is_state_of(run.load_checkpoint(), 1)

@posix
def test_a_real_limit_on_file_size(tmp_path):
    code = '''
        import resource, signal, sys, torch
        from finrl_grpo.checkpoint import RunFolder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = RunFolder.create(sys.argv[1], {}, '')
        small, big = dict(policy=dict(w=torch.ones(10))), dict(policy=dict(w=torch.ones(100_000)))
        run.save_checkpoint(1, small, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        print(run.save_checkpoint(2, big, {}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(run.save_checkpoint(3, big, {}).name)
    '''
    out = subprocess.run([sys.executable, '-c', textwrap.dedent(code), str(tmp_path/'run')], capture_output=True, text=True, check=True).stdout.split()
    assert out == ['None', 'step-3']
    assert sorted(o.name for o in (tmp_path/'run'/'checkpoints').iterdir()) == ['step-1', 'step-3']

def test_no_room_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=2**30))
    assert preflight(tmp_path/'a', 2**28, keep=2) == 2**30
    with pytest.raises(OutputError, match='1.5 GiB needed.*1.0 GiB free') as e: preflight(tmp_path/'a', 2**29, keep=2)
    assert e.value.exit_code == 3 and not list(tmp_path.iterdir())

def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('mine', encoding='utf-8')
    for place in (tmp_path/'file', tmp_path/'file'/'run', Path('/proc/nowhere/run') if sys.platform == 'linux' else tmp_path/'file'/'x'):
        with pytest.raises(OutputError) as e: RunFolder.create(place, {}, '')
        assert e.value.exit_code == 3
    assert [o.name for o in tmp_path.iterdir()] == ['file'] and (tmp_path/'file').read_text(encoding='utf-8') == 'mine'

@posix
@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may write anywhere')
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError): RunFolder.create(tmp_path/'run', {}, '')
    finally: tmp_path.chmod(0o755)

def test_a_folder_with_a_run_is_not_started_again(run):
    save(run, 1)
    with pytest.raises(OutputError, match='resume'): RunFolder.create(run.path, dict(seed=5), '')
    assert run.config()['seed'] == 0
    with pytest.raises(OutputError, match='runs beside it: run'): RunFolder.open(run.path.parent/'rum')

# -- rows ------------------------------------------------------------------------------------------

ROWS = [dict(step=o, text=f'第{o}步：分散投資\n長期持有 📈', reward=o/7) for o in range(1, 8)]

@relaxed
@given(cut=st.floats(0, 1), keep=st.integers(-1, 8))
def test_any_prefix_of_a_log_is_read_and_mended(tmp_path_factory, cut, keep):
    path = tmp_path_factory.mktemp('rows')/'metrics.jsonl'
    append_rows(path, ROWS)
    raw = path.read_bytes()
    path.write_bytes(raw[:int(cut*len(raw))])
    before = read_rows(path)
    assert before == ROWS[:len(before)]
    cut_rows(path, keep)
    after = read_rows(path)
    assert after == [o for o in before if o['step'] <= keep]
    append_rows(path, [dict(step=99)])
    assert read_rows(path) == after+[dict(step=99)]

def test_appending_after_a_crash_spoils_no_row(tmp_path):
    path = tmp_path/'m.jsonl'
    append_rows(path, ROWS[:2])
    with open(path, 'ab') as f: f.write(b'{"step": 3, "re')
    append_rows(path, ROWS[3:5])
    assert read_rows(path) == ROWS[:2]+ROWS[3:5]

def test_damage_in_the_middle_is_kept_beside(tmp_path):
    path = tmp_path/'m.jsonl'
    append_rows(path, ROWS)
    lines = path.read_bytes().split(b'\n')
    lines[2] = b'\x00'*20
    path.write_bytes(b'\n'.join(lines))
    assert cut_rows(path, 6) == 1
    assert [o['step'] for o in read_rows(path)] == [1, 2, 4, 5, 6]
    assert (tmp_path/'m.jsonl.damaged').read_bytes() == b'\x00'*20 + b'\n'

@given(n=st.integers(0, 30), last=st.integers(0, 40))
@relaxed
def test_the_last_rows(tmp_path_factory, n, last):
    path = tmp_path_factory.mktemp('last')/'m.jsonl'
    rows = [dict(step=o, text='長'*(o*997 % 5000)) for o in range(n)]
    append_rows(path, rows)
    assert read_rows(path, last=last) == (rows[-last:] if last else [])

def test_numbers_that_are_none(tmp_path):
    import numpy as np
    path = tmp_path/'m.jsonl'
    append_rows(path, [dict(step=np.int64(3), loss=math.nan, kl=torch.tensor(-math.inf), r=np.float32(.5), v=torch.tensor([1., 2.]), p=Path('a'))])
    assert read_rows(path) == [dict(step=3, loss=None, kl=None, r=.5, v=[1., 2.], p='a')]
    json.loads(path.read_bytes(), parse_constant=pytest.fail)
    with pytest.raises(TypeError, match='object'): plain(dict(a=object()))

def test_half_an_emoji_survives(tmp_path):
    append_rows(tmp_path/'m.jsonl', [dict(step=1, text='定期定額\ud83d')])
    assert read_rows(tmp_path/'m.jsonl')[0]['text'] == '定期定額\ud83d'

def test_events_are_history(run):
    for step in (1, 2, 3):
        run.append_metrics(dict(step=step))
        run.append_samples([dict(step=step, text='答')]*2)
        run.event('saved', step=step)
    assert run.truncate(1) == 6
    assert [o['step'] for o in run.metrics()] == [1] and len(run.samples()) == 2 and len(run.events('saved')) == 3
    run.truncate(-1)
    assert run.metrics() == []

# -- state -----------------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.sampled_from(['$tensor', '$tuple', '$items', '$float'])
nests = st.recursive(leaves, lambda o: st.lists(o) | st.tuples(o, o) | st.dictionaries(keys, o, max_size=4), max_leaves=25)

def bits(value):
    "A form in which NaN equals NaN, 0.0 differs from -0.0 and True from 1"
    if isinstance(value, (list, tuple)): return type(value),[bits(o) for o in value]
    if isinstance(value, dict): return [(bits(k), bits(v)) for k,v in value.items()]
    return type(value),repr(value)

@settings(relaxed, max_examples=300)
@given(value=nests)
def test_state_goes_through_json_unchanged(value):
    text = json.dumps(pack(value, {}), allow_nan=False)
    assert bits(unpack(json.loads(text), {})) == bits(value)

def test_state_refuses_what_it_cannot_keep():
    for bad in ({1, 2}, object(), torch.nn.Linear(1, 1), b'bytes'):
        with pytest.raises(TypeError, match='state/a/0'): pack(dict(a=[bad]), {})

DTYPES = [getattr(torch, o) for o in 'float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool'.split()]

@relaxed
@given(shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6), seed=st.integers(0, 99))
def test_tensors_go_through_safetensors_unchanged(tmp_path_factory, shapes, seed):
    path = tmp_path_factory.mktemp('t')/'x.safetensors'
    g = torch.Generator().manual_seed(seed)
    tensors = {f'權重/{i}':torch.randint(0, 2, shape, generator=g).to(dtype) for i,(dtype,shape) in enumerate(shapes)}
    about = write_tensors(path, tensors)
    assert about == dict(size=path.stat().st_size, sha256=files.hash_file(path))
    for got in (read_tensors(path), load_file(path)):
        assert set(got) == set(tensors)
        for k,v in tensors.items(): assert got[k].dtype == v.dtype and got[k].shape == v.shape and torch.equal(got[k], v)

def test_views_shared_and_turned_tensors(tmp_path):
    base = torch.arange(12.).reshape(3, 4)
    tensors = dict(a=base, tied=base, row=base[1], turned=base.T, part=base[:, ::2], grad=torch.nn.Parameter(base))
    write_tensors(tmp_path/'x.safetensors', tensors)
    got = read_tensors(tmp_path/'x.safetensors')
    assert all(torch.equal(got[k], v) for k,v in tensors.items())
    with pytest.raises(TypeError, match='complex'): write_tensors(tmp_path/'y.safetensors', dict(a=torch.zeros(1, dtype=torch.complex64)))

def test_an_optimizer_goes_on_with_the_same_bits(run):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(.3), torch.nn.Linear(8, 1))
        return model,torch.optim.AdamW(model.parameters(), lr=.01)
    def steps(model, adam, n):
        for _ in range(n):
            adam.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            adam.step()
    model,adam = build()
    torch.manual_seed(1)
    steps(model, adam, 3)
    run.save_checkpoint(3, dict(policy=model.state_dict()), dict(adam=adam.state_dict(), random=random_state()))
    steps(model, adam, 3)
    model2,adam2 = build()
    torch.manual_seed(99)
    found = run.load_checkpoint()
    model2.load_state_dict(found.tensors['policy'])
    adam2.load_state_dict(found.state['adam'])
    set_random_state(found.state['random'])
    steps(model2, adam2, 3)
    assert all(torch.equal(a, b) for a,b in zip(model.parameters(), model2.parameters()))

def test_random_streams_of_python_and_numpy():
    import random, numpy as np
    random.gauss(0, 1)
    state = unpack(json.loads(json.dumps(pack(random_state(), tensors := {}))), tensors)
    want = random.gauss(0, 1),random.random(),np.random.rand(),torch.rand(2)
    set_random_state(state)
    got = random.gauss(0, 1),random.random(),np.random.rand(),torch.rand(2)
    assert want[:3] == got[:3] and torch.equal(want[3], got[3])

def test_loaded_tensors_do_not_hold_the_file(run):
    save(run, 1)
    found = run.load_checkpoint()
    before = found.tensors['policy']['w'].clone()
    (run.checkpoints_path/'step-1'/'policy.safetensors').write_bytes(b'')
    assert torch.equal(found.tensors['policy']['w'], before)

def test_no_pickle_anywhere(run, tmp_path):
    path = save(run, 1)
    assert {o.suffix for o in path.iterdir()} == {'.safetensors', '.json'}
    source = Path(files.__file__).read_text(encoding='utf-8') + Path(checkpoint.__file__).read_text(encoding='utf-8')
    assert not re.search(r'import pickle|torch\.(save|load)\(|eval\(|exec\(', source)
    with pytest.raises(ValueError, match='stem'): run.save_checkpoint(2, dict(state={}), {})

# -- one writer ------------------------------------------------------------------------------------

HOLD = 'import sys, time; from finrl_grpo.checkpoint import RunFolder\nwith RunFolder.open(sys.argv[1]).lock(): print("held", flush=True); time.sleep(60)'

@pytest.fixture
def holder(run):
    p = subprocess.Popen([sys.executable, '-c', HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'held\n'
    yield p
    p.kill()
    p.wait()

def test_two_processes(run, holder):
    assert run.is_running()
    with pytest.raises(LockedError, match=f'process {holder.pid}') as e:
        with run.lock(): pass
    assert e.value.exit_code == 4
    staging = run.checkpoints_path/'.tmp-step-9-1'
    staging.mkdir()
    holder.kill()
    holder.wait()
    assert not run.is_running()
    with run.lock(): assert run.events('took_over')[0]['pid'] == holder.pid and not staging.exists()

def test_a_lock_nests_and_is_given_back(run):
    with run.lock(), run.lock(): pass
    with RunFolder.open(run.path).lock(): pass
    assert run.events('took_over') == []

def test_lookers_do_not_disturb(run):
    with (run.path/'run.lock').open('wb') as a, (run.path/'run.lock').open('rb') as b:
        assert take_lock(a, shared=True) and take_lock(b, shared=True)

def test_a_request_is_for_the_process_that_runs(run):
    run.request('stop')
    assert run.requested() == 'stop'
    with run.lock(): assert run.requested() == ''

def test_windows_locks(run, monkeypatch):
    held = set()
    def locking(fd, mode, n):
        if 'run.lock' in held: raise OSError(errno.EACCES, 'locked')
        held.add('run.lock')
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.setitem(sys.modules, 'msvcrt', types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with run.lock():
        with pytest.raises(LockedError):
            with RunFolder.open(run.path).lock(): pass

def test_windows_moves_and_folders(tmp_path, monkeypatch):
    (tmp_path/'a').write_text('new', encoding='utf-8')
    real,refusals = os.replace,[PermissionError(), PermissionError()]
    def replace(*args):
        if refusals: raise refusals.pop()
        return real(*args)
    monkeypatch.setattr(os, 'replace', replace)
    move(str(tmp_path/'a'), str(tmp_path/'b'), tries=3)
    assert (tmp_path/'b').exists()
    folder = str(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, 'name', 'nt')
        m.setattr(os, 'open', pytest.fail)
        sync_folder(folder)

# -- how it ends -----------------------------------------------------------------------------------

ENDS = [(KeyboardInterrupt(), 'stopped', 130), (SystemExit(75), 'stopped', 75), (SystemExit('text'), 'failed', 1), (SystemExit(0), 'finished', 0),
    (OutputError('full'), 'failed', 3), (RuntimeError('boom'), 'failed', 1), (MemoryError(), 'failed', 1)]

@pytest.mark.parametrize('error,state,code', ENDS, ids=lambda o: repr(o))
def test_the_reason_is_on_disk(run, error, state, code):
    with pytest.raises(type(error)):
        with run.session():
            run.append_metrics(dict(step=4, reward_mean=.5))
            run.set_status('running', 4)
            raise error
    for record in (run.status(), run.stats()): assert (record['state'], record['exit_code'], record['step']) == (state, code, 4)
    assert run.stats()['last_metrics']['reward_mean'] == .5 and exit_code(error) == code
    assert run.status()['heartbeat'] > 0 and not run.is_running()

def test_what_the_trainer_wrote_stays(run):
    with run.session(): run.write_stats(dict(total_steps=9, improved=True))
    assert run.stats()['total_steps'] == 9 and run.stats()['state'] == 'finished'

def test_a_full_disk_at_the_end_hides_nothing(run, caplog):
    with pytest.raises(ZeroDivisionError):
        with run.session(), FullDisk(): 1/0

def test_status_is_never_half_read(run):
    import threading
    stop,bad = threading.Event(),[]
    def read():
        while not stop.is_set():
            if 'state' not in run.status(): bad.append(1)
    reader = threading.Thread(target=read)
    reader.start()
    for step in range(100): run.set_status('running', step)
    stop.set()
    reader.join()
    assert not bad and run.status()['step'] == 99

def test_drift_names_every_difference(run):
    lines = run.drift(dict(model_name='builtin:micro', seed=1, beta=.04), 'e'*64)
    assert lines == ['`beta` was None, is 0.04', '`seed` was 0, is 1', 'the data have changed: the hash of the rows differs']
    assert run.drift(run.config(), 'd'*64) == []

def test_light_import():
    code = 'import sys, finrl_grpo.checkpoint; print([o for o in ("torch", "numpy", "safetensors", "matplotlib", "transformers") if o in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_a_poor_locale(tmp_path):
    code = '''
        import sys; from finrl_grpo.checkpoint import RunFolder
        run = RunFolder.create(sys.argv[1], dict(prompt='問：{query}'), '')
        run.append_metrics(dict(step=1, text='保證獲利'))
        print(ascii(run.metrics()[0]['text']), ascii(run.config()['prompt']))
    '''
    env = os.environ|dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    (tmp_path/'code.py').write_text(textwrap.dedent(code), encoding='utf-8')
    out = subprocess.run([sys.executable, str(tmp_path/'code.py'), str(tmp_path/'run')], capture_output=True, text=True, check=True, env=env).stdout
    assert out.split() == [ascii('保證獲利'), ascii('問：{query}')]
