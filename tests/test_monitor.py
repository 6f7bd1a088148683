"""Telemetry that cannot hurt a run: trackers that fail, hang or lie, terminals and logs that are attacked, plots of incomplete runs."""
import io, json, logging, math, os, re, struct, subprocess, sys, textwrap, threading, time, types, warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from finrl_grpo import monitor
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import ConfigError, TRACKERS, TrainConfig, check_trackers, load_config
from finrl_grpo.monitor import (CardMeter, Monitor, OtherTracker, Progress, WandbTracker, cjk_font, compare_runs, console_line, escape_terminal, open_monitor,
    plot_rewards, plot_run, redact, say, start_logging, stop_logging)

KEY = 'a1b2c3d4e5'*4

@pytest.fixture
def run(tmp_path): return RunFolder.create(tmp_path/'run', dict(model_name='builtin:micro', hub_token='hf_'+'x'*30), '')

@pytest.fixture(autouse=True)
def closed_log():
    yield
    stop_logging()

def row_of(step): return {'step':step, 'reward_mean':step/10, 'reward_std':.1, 'kl':.01*step, 'loss':-.5, 'completion_length':80., 'learning_rate':1e-5}

# -- one line --------------------------------------------------------------------------------------

def test_console_line():
    assert console_line(row_of(2)|{'time/step':1.26}) == 'step=2 reward=0.2±0.1 kl=0.02 loss=-0.5 length=80 lr=1e-05 1.3s'
    assert console_line(dict(step=1, loss=None, kl=math.nan, reward_mean=math.inf)) == 'step=1 reward=inf kl=nan loss=nan'
    assert console_line({}) == 'step=?'

@given(st.text(alphabet=st.characters(exclude_categories=[]) | st.sampled_from('\x1b\x9b\r\b\u202e\u2066\u200f\x7f\n\t台穩')))
@settings(max_examples=300, deadline=None)
def test_nothing_that_a_terminal_obeys_gets_through(text):
    safe = escape_terminal(text)
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]', safe)
    safe.encode('utf-8')
    assert not re.search('[\x00-\x1f]', escape_terminal(text, one_line=True))

def test_ordinary_text_is_left_alone():
    text = '分散投資，長期持有；風險自負（過去績效不代表未來）📈 ETF 0050\n\t下一行 Ａｂｃ'
    assert escape_terminal(text) == text

@pytest.mark.parametrize('text', ['\x1b[2J', '\x1b]0;owned\x07', '\x1b]8;;http://x\x1b\\link', '\x9b31m', 'a\rb', 'a\x08b', '\u202etxt.exe'])
def test_known_attacks_are_visible(text):
    assert escape_terminal(text) != text and escape_terminal(text).isprintable()

def test_say_on_a_poor_console_and_a_closed_pipe(monkeypatch, caplog):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, 'stderr', io.TextIOWrapper(buffer, encoding='cp1252', write_through=True))
    say('紀錄 ± 1')
    assert buffer.getvalue().decode('cp1252').strip() == '\\u7d00\\u9304 ± 1'
    class Gone:
        encoding = 'utf-8'
        def write(self, _): raise BrokenPipeError
        def flush(self): pass
    monkeypatch.setattr(sys, 'stderr', Gone())
    say('x')

# -- secrets ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('value', ['hf_'+'A1'*15, 'sk-'+'a'*24, 'sk-proj-'+'a_b-'*8, 'ghp_'+'b'*36, 'AKIA'+'ABCD'*4, 'wandb_v1_'+'k'*30])
def test_keys_by_their_form(value):
    assert value not in redact(f'error with {value}!') and redact([dict(x=value)]) == [dict(x='[REDACTED]')]

def test_keys_by_their_name_and_place(monkeypatch):
    monkeypatch.setenv('MY_SERVICE_TOKEN', 'swordfish-42')
    config = dict(api_key='x', WANDB_API_KEY='y', password='z', hub_token='t', client_secret='s', pad_token='<pad>', tokenizer='bpe', note='got swordfish-42',
        revision='0123456789abcdef'*2+'01234567', url='https://me:pw@host/x', nothing=None, n=3)
    got = redact(config)
    assert {k for k,v in got.items() if v == '[REDACTED]'} == {'api_key', 'WANDB_API_KEY', 'password', 'hub_token', 'client_secret', 'pad_token'}
    assert got['note'] == 'got [REDACTED]' and got['url'] == 'https://[REDACTED]@host/x' and got['revision'] == config['revision']
    assert got['tokenizer'] == 'bpe' and got['nothing'] is None and got['n'] == 3

# -- the log ---------------------------------------------------------------------------------------

def test_the_log_goes_to_the_guides_place_if_that_exists(run, tmp_path, capsys):
    guide = tmp_path/'logs'/'grpo_trainer.log'
    assert start_logging(run, guide) == run.path/'grpo_trainer.log'
    guide.parent.mkdir()
    assert start_logging(run, guide) == guide
    told = capsys.readouterr()
    out = told.err.splitlines()
    assert told.out == '', 'stdout is for results'
    assert out == [f'log: {run.path/"grpo_trainer.log"}', f'log: {guide}'], 'said once each'
    for path in (guide, run.path/'grpo_trainer.log'): assert path.read_text(encoding='utf-8').count(str(path)) == 1

def test_a_guides_place_that_cannot_be_written(run, tmp_path, capsys):
    guide = tmp_path/'logs'/'grpo_trainer.log'
    guide.mkdir(parents=True)
    assert start_logging(run, guide) == run.path/'grpo_trainer.log'
    assert 'cannot be written' in capsys.readouterr().err

def test_the_log_is_utf8_clean_and_without_secrets(run, monkeypatch):
    monkeypatch.setenv('WANDB_API_KEY', KEY)
    path = start_logging(run, '/nowhere/x.log')
    logging.getLogger('finrl_grpo.trainer').warning('鍵 %s 答 %s', KEY, '\x1b[2J保證獲利')
    stop_logging()
    text = path.read_text(encoding='utf-8')
    assert '鍵 [REDACTED] 答 ␛[2J保證獲利' in text and KEY not in text

def test_logging_twice_writes_once(run):
    for _ in range(3): path = start_logging(run, '/nowhere/x.log')
    logging.getLogger('finrl_grpo').info('only once')
    assert path.read_text(encoding='utf-8').count('only once') == 1
    stop_logging()
    assert not [o for o in logging.getLogger('finrl_grpo').handlers if hasattr(o, 'finrl_grpo')]

def test_import_is_light_and_opens_nothing(tmp_path):
    code = '''
        import sys, logging, finrl_grpo.monitor
        print([o for o in ('torch', 'numpy', 'matplotlib', 'wandb', 'tqdm') if o in sys.modules], logging.getLogger('finrl_grpo').handlers)
    '''
    out = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert out.strip() == '[] []' and not list(tmp_path.iterdir())

# -- progress --------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self): return True

def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.delenv('FINRL_UI', raising=False)
    out = io.StringIO()
    p = Progress(3, stream=out, every=0)
    for step in (1, 2, 3): p.log(row_of(step))
    p.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and lines[2].startswith('3/3 step=3 reward=0.3±0.1 kl=0.03') and '\r' not in out.getvalue()

def test_plain_lines_are_no_flood():
    out = io.StringIO()
    p = Progress(1000, stream=out, every=60)
    for step in range(1, 1001): p.log(row_of(step))
    assert [o.split('/')[0] for o in out.getvalue().splitlines()] == ['1', '1000']

def test_a_bar_in_a_terminal(monkeypatch):
    monkeypatch.delenv('FINRL_UI', raising=False)
    out = Terminal()
    p = Progress(4, done=1, stream=out)
    p.bar.mininterval = 0
    for step in (2, 3, 4): p.log(row_of(step)|dict(kl=None))
    p.close()
    assert '4/4' in out.getvalue() and 'reward=0.4 kl=nan' in out.getvalue()

@pytest.mark.parametrize('wish,kind', [('off', 'off'), ('plain', 'plain'), ('bar', 'bar'), ('auto', 'bar')])
def test_the_wish_decides(monkeypatch, wish, kind):
    monkeypatch.setenv('FINRL_UI', wish)
    p = Progress(2, stream=Terminal())
    p.log(row_of(1))
    p.close()
    assert p.kind == kind and (p.stream.getvalue() == '') == (kind == 'off')

# -- the card --------------------------------------------------------------------------------------

class FakeCuda:
    def is_available(self): return True
    def mem_get_info(self): return 3*2**30,12*2**30
    def memory_allocated(self): return 7*2**30
    def get_device_properties(self): return types.SimpleNamespace(uuid='abc')

class FakeNvml(types.ModuleType):
    class NVMLError(Exception): pass
    fails = False
    def nvmlInit(self): pass
    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == 'GPU-abc'
        return 'handle'
    def nvmlDeviceGetUtilizationRates(self, handle):
        if self.fails: raise self.NVMLError('gone')
        return types.SimpleNamespace(gpu=83)

@pytest.fixture
def card(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(cuda=FakeCuda()))
    nvml = FakeNvml('pynvml')
    monkeypatch.setitem(sys.modules, 'pynvml', nvml)
    return nvml

def test_the_card(card):
    meter = CardMeter()
    assert meter() == {'system/gpu_allocated_bytes':7*2**30, 'system/gpu_used_bytes':9*2**30, 'system/gpu_total_bytes':12*2**30, 'system/gpu_busy_percent':83}
    card.fails = True
    assert meter()['system/gpu_error'] == 'gone' and meter()['system/gpu_used_bytes'] == 9*2**30

def test_no_nvml_is_one_note(card, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    with caplog.at_level(logging.INFO):
        meter = CardMeter()
        for _ in range(3): assert 'system/gpu_busy_percent' not in meter()
    assert caplog.text.count('nvidia-ml-py') == 1

def test_no_card(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    assert CardMeter()() == {}

@pytest.mark.gpu
def test_a_real_card():
    import torch
    torch.zeros(2**20, device='cuda')
    row = CardMeter()()
    assert row['system/gpu_allocated_bytes'] >= 2**22 and row['system/gpu_total_bytes'] > 2**30

# -- the monitor -----------------------------------------------------------------------------------

class Witness:
    def __init__(self, run): self.run,self.seen,self.closed = run,[],None
    def log(self, row, samples):
        assert self.run.metrics(last=1)[0]['step'] == row['step'], 'on the disk first'
        self.seen.append((row, list(samples)))
    def close(self, code): self.closed = code

class Faulty:
    def __init__(self, error, times=10**9): self.error,self.left,self.calls = error,times,0
    def log(self, row, samples):
        self.calls += 1
        self.left -= 1
        if self.left >= 0: raise self.error
    def close(self, code): raise self.error

def test_rows_are_on_disk_before_anybody_hears(run):
    w = Witness(run)
    m = Monitor(run, [w], meter=lambda: {'system/x':1})
    m.log(row_of(1), [dict(step=1, text='答')])
    m.close(75)
    assert w.closed == 75 and w.seen[0][1] == [dict(step=1, text='答')]
    assert run.metrics() == [row_of(1)|{'system/x':1}] and run.samples() == [dict(step=1, text='答')]

@pytest.mark.parametrize('error', [ConnectionError('down'), TimeoutError(), RuntimeError('x'), UnicodeEncodeError('ascii', 'x', 0, 1, 'no'), MemoryError()])
def test_a_listener_that_fails_is_dropped_and_nobody_else_notices(run, error, caplog):
    bad,good = Faulty(error),Witness(run)
    m = Monitor(run, [bad, good], meter=dict)
    for step in range(1, 8): m.log(row_of(step))
    m.close()
    assert bad.calls == 3 and len(good.seen) == 7 and len(run.metrics()) == 7
    assert caplog.text.count('is dropped') == 1

def test_a_listener_may_stumble(run):
    bad = Faulty(ConnectionError(), times=2)
    m = Monitor(run, [bad], meter=dict)
    for step in range(1, 8): m.log(row_of(step))
    assert bad.calls == 7

def test_a_monitor_without_a_folder(): Monitor(meter=dict).log(row_of(1))

def test_a_stop_is_not_swallowed(run):
    with pytest.raises(KeyboardInterrupt): Monitor(run, [Faulty(KeyboardInterrupt())], meter=dict).log(row_of(1))

def test_what_the_command_line_opens(run, capsys, monkeypatch):
    monkeypatch.setenv('FINRL_UI', 'plain')
    m = open_monitor(run, total=2, done=0)
    for step in (1, 2): m.log(row_of(step))
    m.close()
    assert [type(o) for o in m.listeners] == [Progress] and '2/2 step=2' in capsys.readouterr().err
    assert 'step=2 reward=0.2±0.1' in (run.path/'grpo_trainer.log').read_text(encoding='utf-8')

# -- W&B -------------------------------------------------------------------------------------------

def read_offline(path):
    "Records of a .wandb file: LevelDB's log format with protobuf messages inside"
    from wandb.proto.wandb_internal_pb2 import Record
    data,at,part = Path(path).read_bytes(),7,b''
    assert data[:4] == b':W&B'
    while at+7 <= len(data):
        if 32768 - at%32768 < 7:
            at += 32768 - at%32768
            continue
        _,length,kind = struct.unpack('<IHB', data[at:at+7])
        part += data[at+7:at+7+length]
        at += 7+length
        if kind in (1, 4):
            yield Record.FromString(part)
            part = b''

def history(path):
    "Rows of a finished run; wandb's own process may still be writing when `finish` returns"
    until = time.monotonic()+20
    while not any(r.HasField('exit') for r in read_offline(path)) and time.monotonic() < until: time.sleep(.1)
    return [{(i.key or '/'.join(i.nested_key)):json.loads(i.value_json) for i in r.history.item} for r in read_offline(path) if r.HasField('history')]

def offline_files(run): return sorted((run.path/'wandb').glob('offline-run-*/*.wandb'))

def test_an_offline_run_read_back(run, monkeypatch, capsys):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_PROJECT', 'tradingagents-grpo')
    tracker = WandbTracker(run)
    place = tracker.sync_path
    assert tracker.mode == 'offline' and f'later: wandb sync {place}' in capsys.readouterr().err
    m = Monitor(run, [tracker], meter=lambda: {'system/gpu_busy_percent':50})
    for step in (1, 2, 3): m.log(row_of(step)|dict(loss=math.nan if step == 2 else .5), [dict(step=step, query='問', text='答<b>', reward=.5, advantage=0.)]*(step == 3))
    m.close()
    [path] = offline_files(run)
    assert str(path.parent) == place
    rows = history(path)
    assert [o['step'] for o in rows] == [1, 2, 3, 3] and [o['reward_mean'] for o in rows[:3]] == [.1, .2, .3] and rows[3]['samples/nrows'] == 1
    assert {'kl', 'loss', 'system/gpu_busy_percent', 'completion_length'} <= set(rows[0])
    assert math.isnan(float(rows[1]['loss'])), 'a bad number is not hidden'
    tables = list(path.parent.glob('files/media/table/*.json'))
    assert json.loads(tables[0].read_text(encoding='utf-8'))['data'] == [[3, '問', '答<b>', .5, 0.]]
    [started] = [r.run for r in read_offline(path) if r.HasField('run')][:1]
    assert started.project == 'tradingagents-grpo' and started.run_id == run.read_json('tracker.json')['wandb_id']
    assert {u.key:json.loads(u.value_json) for u in started.config.update}['hub_token'] == '[REDACTED]'

def test_a_resumed_run_keeps_its_identity(run, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    for step in (1, 2):
        tracker = WandbTracker(RunFolder.open(run.path))
        tracker.log(row_of(step))
        tracker.close()
        time.sleep(1.1)
    paths = offline_files(run)
    assert len(paths) == 2 and len({o.name for o in paths}) == 1
    assert [o['step'] for p in paths for o in history(p)] == [1, 2]

CHILD = '''
    import os, sys, tempfile, time
    from finrl_grpo.checkpoint import RunFolder
    from finrl_grpo.monitor import Monitor, WandbTracker
    run = RunFolder.create(sys.argv[1], dict(model_name='m', note='my key is %s' % os.environ.get('WANDB_API_KEY')), '')
    began = time.time()
    tracker = WandbTracker(run, init_timeout=4, finish_timeout=4)
    print('mode', tracker.mode)
    m = Monitor(run, [tracker], meter=dict)
    for step in range(1, 4): m.log(dict(step=step, reward_mean=.1*step), [dict(step=step, query='q', text='t ' + os.environ.get('OTHER_TOKEN', ''))])
    exec(os.environ.get('MEANWHILE', ''))
    for step in range(4, 9): m.log(dict(step=step, reward_mean=.1*step))
    m.close()
    print('rows', len(run.metrics()), 'seconds', time.time()-began)
'''

def in_child(folder, **env):
    "A run with W&B in a process and a home of its own"
    home = folder/'home'
    home.mkdir()
    clean = {k:v for k,v in os.environ.items() if not k.startswith('WANDB')}
    clean |= dict(HOME=str(home), NETRC=str(home/'netrc'), OTHER_TOKEN='swordfish-4242', OMP_NUM_THREADS='1')
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(CHILD), str(folder/'run')], capture_output=True, text=True, env=clean|env, timeout=120,
        stdin=subprocess.DEVNULL, cwd=folder)
    assert p.returncode == 0, p.stderr
    assert f'rows 8' in p.stdout and 'Traceback' not in p.stderr
    for path in [o for o in folder.rglob('*') if o.is_file()]:
        data = path.read_bytes()
        for secret in filter(None, (env.get('WANDB_API_KEY'), 'swordfish-4242')):
            assert secret.encode() not in data, path
    if env.get('WANDB_API_KEY'): assert env['WANDB_API_KEY'] not in p.stdout+p.stderr
    return p.stdout+p.stderr,float(p.stdout.split()[-1])

def test_no_key(tmp_path):
    out,_ = in_child(tmp_path)
    assert 'mode offline' in out and 'no key was found' in out and 'wandb sync' in out

def test_a_server_that_is_not_there(tmp_path):
    out,seconds = in_child(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL='http://127.0.0.1:9')
    assert 'mode offline' in out and 'does not answer' in out and seconds < 20

def test_switched_off(tmp_path):
    out,_ = in_child(tmp_path, WANDB_MODE='disabled')
    assert 'mode disabled' in out and 'WANDB_MODE is disabled' in out and not (tmp_path/'run'/'wandb').exists()

def test_no_wandb_installed(tmp_path):
    (tmp_path/'wandb.py').write_text('raise ImportError("no wandb here")', encoding='utf-8')
    out,_ = in_child(tmp_path, PYTHONPATH=str(tmp_path))
    assert 'mode disabled' in out and 'no wandb here' in out

class Server:
    "Enough of a W&B server to start a run; `silent` makes it accept and never answer again"
    def __init__(self):
        outer,self.silent,self.posts,self.complete = self,threading.Event(),[],True
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get('content-length', 0)))
                outer.posts.append((self.path, body))
                if outer.silent.is_set(): time.sleep(60)
                text = json.dumps(dict(data=outer.answer(body))).encode()
                self.send_response(200)
                self.send_header('content-type', 'application/json')
                self.send_header('content-length', str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            do_GET = do_PUT = do_POST
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def answer(self, body):
        entity = dict(id='e', name='me')
        run = dict(id='UnVu', name='abc', displayName='d', description='', config='{}', historyLineCount=0, project=dict(id='p', name='x', entity=entity))
        viewer = dict(id='v', entity='me', username='me', flags='{}', teams=dict(edges=[]))
        names = json.loads(body).get('variables', {}).get('files') or [] if body.startswith(b'{') else []
        created = dict(runID='abc', uploadHeaders=[], files=[dict(name=o, uploadUrl=f'{self.url}/put/{o}') for o in names])
        return dict(createRunFiles=created if self.complete else None, viewer=viewer, serverInfo=dict(cliVersionInfo={}), model=dict(bucket=None, project=None), upsertBucket=dict(bucket=run, inserted=True))

@pytest.fixture
def server():
    s = Server()
    yield s
    s.server.shutdown()

def test_online(tmp_path, server):
    out,_ = in_child(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert 'mode online' in out
    sent = b''.join(body for path,body in server.posts if path.endswith('file_stream')).decode('utf-8')
    for step in range(1, 9): assert f'\\"step\\":{step}' in sent.replace(' ', ''), sent
    assert 'takes no tables, numbers go on' in out, 'this server knows no artifacts'
    everything = b''.join(body for _,body in server.posts)
    assert KEY.encode() not in everything and b'swordfish' not in everything

def test_a_server_whose_answers_crash_the_client(tmp_path, server):
    server.complete = False
    in_child(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)

def test_a_malformed_key(tmp_path, server):
    out,_ = in_child(tmp_path, WANDB_API_KEY='short-key-of-mine', WANDB_BASE_URL=server.url)
    assert 'mode offline' in out and 'WANDB_API_KEY invalid' in out

@pytest.mark.slow
def test_a_server_that_never_answers(tmp_path, server):
    server.silent.set()
    out,seconds = in_child(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert 'mode offline' in out and 'wandb sync' in out and seconds < 40

@pytest.mark.slow
def test_a_server_that_falls_silent(tmp_path, server):
    wait = 'import pathlib\nprint("waiting")\nopen(sys.argv[1]+"/go", "w").close()\ntime.sleep(2)'
    def hush():
        while not (tmp_path/'run'/'go').exists(): time.sleep(.05)
        server.silent.set()
    thread = threading.Thread(target=hush, daemon=True)
    thread.start()
    out,seconds = in_child(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url, MEANWHILE=wait)
    assert 'mode online' in out and seconds < 30

@pytest.mark.skipif(os.name == 'nt', reason='needs pkill')
def test_the_tracker_is_killed_in_mid_run(tmp_path):
    kill = 'import subprocess\nsubprocess.run(["pkill", "-9", "-P", str(os.getpid()), "-f", "wandb-core"])\ntime.sleep(.5)'
    out,seconds = in_child(tmp_path, WANDB_MODE='offline', MEANWHILE=kill)
    assert 'is dropped; training goes on' in out and seconds < 30

# -- TensorBoard and others ------------------------------------------------------------------------

def tensorboard_rows(run):
    "What TensorBoard shows of a run: tag -> [(step, value)]"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [place] = [o for o in (run.path/'tensorboard').iterdir()]
    events = EventAccumulator(str(place)).Reload()
    return {tag:[(o.step, o.value) for o in events.Scalars(tag)] for tag in events.Tags()['scalars']}

def test_tensorboard_shows_every_step_of_a_training(tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    small = dict(batch_size=2, gradient_accumulation_steps=1, num_generations=3, max_prompt_length=32, max_new_tokens=8, ppo_epochs=1, max_steps=3, eval_fraction=0.,
        use_fp16=False, use_wandb=False, gradient_checkpointing=False, report_to=['tensorboard'], run_name='../利率 一')
    data,run = tmp_path/'rows.jsonl',tmp_path/'run'
    data.write_text('\n'.join(json.dumps(dict(query=q)) for q in ('什麼是ETF？', '如何分散風險？')), encoding='utf-8')
    command = [sys.executable, '-m', 'finrl_grpo.cli', 'train', '--model', 'builtin:micro', '--dataset', str(data), '--output', str(run), '--config', json.dumps(small)]
    done = subprocess.run(command, capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(run)
    rows,shown = run.metrics(),tensorboard_rows(run)
    assert len(rows) == 3 and {'reward_mean', 'kl', 'loss', 'accuracy', 'completion_length'} <= set(shown)
    for tag,points in shown.items():
        if tag in rows[0]: assert points == [(o['step'], pytest.approx(o[tag], rel=1e-6)) for o in rows if o.get(tag) is not None], tag
    assert [o.name for o in (run.path/'tensorboard').iterdir()] == ['利率-一'], 'a name is no path'

def test_tensorboard_goes_on_after_a_kill(run):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    for steps,shift in ((range(1, 6), 0), (range(4, 9), .5)):
        tracker = OtherTracker(RunFolder.open(run.path), 'tensorboard')
        for step in steps: tracker.log(row_of(step)|dict(loss=None, note='no number', kl=step+shift))
        if shift: tracker.close()
    shown = tensorboard_rows(run)
    assert shown['kl'] == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5), (8, 8.5)], 'steps taken twice are shown once'
    assert not {'loss', 'note', 'step'} & set(shown)
    assert 'hf_x' not in ''.join(o.read_text(encoding='utf-8', errors='replace') for o in (run.path/'tensorboard').rglob('*') if o.is_file()), 'settings go out without secrets'

def test_every_tracker_is_one_of_accelerates():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)-{'wandb'}

@pytest.mark.parametrize('name', TRACKERS)
def test_trackers_are_called_as_accelerate_defines_them(run, name, monkeypatch):
    from accelerate import tracking
    real,told = tracking.LOGGER_TYPE_TO_CLASS[name],[]
    class Double(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            told.append('opened')
        def start(self): told.append('started')
        def store_init_configuration(self, values): told.append(values)
        def log(self, values, step=None): told.append((step, values))
        def finish(self): told.append('finished')
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Double)
    run.write_json('training_config.json', TrainConfig(report_to=name).to_dict())
    m = open_monitor(run, total=1)
    m.log(dict(step=1, kl=.5, loss=None, note='x'))
    m.close()
    assert [told[0], told[1], *told[3:]] == ['opened', 'started', (1, dict(kl=.5)), 'finished']
    assert told[2]['report_to'] == name and told[2]['reward/max_reward'] == 1 and told[2]['max_steps'] == 'None'

def test_a_tracker_that_cannot_start_stops_nobody(run, monkeypatch, caplog):
    from accelerate import tracking
    class Refuses(tracking.GeneralTracker):
        name,requires_logging_directory,tracker = 'aim',False,None
        def start(self): raise ConnectionError('no server')
        def __init__(self, _): pass
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, 'aim', Refuses)
    m = Monitor(run, [OtherTracker(run, 'aim')], meter=dict)
    for step in range(1, 6): m.log(row_of(step))
    m.close()
    assert len(run.metrics()) == 5 and m.listeners == [] and caplog.text.count('is dropped') == 1

def test_a_tracker_is_refused_before_any_folder_or_model(tmp_path, monkeypatch):
    assert load_config(sets=('report_to=tensorboard, mlflow',)).report_to == load_config({'report_to':['tensorboard', 'mlflow']}).report_to == 'tensorboard,mlflow'
    assert [load_config({'report_to':o}).report_to for o in (None, 'none', [], '')] == [None]*4
    for given,said in (('tensorbord', 'did you mean `tensorboard`?'), ('wandb', 'use_wandb: true'), ('all', 'there are tensorboard'), (['x', 'mlflow'], 'no tracker `x`')):
        with pytest.raises(ConfigError, match=re.escape(said)): TrainConfig(report_to=given)
    for given in (3, [None], dict(a=1), True):
        with pytest.raises(ConfigError, match='commas'): TrainConfig(report_to=given)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='pip install comet-ml'): check_trackers(TrainConfig(report_to='comet_ml'))
    from finrl_grpo.data import demo_examples
    from finrl_grpo.panel import prepare
    with pytest.raises(ConfigError, match='pip install aim'): prepare(dict(model_name='builtin:micro', report_to='aim'), demo_examples(), tmp_path/'run')
    assert not list(tmp_path.iterdir())

def test_a_run_carries_the_name_it_was_given(run, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    run.write_json('training_config.json', dict(run_name='third try'))
    WandbTracker(run).close()
    assert [r.run for r in read_offline(offline_files(run)[0]) if r.HasField('run')][0].display_name == 'third try'

# -- plots -----------------------------------------------------------------------------------------

def texts(fig): return {o.get_text() for ax in fig.axes for o in (ax.title, ax.xaxis.label, ax.yaxis.label, *(ax.get_legend().get_texts() if ax.get_legend() else ()))}

def drawn(fig):
    "Render it, with every warning an error"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        buffer = io.BytesIO()
        fig.savefig(buffer, format='png')
    return buffer.getvalue()

FULL = [row_of(s)|dict(accuracy=.5, risk_assessment=.4, recommendation=.3, language_quality=.9)|({'eval/reward':.4} if s%5 == 0 else {}) for s in range(1, 21)]

def test_plot_run_shows_what_it_must(run):
    run.append('metrics.jsonl', FULL)
    for source in (run, run.path, str(run.path), FULL):
        fig = plot_run(source)
        assert {'reward', 'accuracy', 'risk assessment', 'recommendation', 'language quality', 'KL to the reference, nats', 'loss', 'answer length, tokens'} <= texts(fig)
    assert len(fig.axes) == 6 and fig.axes[0].collections, 'the spread is a band'
    assert fig.get_facecolor()[3] == 0 and all(ax.get_facecolor()[3] == 0 for ax in fig.axes), 'transparent'
    assert drawn(fig).startswith(b'\x89PNG')

@pytest.mark.parametrize('rows', [[], FULL[:1], [dict(step=1)], [o|dict(loss=None, kl=None, reward_std=None) for o in FULL],
    [dict(step=s, reward_mean=.1) for s in (1, 2)]], ids=['none', 'one', 'bare', 'bad numbers', 'two'])
def test_plots_of_incomplete_runs(rows):
    drawn(plot_run(rows))
    drawn(compare_runs(rows, FULL))

def test_ppo_shows_the_critic():
    fig = plot_run([o|dict(explained_variance=.3, value_loss=.1) for o in FULL])
    assert 'explained variance' in texts(fig) and 'learning rate' not in texts(fig)

def test_chinese_labels_only_with_a_font(monkeypatch):
    monkeypatch.setattr(monitor, 'cjk_font', lambda: None)
    assert 'reward' in texts(plot_run(FULL, language='zh'))
    monkeypatch.setattr(monitor, 'cjk_font', lambda: 'Noto Sans CJK TC')
    assert {'獎勵', '損失', '步'} <= texts(plot_run(FULL, language='zh'))

@pytest.mark.skipif(cjk_font() is None, reason='no Chinese font on this machine')
def test_chinese_labels_are_drawn_without_boxes(): drawn(plot_run(FULL, language='zh'))

def test_plotting_leaves_the_notebook_as_it_was():
    import matplotlib.pyplot as plt
    before,open_before = plt.rcParams.copy(),plt.get_fignums()
    for fig in (plot_run(FULL), compare_runs(FULL, FULL), plot_rewards([.1], [.2])): drawn(fig)
    assert plt.rcParams == before and plt.get_fignums() == open_before

def test_compare_names_the_runs(tmp_path):
    runs = [RunFolder.create(tmp_path/o, {}, '') for o in ('beta-0', 'beta-4')]
    for o in runs: o.append('metrics.jsonl', FULL)
    assert {'beta-0', 'beta-4', 'run 3'} <= texts(compare_runs(runs[0], runs[1].path, FULL))

def test_rewards_before_and_after():
    breakdowns = [types.SimpleNamespace(total=o/10) for o in range(5)]
    fig = plot_rewards([-.5, None, math.nan, -.3], breakdowns)
    assert {'before: -0.40', 'after: 0.20'} <= texts(fig)
    drawn(plot_rewards([.5]*3, [.5]*3))
    with pytest.raises(ValueError, match='finite'): plot_rewards([], [.1])
