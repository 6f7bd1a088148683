"""The panel over Jupyter's own protocol: what a front end that is neither JupyterLab nor Notebook gets to see, such as VS Code or nteract.

A kernel is started by `jupyter_client`, and this file plays the front end: it keeps the outputs of a cell, holds the state of the widgets, and sends clicks.
VS Code itself is not run.
"""
import time
import pytest
from jupyter_client.manager import start_new_kernel
from finrl_grpo.panel import ASKED,BUTTONS
from finrl_grpo.view import write_example
from test_panel import Tree

WIDGET = 'application/vnd.jupyter.widget-view+json'
MESSAGES = {'status', 'execute_input', 'stream', 'display_data', 'update_display_data', 'comm_open', 'comm_msg', 'comm_close'}

class FrontEnd:
    "A document of one cell, and the widgets that it shows"
    def __init__(self, folder):
        self.manager,self.client = start_new_kernel(kernel_name='python3', cwd=str(folder))
        self.outputs,self.models,self.seen,self.control = [],{},[],[]

    def read(self, until, seconds=30):
        "Take what the kernel publishes until `until()` is true"
        end = time.monotonic()+seconds
        while not until():
            assert time.monotonic() < end, [m['header']['msg_type'] for m in self.seen]
            if self.client.iopub_channel.msg_ready(): self.take(self.client.get_iopub_msg(timeout=5))
            else: time.sleep(.02)

    def take(self, message):
        kind,content = message['header']['msg_type'],message['content']
        self.seen.append(message)
        data,name = content.get('data', {}),content.get('transient', {}).get('display_id')
        if kind=='display_data': self.outputs.append((name, data))
        if kind=='update_display_data': self.outputs = [(o, data if o==name else old) for o,old in self.outputs]
        if kind=='comm_open': self.models[content['comm_id']] = dict(data['state'])
        if kind=='comm_msg' and content['comm_id'] in self.models and data['method']=='update': self.models[content['comm_id']].update(data['state'])
        if kind=='comm_msg' and content['comm_id'] not in self.models: self.control.append(data)

    def run(self, code):
        "Run a cell to its end"
        asked = self.client.execute(code)
        self.read(lambda: self.idle_after(asked))
        wrong = [m['content'] for m in self.seen if m['header']['msg_type']=='error']
        assert wrong==[]

    def idle_after(self, request):
        return any(m['content'].get('execution_state')=='idle' and m['parent_header'].get('msg_id')==request for m in self.seen)

    def send(self, kind, metadata=None, **content):
        "A message of a widget, and all that the kernel says to it"
        message = self.client.session.msg(kind, content, metadata=metadata)
        self.client.shell_channel.send(message)
        self.read(lambda: self.idle_after(message['header']['msg_id']))

    def named(self, name):
        "Identity and state of the widgets of one kind"
        return [(k, o) for k,o in self.models.items() if o['_model_name']==name]

    def click(self, text):
        [comm] = [k for k,o in self.named('ButtonModel') if text in o['description']]
        self.send('comm_msg', comm_id=comm, data=dict(method='custom', content=dict(event='click')))

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

@pytest.fixture(scope='module')
def shown(tmp_path_factory):
    "A run that seems to be going, shown by a kernel"
    folder = tmp_path_factory.mktemp('kernel')
    run = write_example(folder/'run', steps=20)
    run.set_status('running', 20, total=40)
    page = FrontEnd(folder)
    try:
        with run.lock():
            page.run("from finrl_grpo import panel\np = panel.show('run')")
            yield run,page
    finally: page.close()

def test_messages_and_outputs_are_standard(shown):
    "Core widgets by their standard comm target, and three MIME types; no script and no widget of our own"
    run,page = shown
    assert {m['header']['msg_type'] for m in page.seen} <= MESSAGES
    opened = [m for m in page.seen if m['header']['msg_type']=='comm_open']
    assert opened and {m['content']['target_name'] for m in opened}=={'jupyter.widget'}
    assert {m['metadata']['version'].split('.')[0] for m in opened}=={'2'}
    assert {o['_model_module'] for o in page.models.values()} <= {'@jupyter-widgets/base', '@jupyter-widgets/controls'}
    assert {kind for _,data in page.outputs for kind in data}=={'text/html', 'text/plain', WIDGET}
    view,copy = (data for _,data in page.outputs)
    assert view[WIDGET]['model_id'] in page.models and '● running' in copy['text/html'] and 'script' not in Tree(copy['text/html']).names
    assert len(page.named('ButtonModel'))==len(BUTTONS) and len(page.named('DropdownModel'))==1

def test_every_click_arrives(shown):
    "Over a comm message, while the kernel is idle; the answer comes back as the state of a widget"
    run,page = shown
    asked = lambda: ''.join(o['value'] for _,o in page.named('HTMLModel'))
    for text,command in (('Checkpoint', 'checkpoint'), ('Sample', 'sample'), ('Pause', 'pause'), ('Go on', 'go'), ('Stop', 'stop')):
        run.clear_request()
        if command=='go': run.request('pause')
        page.click(text)
        assert run.requested()==command and ASKED[command] in asked()
    assert '◐ stopping' in asked()
    run.clear_request()

def test_a_question_is_chosen(shown):
    run,page = shown
    [(comm, state)] = page.named('DropdownModel')
    assert state['_options_labels'][0]=='automatic' and len(state['_options_labels']) > 1
    page.send('comm_msg', comm_id=comm, data=dict(method='update', state=dict(index=1)))
    page.run('print(p.pin)')
    printed = ''.join(m['content']['text'] for m in page.seen if m['header']['msg_type']=='stream')
    assert printed.strip().startswith(state['_options_labels'][1].rpartition(' (')[0])

def test_a_page_that_comes_back_is_told_all(shown):
    "After a reload a front end asks the kernel for its widgets"
    run,page = shown
    page.send('comm_open', comm_id='back', target_name='jupyter.widget.control', data={}, metadata=dict(version='1.0.0'))
    page.send('comm_msg', comm_id='back', data=dict(method='request_states'))
    [told] = page.control
    assert told['method']=='update_states' and set(told['states'])==set(page.models)

def test_what_is_saved_is_complete(shown):
    "When the run ends, the document holds its last picture as plain HTML, and no view of a widget"
    run,page = shown
    run.append_metrics(dict(step=21, reward_mean=.5))
    run.set_status('finished', 21, total=40)
    page.read(lambda: '✓ finished' in page.outputs[-1][1].get('text/html', ''))
    page.read(lambda: not any(WIDGET in data for _,data in page.outputs))
    saved = page.outputs[-1][1]
    tree = Tree(saved['text/html'])
    assert tree.open==tree.wrong==[] and saved['text/html'].count('<svg class="chart"')==4 and 'One question through the steps' in saved['text/html']
    assert len(saved['text/html'].encode()) <= 200_000 and saved['text/plain'].startswith('run: finished, step 21 of 40')
    assert {m['header']['msg_type'] for m in page.seen} <= MESSAGES
