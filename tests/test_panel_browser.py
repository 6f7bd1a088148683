"""The panel in JupyterLab and in Notebook 7, driven through Chromium: a training is started, watched, stopped, and found again.

The browser is spoken to over its DevTools protocol, so nothing but Chromium and JupyterLab itself is needed. `FINRL_SHOTS=folder` keeps screenshots.
"""
import base64,json,os,shutil,socket,subprocess,sys,time,urllib.request
from contextlib import contextmanager
from pathlib import Path
import nbformat,pytest
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.view import write_example

pytestmark = pytest.mark.browser

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def until(look, seconds=60, every=.2, what='it'):
    "The first true value of `look()`"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        if found := look(): return found
        time.sleep(every)
    raise AssertionError(f'waited {seconds} s for {what}')

def answers(url):
    try: return json.load(urllib.request.urlopen(url, timeout=2))
    except (OSError, ValueError): return None

class Page:
    "One tab of a headless Chromium"
    def __init__(self, browser, profile):
        port = free_port()
        command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--window-size=1280,1400', f'--user-data-dir={profile}',
            f'--remote-debugging-port={port}', '--remote-allow-origins=*', 'about:blank']
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        tabs = until(lambda: [o for o in answers(f'http://127.0.0.1:{port}/json') or [] if o['type']=='page'], what='Chromium')
        import websocket
        self.socket,self.count = websocket.create_connection(tabs[0]['webSocketDebuggerUrl'], timeout=60),0
        self.call('Emulation.setFocusEmulationEnabled', enabled=True)

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while True:
            reply = json.loads(self.socket.recv())
            if reply.get('id')==self.count: break
        assert 'error' not in reply, reply
        return reply['result']

    def js(self, expression):
        "The value of an expression; promises are awaited"
        found = self.call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in found, found
        return found['result'].get('value')

    def go(self, url): self.call('Page.navigate', url=url)

    def shot(self, name, width=None, height=None, selector=None):
        "A screenshot into the folder FINRL_SHOTS, if that is set"
        folder = os.environ.get('FINRL_SHOTS')
        if not folder: return
        if width: self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        time.sleep(1)
        clip = json.loads(self.js(f'(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); return JSON.stringify([r.x, r.y, r.width, r.height]) }})()')) if selector else None
        area = dict(clip=dict(x=clip[0]-8, y=clip[1]-8, width=clip[2]+16, height=min(clip[3]+16, 1600), scale=1)) if clip else {}
        data = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=True, **area)['data']
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder)/f'{name}.png').write_bytes(base64.b64decode(data))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)

HOSTILE = ['<script>window.hacked = 1</script>', '<img src=x onerror="window.hacked = 2">', '"><svg onload=window.hacked=3>', "' onmouseover='window.hacked=4' x='", '</style><script>window.hacked=5</script>',
    '</div></div><iframe srcdoc="<script>top.hacked=6</script>">', '<a href="javascript:window.hacked=7">x</a>', '<style>body{display:none}</style>', '\u202egnp.exe\u202c', '\x1b[2J\x1b]0;x\x07', '$\\href{javascript:window.hacked=8}{x}$ 與 $$x$$',
    '{{7*7}} ${window.hacked=9}', '<!-- ', ']]>', '<textarea>', '&lt;script&gt;', '\x00', '<base href="//evil.example/">', '<form action=//evil.example><input name=q>', 'Z\u0351\u036b\u0343'*40]

def hostile_run(path):
    "A run whose every text is an attack"
    run = RunFolder.create(path, dict(model_name=HOSTILE[0], algorithm=HOSTILE[1]), 'x')
    run.append_metrics(dict(step=1, reward_mean=.1, reward_std=.1, kl=HOSTILE[2], loss=None))
    for i,text in enumerate(HOSTILE):
        breakdown = dict(accuracy=HOSTILE[3], evidence={HOSTILE[4]:[[0, 3, text, text]], 'accuracy':[[0, 5, text, HOSTILE[3]]]}, promises=[[1, 4, text, text]], gates={text:.5})
        run.append_samples([dict(step=HOSTILE[i % 4] if i > 10 else 1, prompt=0, answer=i, query=text, text=text*3, reward=text if i % 2 else .5, advantage=text, breakdown=breakdown)])
    run.event('save_failed', reason=HOSTILE[0])
    run.set_status('failed', 1, total=HOSTILE[5] if False else 3, exit_code=1, reason=HOSTILE[0]+HOSTILE[5])
    return run

TRAINING = '''
from finrl_grpo import panel
from finrl_grpo.data import demo_examples
small = dict(model_name='builtin:micro', batch_size=2, gradient_accumulation_steps=1, num_generations=3, max_prompt_length=32, max_new_tokens=8, ppo_epochs=1,
    max_steps=3000, save_steps=5000, eval_steps=5000, eval_fraction=0., use_fp16=False, use_wandb=False, gradient_checkpointing=False)
p = panel.start(small, demo_examples()[:12], 'run')
'''

@contextmanager
def server(root, module, *options):
    "JupyterLab or Notebook 7 on a folder with a notebook, and its address"
    port = free_port()
    cells = [nbformat.v4.new_code_cell(TRAINING.strip()), nbformat.v4.new_code_cell("shown = panel.show('hostile')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), root/'live.ipynb')
    hostile_run(root/'hostile')
    own = {f'JUPYTER_{k}_DIR':str(root/'.jupyter'/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')} | dict(JUPYTERLAB_SETTINGS_DIR=str(root/'.jupyter/settings'), JUPYTERLAB_WORKSPACES_DIR=str(root/'.jupyter/workspaces'))
    command = [sys.executable, '-m', module, '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=', '--ServerApp.password=', f'--ServerApp.root_dir={root}', '--expose-app-in-browser',
        '--ServerApp.disable_check_xsrf=True', '--allow-root', *options]
    quiet = root/'.jupyter/settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false"}', encoding='utf-8')
    with (root/'lab.log').open('w', encoding='utf-8') as log: process = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log, cwd=root)
    try:
        until(lambda: answers(f'http://127.0.0.1:{port}/api/status'), what=module)
        yield root,f'http://127.0.0.1:{port}'
    finally: end_lab(process, f'http://127.0.0.1:{port}')

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with server(tmp_path_factory.mktemp('lab'), 'jupyterlab', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.extension_manager=readonly') as o: yield o

@pytest.fixture(scope='module')
def notebook7(tmp_path_factory):
    notebook = pytest.importorskip('notebook', '7', reason='Notebook 7 is not installed')
    with server(tmp_path_factory.mktemp('notebook7'), notebook.__name__) as o: yield o

def end_lab(process, address):
    "Kernels first, and no patience with a server that waits for them"
    for o in answers(f'{address}/api/kernels') or []: urllib.request.urlopen(urllib.request.Request(f'{address}/api/kernels/{o["id"]}', method='DELETE'), timeout=20)
    process.terminate()
    try: process.wait(5)
    except subprocess.TimeoutExpired: process.kill()

def points_drawn(page):
    "Points of the reward's line"
    return page.js("(document.querySelector('.finrl-live figure svg.chart path[stroke-width=\"2.0\"]')?.getAttribute('d') || '').split(/[ML]/).length - 1")

def open_notebook(page, address, place='lab/tree/live.ipynb?reset'):
    page.go(f'{address}/{place}')
    widget = "[...(window.jupyterapp?.shell?.widgets('main') || [])].find(o => o.context)"
    until(lambda: page.js(f"{widget}?.context.sessionContext.session?.kernel?.status")=='idle', what='the notebook and its kernel')
    page.js(f"window.jupyterapp.shell.activateById({widget}.id)")

def test_a_training_is_watched_stopped_and_found_again(browser, lab, tmp_path):
    root,address = lab
    page = Page(browser, tmp_path/'profile')
    try:
        open_notebook(page, address)
        page.js("void window.jupyterapp.commands.execute('notebook:run-all-cells').catch(e => { window.failure = String(e) })")
        first = until(lambda: points_drawn(page) > 2 and points_drawn(page), what='the first points')
        until(lambda: points_drawn(page) > first, what='more points')
        assert page.js("[...document.querySelectorAll('.finrl-static')].map(o => getComputedStyle(o).display)[0]")=='none'
        page.shot('live')
        page.shot('panel-light', 1100, 1300, '.finrl-live')
        page.js("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}).then(() => true)") if os.environ.get('FINRL_SHOTS') else None
        page.shot('panel-dark', 1100, 1300, '.finrl-live')
        clicked = time.monotonic()
        page.js("[...document.querySelectorAll('.finrl-live button')].find(o => o.textContent.includes('Stop')).click()")
        run = RunFolder.open(root/'run')
        until(lambda: run.status()['state']=='stopped', seconds=20, what='the end of the run')
        print(f'stopped {time.monotonic()-clicked:.1f} s after the click, at step {run.status()["step"]}')
        assert run.load_checkpoint().step==run.status()['step'] and not any(run.validate().values())
        until(lambda: 'stopped' in (page.js("[...document.querySelectorAll('.finrl .state')].filter(o => o.offsetParent).map(o => o.textContent).join()") or ''), what='the word stopped')
        assert page.js('window.hacked') is None, 'a hostile text was executed'
        page.js("window.jupyterapp.commands.execute('docmanager:save').then(() => true)")
        open_notebook(page, address)
        shown = until(lambda: page.js("[...document.querySelectorAll('.finrl .state')].filter(o => o.offsetParent).map(o => o.textContent)"), what='the panel after a reload')
        assert 'stopped' in shown[0]
        check_hostile(page)
        stored = nbformat.read(root/'live.ipynb', 4)
        page.shot('after-reload')
    finally: page.close()
    pages = [o['data']['text/html'] for o in stored.cells[0].outputs if 'text/html' in o.get('data', {})]
    assert len(pages)==1 and '■ stopped' in pages[0] and len(pages[0].encode()) <= 200_000

@pytest.mark.slow
def test_the_same_in_notebook_7(browser, notebook7, tmp_path):
    root,address = notebook7
    page,place = Page(browser, tmp_path/'profile'),'notebooks/live.ipynb'
    states = lambda: page.js("[...document.querySelectorAll('.finrl .state')].filter(o => o.offsetParent).map(o => o.textContent).join()") or ''
    try:
        open_notebook(page, address, place)
        page.js("void window.jupyterapp.commands.execute('notebook:run-all-cells').catch(e => { window.failure = String(e) })")
        first = until(lambda: points_drawn(page) > 2 and points_drawn(page), what='the first points')
        until(lambda: points_drawn(page) > first, what='more points')
        assert page.js("[...document.querySelectorAll('.finrl-static')].map(o => getComputedStyle(o).display)[0]")=='none', 'the stored picture is hidden below the live one'
        page.shot('notebook7', 1100, 1300, '.finrl-live')
        page.js("[...document.querySelectorAll('.finrl-live button')].find(o => o.textContent.includes('Stop')).click()")
        run = RunFolder.open(root/'run')
        until(lambda: run.status()['state']=='stopped', seconds=20, what='the end of the run')
        assert run.load_checkpoint().step==run.status()['step'] and not any(run.validate().values())
        until(lambda: 'stopped' in states(), what='the word stopped')
        page.js("window.jupyterapp.commands.execute('docmanager:save').then(() => true)")
        open_notebook(page, address, place)
        until(lambda: 'stopped' in states(), what='the panel after a reload')
        check_hostile(page)
        page.shot('notebook7-reload')
    finally: page.close()

def check_hostile(page):
    "Nothing of a model's text became a part of the page"
    until(lambda: page.js("[...document.querySelectorAll('.finrl .state')].length > 1"), what='the second panel')
    assert page.js('window.hacked') is None
    found = page.js("[...document.querySelectorAll('.finrl')].flatMap(o => [...o.querySelectorAll('script,img,iframe,a,form,input,textarea,base,link,object,embed,mjx-container')]).map(o => o.tagName)")
    assert found==[]
    assert page.js("[...document.querySelectorAll('.finrl *')].every(o => [...o.attributes].every(a => !a.name.startsWith('on') && !/javascript:/.test(a.value) || ['title', 'aria-label'].includes(a.name)))")
    assert page.js("getComputedStyle(document.body).display") != 'none'
    assert page.js("document.querySelectorAll('.finrl style').length === document.querySelectorAll('.finrl').length")
