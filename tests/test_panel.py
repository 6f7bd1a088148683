"""The panel without a browser: what is read from a folder, what is drawn, and how a run is started and steered."""
import html.parser,json,os,random,subprocess,sys,threading,time
from pathlib import Path
import nbformat,pytest
from finrl_grpo import panel
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.data import demo_examples
from finrl_grpo.health import LEVELS,health
from finrl_grpo.view import Reader,Tail,pace,snapshot,true_state,view_html,view_text,write_example
from test_panel_browser import HOSTILE,hostile_run

SMALL = dict(model_name='builtin:micro', batch_size=2, gradient_accumulation_steps=1, num_generations=3, max_prompt_length=32, max_new_tokens=8, ppo_epochs=1,
    max_steps=4, save_steps=50, eval_steps=50, eval_fraction=0., use_fp16=False, use_wandb=False, gradient_checkpointing=False)
VOID = {'br', 'circle', 'path', 'meta', 'wbr'}

class Tree(html.parser.HTMLParser):
    "Names of all elements, and whether they close in order"
    def __init__(self, page):
        super().__init__()
        self.open,self.names,self.attributes,self.wrong = [],[],[],[]
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.attributes += attributes
        if name not in VOID: self.open.append(name)

    def handle_endtag(self, name):
        if name in VOID: return
        if not self.open or self.open.pop()!=name: self.wrong.append(name)

@pytest.fixture(scope='module')
def example(tmp_path_factory): return write_example(tmp_path_factory.mktemp('runs')/'example')

def test_the_picture_is_whole_and_small(example):
    page = view_html(snapshot(example))
    tree = Tree(page)
    assert tree.open==tree.wrong==[] and len(page.encode()) < 200_000
    assert page.count('<svg class="chart"')==4 and 'predicted' in page and 'RTX 4070' in page
    assert not {'script', 'img', 'iframe', 'a', 'link'} & set(tree.names)
    assert not [k for k,v in tree.attributes if k.startswith('on') or k in ('src', 'href')]

def test_it_is_a_function_of_the_folder(example):
    "Two readers of one folder draw the same, whatever process wrote it"
    first,second = Reader(example),Reader(RunFolder.open(example.path))
    a,b = first.snapshot(),second.snapshot()
    a['now'] = b['now'] = 0
    assert view_html(a)==view_html(b)
    assert (lambda again: again['metrics']==a['metrics'])(first.snapshot())

@pytest.mark.parametrize('part', ['run_status.json', 'metrics.jsonl', 'samples.jsonl', 'events.jsonl', 'training_config.json'])
@pytest.mark.parametrize('content', [None, b'', b'{', b'[1,2]\n"x"\nnull\n{"step": "a"}\n', b'\xff\xfe\x00'])
def test_damaged_and_missing_files_are_drawn_around(tmp_path, part, content):
    run = write_example(tmp_path/'run', steps=5)
    path = run.path/part
    path.unlink(missing_ok=True)
    if content is not None: path.write_bytes(content)
    assert 'class="state' in view_html(snapshot(run)) and view_text(snapshot(run))

@pytest.mark.parametrize('seed', range(12))
def test_any_value_in_any_field_is_drawn_around(seed):
    "Rows that lost a field, or hold what they should not"
    rng = random.Random(seed)
    odd = lambda: rng.choice([None, 'x', float('nan'), float('inf'), -1, 0, 1e300, True, [], {}, 10**400])
    keys = ('step', 'reward_mean', 'reward_std', 'kl', 'loss', 'completion_length', 'truncated', 'promises', 'accuracy', 'skipped_updates', 'explained_variance', 'eval/reward', 'time/step',
        'time/tokens_per_second', 'system/gpu_used_bytes', 'system/gpu_total_bytes', 'system/gpu_peak_bytes', 'system/gpu_busy_percent')
    row = lambda i: {k:(odd() if rng.random() < .3 else i) for k in keys if rng.random() > .2} | (dict(step=i) if rng.random() < .8 else {})
    status = dict(step=odd(), total=odd(), heartbeat=odd(), reason=odd())
    sample = lambda i: dict(step=odd(), prompt=0, query=odd(), text=rng.choice(['好', None, 3]), reward=odd(), advantage=odd(), breakdown=rng.choice([None, {}, dict(accuracy=odd(), evidence=dict(accuracy=[[0, 1, 'x', 'y'], [odd()]]), promises=[[odd(), odd(), '', '']])]))
    snap = dict(name='n', path='p', config=dict(kl_target=odd(), model_name=odd(), algorithm=odd()), status=status, state=rng.choice(['running', 'finished', 'failed', 'x']), metrics=[row(i) for i in range(40)],
        samples=[sample(i) for i in range(9)], events=[dict(kind=odd())], saved=None, now=time.time())
    tree = Tree(view_html(snap))
    assert tree.open==tree.wrong==[] and view_text(snap)

def test_hostile_texts_stay_texts(tmp_path):
    page = view_html(snapshot(hostile_run(tmp_path/'run')))
    tree = Tree(page)
    assert tree.open==tree.wrong==[] and page.count('<style>')==1
    assert not {'script', 'img', 'iframe', 'a', 'form', 'input', 'textarea', 'base', 'object'} & set(tree.names)
    assert not [k for k,_ in tree.attributes if k.startswith('on') or k in ('src', 'href', 'srcdoc', 'action')]
    assert not [o for o in page if o < ' ' and o != '\n' or o in '\u202e\u2066\u2067']
    assert '\x1b' not in view_text(snapshot(RunFolder.open(tmp_path/'run')))

def test_long_runs_and_long_answers_stay_small(tmp_path):
    run = write_example(tmp_path/'run', steps=3)
    run.append('metrics.jsonl', [dict(step=i, reward_mean=(-1)**i, reward_std=1., kl=i/9, loss=i, completion_length=i, truncated=.5, accuracy=.1, risk_assessment=.2,
        recommendation=.3, language_quality=.4) for i in range(4, 20_000)])
    spans = [[i, i+1, '險', '<b>&"\'' * 20] for i in range(0, 900)]
    run.append_samples([dict(step=9, prompt=0, answer=k, query='問'*5000, text='險"<'*400, reward=.1, advantage=0., breakdown=dict(accuracy=1., evidence=dict(accuracy=spans), promises=spans)) for k in range(8)])
    reader = Reader(run)
    reader.snapshot()
    began = time.perf_counter()
    page = view_html(reader.snapshot())
    assert len(page.encode()) <= 200_000 and Tree(page).open==[]
    assert time.perf_counter()-began < 5

def test_a_tail_reads_only_what_is_new(tmp_path):
    path,rows = tmp_path/'rows.jsonl',[dict(step=i) for i in range(1000)]
    text = lambda rows: ''.join(json.dumps(o)+'\n' for o in rows)
    path.write_text(text(rows), encoding='utf-8')
    tail = Tail(path)
    assert len(tail.read())==1000
    place = tail.place
    with path.open('a', encoding='utf-8') as f: f.write('{"step": 1000}\n{"ste')
    assert len(tail.read())==1001 and tail.place==place+15
    path.write_text(text(rows[:500])+text([dict(step=9)]*600), encoding='utf-8')
    assert len(tail.read())==1100 and tail.read()[-1]['step']==9

def test_a_killed_run_is_found_dead(tmp_path):
    run = write_example(tmp_path/'run', steps=3)
    run.set_status('running', 3, total=9)
    assert snapshot(run)['state']=='interrupted'
    with run.lock():
        assert snapshot(run)['state']=='running' and pace(snapshot(run))['left'] > 0
        run.request('stop')
        assert true_state(run, run.status())=='stopping'

ALARMS = dict(groups_without_signal=.6, kl=2., clip_fraction=.5, truncated=.5, promises=.5, repetition=.5, unscored=.5, skipped_updates=1., explained_variance=-1.)
@pytest.mark.parametrize('key', ALARMS)
def test_each_alarm_rings_and_only_then(key):
    calm = dict(step=1, groups_without_signal=.1, kl=.01, clip_fraction=.01, truncated=0., promises=0., repetition=0., unscored=0., skipped_updates=0., explained_variance=.5, completion_length=50., reward_mean=.3)
    rows = lambda **changes: [dict(calm, step=i, **changes) for i in range(1, 31)]
    assert [o.level for o in health(rows())]==['good']
    found = health(rows(**{key:ALARMS[key]}))
    assert len(found)==1 and found[0].level in LEVELS[1:] and found[0].text()!=found[0].text('zh')

def test_events_are_told_once():
    kinds = ('saved', 'save_failed', 'quarantined', 'out_of_memory', 'rolled_back', 'rolled_back', 'something_new')
    found = health([], events=[dict(kind=k) for k in kinds])
    assert [o.level for o in found]==['serious', 'warning', 'warning', 'warning'] and 'diverged (×2)' in ' '.join(o.text() for o in found)

def test_falling_shrinking_slowing():
    falls = [dict(step=i, reward_mean=.6 if i < 20 else .1, completion_length=80 if i < 20 else 8, **{'time/tokens_per_second':900 if i < 30 else 100}) for i in range(1, 41)]
    text = ' '.join(o.text() for o in health(falls))
    assert 'fallen by 0.50' in text and 'shrunk from 80 to 8' in text and 'half of what it was' in text
    assert len(health([dict(step=1, kl=float('nan'), reward_mean=None, truncated='x')]))==1

def test_at_most_two_updates_a_second(tmp_path):
    "However fast rows come"
    run = write_example(tmp_path/'run', steps=3)
    run.set_status('running', 3, total=900)
    with run.lock():
        p = panel.Panel(run, every=.01)
        p.build()
        began,thread = time.monotonic(),threading.Thread(target=p.watch)
        thread.start()
        for i in range(4, 64):
            run.append_metrics(dict(step=i, reward_mean=.1))
            time.sleep(.03)
        run.set_status('finished', 64, total=900)
        thread.join(20)
    assert 2 <= p.updates <= 2*(time.monotonic()-began)+2 and 'finished' in p.live.value and len(p.box.children)==1

@pytest.fixture(scope='module')
def started(tmp_path_factory):
    "A short training in a child process"
    folder = tmp_path_factory.mktemp('child')
    return panel.start(dict(SMALL, max_steps=2000), demo_examples()[:12], folder/'run')

def steps_done(run, n, seconds=90):
    end = time.monotonic()+seconds
    while len(run.metrics()) < n and time.monotonic() < end: time.sleep(.05)
    assert len(run.metrics()) >= n, (run.path/'console.log').read_text(encoding='utf-8')

def state_is(run, state, seconds=30):
    end = time.monotonic()+seconds
    while run.status()['state']!=state and time.monotonic() < end: time.sleep(.05)
    assert run.status()['state']==state

def test_every_request_is_served_by_the_child(started):
    run = started.run
    steps_done(run, 1)
    assert started.checkpoint()==panel.ASKED['checkpoint']
    end = time.monotonic()+30
    while not run.checkpoint_paths() and time.monotonic() < end: time.sleep(.05)
    assert run.checkpoint_paths() and not any(run.validate().values())
    started.pause()
    state_is(run, 'paused')
    n = len(run.metrics())
    time.sleep(.5)
    assert len(run.metrics())==n
    started.go()
    steps_done(run, n+1)
    started.stop()
    started.wait(60)
    assert run.status()['state']=='stopped' and run.load_checkpoint().step==run.status()['step']
    assert 'saved: step-' in started.bundle()['text/html']
    assert started.stop()=='nothing to stop: the run is stopped'

def test_a_stopped_run_goes_on(started):
    run,before = started.run,started.run.status()['step']
    again = panel.resume(run.path)
    assert again.snap['state']=='new' and again.alive
    steps_done(run, before+1)
    state_is(run, 'running')
    again.stop()
    again.wait(60)
    assert run.status()['state']=='stopped' and run.status()['step'] > before
    assert [o['step'] for o in run.metrics()]==list(range(1, run.status()['step']+1))

def test_a_process_that_never_began_is_found_out(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path/'run', dict(model_name='m'), 'x')
    assert snapshot(run)['state']=='new'
    (run.path/'console.log').write_text('error: no such model <b>\n  fix: …\n', encoding='utf-8')
    run.write_json('process.json', dict(started=time.time()))
    assert snapshot(run)['state']=='new'
    run.write_json('process.json', dict(started=time.time()+5))
    monkeypatch.setattr('finrl_grpo.view.PATIENCE', -9)
    assert snapshot(run)['state']=='interrupted' and 'no such model &lt;b&gt;' in view_html(snapshot(run))

def test_the_child_is_nobodys_child(started):
    "A kernel that is restarted ends its children; the training is not among them"
    assert started.run.status()['pid'] not in {os.getpid()}
    assert 'go on with: finrl-grpo resume' in (started.run.path/'console.log').read_text(encoding='utf-8')

def test_a_start_that_cannot_be_is_refused_at_once(tmp_path):
    from finrl_grpo.config import UserError
    with pytest.raises(UserError, match='learning_rat'): panel.start(dict(SMALL, learning_rat=1), demo_examples()[:4], tmp_path/'a')
    assert not (tmp_path/'a').exists()
    write_example(tmp_path/'b', steps=2)
    with pytest.raises(UserError, match='holds a run already'): panel.start(SMALL, demo_examples()[:4], tmp_path/'b')
    with pytest.raises(UserError, match='no run in'): panel.show(tmp_path/'c')

NOTEBOOK = ['''
from finrl_grpo import panel
from finrl_grpo.data import demo_examples
rows = demo_examples()[:12]
''', f'''
small = {SMALL!r}
def brevity(prompts, completions, **_): return [1/(1+len(o)) for o in completions]
here = panel.start(small, rows, 'here', reward=brevity)
''', '''
again = panel.show('here')
again
''', '''
%load_ext autoreload
%autoreload 2
import importlib
importlib.reload(panel)
panel.show('here').run.status()['state']
''', '''
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import load_config
display(RunFolder.open('here'), rows[0])
load_config(preset='quickstart')
''', '''
import os, signal, threading, time
def brevity(prompts, completions, **_):
    if len(calls)==3: os.kill(os.getpid(), signal.SIGINT)
    calls.append(1)
    return [1/(1+len(o)) for o in completions]
calls = []
cut = panel.start(dict(small, max_steps=500), rows, 'cut', reward=brevity)
cut.run.status()['state'], cut.run.load_checkpoint() is not None
''']

def notebook_of(texts):
    cells = [nbformat.v4.new_code_cell(o.strip()) for o in texts]
    return nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))

def run_cells(texts, folder):
    "Cells after they were run by a kernel in `folder`"
    from nbclient import NotebookClient
    notebook = notebook_of(texts)
    NotebookClient(notebook, timeout=300, resources=dict(metadata=dict(path=str(folder)))).execute()
    return notebook.cells

def test_a_notebook_from_top_to_bottom(tmp_path):
    "As nbclient does it: own reward in the kernel, static HTML left, autoreload, and an interrupt that saves"
    outputs = [c.outputs for c in run_cells(NOTEBOOK, tmp_path)]
    rows_query = demo_examples()[0].query
    pages = lambda i: [o['data']['text/html'] for o in outputs[i] if 'text/html' in o.get('data', {})]
    assert len(pages(1))==1 and '✓ finished' in pages(1)[0] and len(pages(1)[0].encode()) <= 200_000
    assert panel.HERE in ''.join(o.get('text', '') for o in outputs[1])
    assert len(pages(2))==1 and "'finished'" in outputs[3][-1]['data']['text/plain']
    assert len(pages(4))==3 and 'class="state finished"' in pages(4)[0] and rows_query in pages(4)[1] and 'preset quickstart' in pages(4)[2]
    assert outputs[5][-1]['data']['text/plain']=="('stopped', True)"

AUTORELOAD = ['''
import pathlib, sys, time
sys.path.insert(0, '.')
%load_ext autoreload
%autoreload 2
from finrl_grpo import panel
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import TrainConfig, UserError, load_config
from finrl_grpo.data import Example, demo_examples
from finrl_grpo.reward import FinancialRewardModel, RewardBreakdown
from finrl_grpo.view import write_example
c,b,rows = load_config({'model_name':'builtin:micro'}),FinancialRewardModel().score('什麼是ETF？', 'ETF有風險。'),demo_examples()[:3]
run = write_example('example', steps=3)
p = panel.show(run)
def edit(pattern, mark):
    time.sleep(1.1)
    for o in pathlib.Path('finrl_grpo').glob(pattern): o.write_text(o.read_text(encoding='utf-8')+f'\\nEDITED = {mark}\\n', encoding='utf-8')
def look(output):
    kinds = isinstance(c, TrainConfig), isinstance(b, RewardBreakdown), isinstance(p, panel.Panel), isinstance(run, RunFolder), isinstance(rows[0], Example)
    made,_ = panel.prepare(c, rows, output)
    try: load_config({'beat':1})
    except UserError as e: caught = 'beta' in str(e)
    return kinds, c==load_config({'model_name':'builtin:micro'}), made.config()['model_name'], panel.show(run).run.path.name, caught, 'EDITED' in dir(sys.modules['finrl_grpo.panel'])
edit('config.py', 1)
''', 'look("one")', 'edit("*.py", 2)', 'look("two")', "{sys.modules[f'finrl_grpo.{o}'].EDITED for o in ('config', 'panel', 'reward', 'card', 'view', 'checkpoint')}"]

def test_objects_survive_an_autoreload(tmp_path):
    "An edited module is loaded again under a kernel that holds objects of it"
    import shutil,finrl_grpo
    shutil.copytree(Path(finrl_grpo.__file__).parent, tmp_path/'finrl_grpo', ignore=shutil.ignore_patterns('__pycache__'))
    cells = run_cells(AUTORELOAD, tmp_path)
    whole = "((True, True, True, True, True), True, 'builtin:micro', 'example', True, {})"
    assert [c.outputs[-1]['data']['text/plain'] for c in (cells[1], cells[3], cells[4])]==[whole.format(False), whole.format(True), '{2}']

PAPERMILL = ['''
steps = 1
''', f'''
from finrl_grpo import panel
from finrl_grpo.data import demo_examples
small = {SMALL!r}
p = panel.start(dict(small, max_steps=steps), demo_examples()[:12], 'run', wait=True)
''', '''
p.run.status()['state'], len(p.run.metrics())
''']

def test_papermill_sets_a_parameter_and_keeps_the_picture(tmp_path):
    "Training in the child process, from a notebook that nobody watches"
    papermill = pytest.importorskip('papermill', reason='papermill is not installed')
    notebook = notebook_of(PAPERMILL)
    notebook.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(notebook, tmp_path/'in.ipynb')
    papermill.execute_notebook(str(tmp_path/'in.ipynb'), str(tmp_path/'out.ipynb'), parameters=dict(steps=3), cwd=str(tmp_path), progress_bar=False)
    cells = nbformat.read(tmp_path/'out.ipynb', 4).cells
    [page] = [o['data']['text/html'] for o in cells[2].outputs if 'text/html' in o.get('data', {})]
    assert 'class="state finished"' in page and cells[3].outputs[-1]['data']['text/plain']=="('finished', 3)"
    assert not [o for c in cells for o in c.outputs if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})], 'no dead buttons are left'

@pytest.mark.slow
def test_a_tutorial_under_papermill(tmp_path, repo):
    papermill = pytest.importorskip('papermill', reason='papermill is not installed')
    papermill.execute_notebook(str(repo/'nbs/tutorials/kill_and_resume.ipynb'), str(tmp_path/'out.ipynb'), cwd=str(tmp_path), progress_bar=False)
    assert not [o for c in nbformat.read(tmp_path/'out.ipynb', 4).cells if c.cell_type=='code' for o in c.outputs if o.output_type=='error']

def test_light_import():
    "Looking at a run needs no torch"
    code = "import sys, finrl_grpo.panel; print([o for o in ('torch', 'transformers', 'matplotlib', 'datasets', 'ipywidgets', 'IPython') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'
