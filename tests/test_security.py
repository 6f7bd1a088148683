"""Files from elsewhere run nothing, names stay inside the run folder, keys reach no file, and text cannot act on a terminal or a page"""
import ast, json, os, pickle, re, subprocess, sys
from pathlib import Path
import pytest
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import CheckpointError, TrainConfig, UserError
from finrl_grpo.files import redact

top = Path(__file__).parent.parent
HOSTILE = ['<img src=x onerror=alert(1)>', '</script><script>alert(1)</script>', '"><svg onload=alert(1)>', '[x](javascript:alert(1))', '\x1b]0;owned\x07', '\x1b[2J\x1b[31m', '[bold]rich[/bold]',
    '\u202e反轉', '保證獲利\r蓋掉', '\x9b31m', 'a'*1_000_000]
SMALL = dict(model_name='builtin:micro', batch_size=2, gradient_accumulation_steps=1, num_generations=2, max_prompt_length=16, max_new_tokens=4, ppo_epochs=1, max_steps=2, save_steps=1,
    use_fp16=False, use_wandb=False, gradient_checkpointing=False, eval_fraction=0., learning_rate=1e-3)

class Bomb:
    "A pickle that would leave a trace if anybody opened it"
    def __init__(self, trace): self.trace = trace
    def __reduce__(self): return os.mkdir,(str(self.trace),)

@pytest.fixture
def run(tmp_path): return RunFolder.create(tmp_path/'run', TrainConfig(**SMALL).to_dict(), 'hash')

def save(run, step):
    import torch
    return run.save_checkpoint(step, dict(policy=dict(w=torch.ones(2))), dict(step=step))

# -- nothing is executed ---------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['optimizer.pt', 'rng_state.pth', 'training_args.bin', 'scheduler.pt', 'pytorch_model.bin', 'state.pkl'])
def test_a_pickle_in_a_checkpoint_is_never_opened(run, tmp_path, name):
    path = save(run, 1)
    (path/name).write_bytes(pickle.dumps(Bomb(tmp_path/'exploded')))
    assert run.load_checkpoint().step == 1 and not (tmp_path/'exploded').exists()

@pytest.mark.parametrize('name', ['policy.safetensors', 'state.json', 'manifest.json'])
def test_a_pickle_in_place_of_a_file_is_damage(run, tmp_path, name):
    (save(run, 1)/name).write_bytes(pickle.dumps(Bomb(tmp_path/'exploded')))
    with pytest.raises(CheckpointError): run.load_checkpoint()
    assert not (tmp_path/'exploded').exists()

def test_weights_that_are_a_pickle_are_refused(tmp_path):
    "A model folder with pytorch_model.bin in it: a bomb does not go off, whatever the message"
    from finrl_grpo.models import load_policy, model_folder
    import shutil
    folder = tmp_path/'model'
    shutil.copytree(model_folder('builtin:micro'), folder)
    for o in folder.glob('*.safetensors'): o.unlink()
    (folder/'pytorch_model.bin').write_bytes(pickle.dumps(Bomb(tmp_path/'exploded')))
    with pytest.raises(Exception): load_policy(TrainConfig(**{**SMALL, 'model_name':str(folder)}))
    assert not (tmp_path/'exploded').exists()

def test_code_beside_a_model_is_not_run(tmp_path):
    from finrl_grpo.models import load_policy, model_folder
    import shutil
    folder = tmp_path/'model'
    shutil.copytree(model_folder('builtin:micro'), folder)
    config = json.loads((folder/'config.json').read_text(encoding='utf-8'))
    (folder/'config.json').write_text(json.dumps(config|dict(auto_map={'AutoModelForCausalLM':'evil.Model', 'AutoConfig':'evil.Config'}, model_type='evil')), encoding='utf-8')
    (folder/'evil.py').write_text(f'import os\nos.mkdir({str(tmp_path/"exploded")!r})', encoding='utf-8')
    with pytest.raises(Exception): load_policy(TrainConfig(**{**SMALL, 'model_name':str(folder)}))
    assert not (tmp_path/'exploded').exists()

def test_yaml_makes_no_objects(tmp_path):
    from finrl_grpo.config import ConfigError, load_config
    path = tmp_path/'c.yaml'
    path.write_text(f'batch_size: !!python/object/apply:os.mkdir ["{tmp_path/"exploded"}"]\n', encoding='utf-8')
    with pytest.raises(ConfigError): load_config(path)
    assert not (tmp_path/'exploded').exists()

# -- nothing leaves the run folder -----------------------------------------------------------------

@pytest.mark.parametrize('name', ['../outside', '..', '/etc', 'step-1/../../outside', 'C:\\x', ''])
def test_rm_takes_names_of_checkpoints_only(run, tmp_path, name):
    save(run, 1)
    (tmp_path/'outside').mkdir()
    with pytest.raises(UserError): run.rm(name, force=True)
    assert (tmp_path/'outside').is_dir() and len(run.ls()) == 1

def test_a_manifest_cannot_point_outside(run, tmp_path):
    "File names in a manifest are names, whatever path they carry"
    from finrl_grpo.files import read_manifest, seal
    path = save(run, 1)
    (tmp_path/'secret.safetensors').write_bytes(b'not yours')
    manifest = read_manifest(path/'manifest.json')
    manifest['files']['../../../secret.safetensors'] = manifest['files']['policy.safetensors']
    (path/'manifest.json').write_bytes(seal(manifest))
    with pytest.raises(CheckpointError): run.load_checkpoint()

@pytest.mark.skipif(os.name == 'nt', reason='symbolic links need a privilege there')
def test_pruning_does_not_follow_a_link(run, tmp_path):
    outside = tmp_path/'outside'
    outside.mkdir()
    (outside/'mine').write_text('mine', encoding='utf-8')
    (run.checkpoints_path/'step-0').symlink_to(outside)
    for step in (1, 2, 3): save(run, step)
    assert (outside/'mine').read_text(encoding='utf-8') == 'mine'

# -- keys ------------------------------------------------------------------------------------------

CHILD = '''
import os, sys
from finrl_grpo import cli
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.data import demo_examples
from finrl_grpo.run import run_training
run = RunFolder.open(sys.argv[1])
def leaky(completions, **_):
    if run.metrics(): raise RuntimeError('401 for ' + os.environ['OPENAI_API_KEY'] + ' at https://me:hunter2hunter2@host/x')
    return [0.]*len(completions)
def action(words):
    try: return run_training(run, demo_examples()[:4], leaky)
    except Exception as e:
        e.run_folder = run.path
        raise
code = cli.guarded(action, [])
try: raise KeyError(os.environ['HF_TOKEN'])
except KeyError as e:
    e.run_folder = run.path
    cli.report(e, False)
sys.exit(code)
'''

def test_planted_keys_reach_no_byte_of_a_run(tmp_path):
    "Keys in the environment, in netrc, in a configuration and in the words of exceptions"
    keys = dict(WANDB_API_KEY='a1b2c3d4e5'*4, HF_TOKEN='hf_'+'Q7w8E9r0T1y2'*3, OPENAI_API_KEY='sk-'+'planted0key1here2'*2, MY_DB_PASSWORD='correct-horse-battery')
    run = RunFolder.create(tmp_path/'run', TrainConfig(**{**SMALL, 'max_steps':9, 'use_wandb':True, 'run_name':f'try {keys["HF_TOKEN"]}'}).to_dict(), 'hash')
    home = tmp_path/'home'
    home.mkdir()
    (home/'.netrc').write_text(f'machine api.wandb.ai login user password {"f0"*20}', encoding='utf-8')
    env = {k:v for k,v in os.environ.items() if not k.startswith('WANDB')}|keys|dict(HOME=str(home), WANDB_MODE='offline', OMP_NUM_THREADS='1')
    p = subprocess.run([sys.executable, '-c', CHILD, str(run.path)], env=env, capture_output=True, text=True, encoding='utf-8', timeout=300)
    assert p.returncode == 2 and 'leaky' in p.stderr, p.stderr
    assert (run.path/'bad_rewards.jsonl').exists() and (run.path/'grpo_trainer.log').exists() and list(run.path.glob('wandb/*')) and (run.path/'finrl-grpo-error.log').exists()
    for path in (o for o in run.path.rglob('*') if o.is_file()):
        data = path.read_bytes()
        for key in (*keys.values(), 'f0'*20, 'hunter2hunter2'): assert key.encode() not in data, (path, key)

def test_redact_changes_nothing_that_is_no_key(run):
    from finrl_grpo.config import PRESETS
    for preset in PRESETS.values(): assert redact(TrainConfig(**preset).to_dict()) == TrainConfig(**preset).to_dict()

# -- text that would act ---------------------------------------------------------------------------

@pytest.mark.parametrize('text', HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_on_a_terminal_and_on_a_page(text, run, capsys):
    from finrl_grpo.monitor import escape_terminal, say
    from finrl_grpo.reward import FinancialRewardModel
    say(text)
    shown = capsys.readouterr().err + escape_terminal(text)
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]', shown)
    if len(text) < 1000:
        html = FinancialRewardModel().score('分析台積電', text+'投資有風險，建議分散投資。')._repr_html_()
        assert '<img' not in html and '<script' not in html and '<svg onload' not in html and '\x1b' not in html and '\u202e' not in html

def test_quickstart_shows_answers_that_a_terminal_does_not_obey():
    from types import SimpleNamespace
    from finrl_grpo.quickstart import show_answers
    rows = [dict(query='問', answer='\x1b[2J\x1b]0;owned\x07答', reward=.1)]
    assert '\x1b' not in show_answers(SimpleNamespace(rows=rows), SimpleNamespace(rows=rows))

# -- Linux, WSL, Windows ---------------------------------------------------------------------------

POSIX = {'os': ['fork', 'kill', 'killpg', 'setsid', 'getuid', 'geteuid', 'getpgid', 'mkfifo', 'statvfs', 'nice', 'sched_getaffinity', 'uname', 'wait', 'waitpid', 'symlink', 'chown', 'O_DIRECTORY'],
    'signal': ['SIGKILL', 'SIGUSR1', 'SIGUSR2', 'SIGHUP', 'alarm', 'setitimer', 'pause', 'SIGALRM', 'SIGXFSZ']}
MODULES = ['fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty', 'posix', 'syslog']

def guarded_lines(tree):
    "Lines inside a `try`, or under a test of the system or of `hasattr`"
    found = set()
    for node in ast.walk(tree):
        tested = isinstance(node, (ast.If, ast.IfExp)) and re.search(r"os\.name|platform|hasattr", ast.unparse(node.test))
        if isinstance(node, ast.Try) or tested: found |= set(range(node.lineno, node.end_lineno+1))
    return found

def posix_only(path):
    "Calls and imports that Windows does not have, without a fall-back around them"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    safe,found = guarded_lines(tree),[]
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        bad = [o for o in names if o in MODULES]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in POSIX.get(node.value.id, ()): bad.append(f'{node.value.id}.{node.attr}')
        if isinstance(node, ast.Call): bad += [k.arg for k in node.keywords if k.arg in ('preexec_fn', 'start_new_session')]
        found += [f'{path.name}:{node.lineno}: {o}' for o in bad if node.lineno not in safe]
    return found

def test_posix_only_calls_have_a_fall_back():
    assert [o for p in sorted((top/'finrl_grpo').rglob('*.py')) for o in posix_only(p)] == []

def test_the_lint_finds_what_it_is_for(tmp_path):
    path = tmp_path/'x.py'
    path.write_text('import fcntl, os\nos.fork()\ntry: import resource\nexcept ImportError: pass\nif os.name != "nt": os.getuid()\n', encoding='utf-8')
    assert posix_only(path) == ['x.py:1: fcntl', 'x.py:2: os.fork']
