"""Bad input: one clear message, exit code 2 or 3, no traceback, nothing half-written.

Every case runs the whole command in this process, which is quick because nothing heavy is imported before it fails; the kinds of
broken rows are in test_data.py, here is what the commands make of them.
"""
import os, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from finrl_grpo import cli
from finrl_grpo.data import write_demo

GOOD = '{"query": "分析台積電的投資價值", "context": "台股投資分析", "reference": "參考回答"}\n'
BIG5 = '{"query": "分析台積電的投資價值與風險，並說明適合哪一種投資人"}\n'.encode('big5')

DATA = dict( # name: (content of data.jsonl, what the message must hold)
    empty=('', ['data.jsonl', 'empty']),
    blank=('\n\n  \n', ['data.jsonl', 'no rows']),
    broken_line=(GOOD+'{"query": "如何評估', ['data.jsonl:2', 'too early']),
    garbage=(GOOD+'not json\n', ['data.jsonl:2', 'not json']),
    python=("{'query': 'x'}\n", ['data.jsonl:1', 'single quotes']),
    wrong_keys=('{"qurey": "分析台積電"}\n', ['data.jsonl:1', 'qurey', 'query']),
    no_query=(GOOD+'{"context": "台股"}\n', ['data.jsonl:2', 'query']),
    blank_query=('{"query": "　 "}\n', ['data.jsonl:1', 'empty']),
    number=('{"query": 5}\n', ['data.jsonl:1', 'number']),
    scalar=('5\n', ['data.jsonl:1', 'number']),
    web_page=('<!DOCTYPE html><html><body>404</body></html>', ['data.jsonl', 'web page']),
    big5=(BIG5, ['data.jsonl', 'Big5']),
    binary=(bytes(range(256)), ['data.jsonl']),
    array_cut=('[{"query": "分析台積電"}, {"query": ', ['data.jsonl']),
)

CONFIG = dict( # name: (words after `train …`, what the message must hold)
    unknown_key=(['--config', '{"batchsize": 2}'], ['batchsize', 'did you mean `batch_size`']),
    unknown_reward_key=(['--config', '{"reward": {"accuracy": 1}}'], ['accuracy']),
    broken_json=(['--config', '{"batch_size": 2'], ['inline JSON', 'neither JSON nor YAML']),
    list_config=(['--config', '{1, 2}'], ['inline JSON']),
    missing_file=(['--config', 'nowhere.json'], ['nowhere.json']),
    near_file=(['--config', 'god.yaml'], ['god.yaml', 'good.yaml']),
    folder=(['--config', 'folder'], ['folder']),
    binary_file=(['--config', 'binary.json'], ['binary.json', 'UTF-8']),
    broken_file=(['--config', 'broken.json'], ['broken.json:2']),
    wrong_type=(['--config', '{"batch_size": "four"}'], ['batch_size', 'whole number']),
    word_for_bool=(['--set', 'use_wandb=maybe'], ['use_wandb', 'true or false']),
    too_small=(['--set', 'batch_size=0'], ['batch_size', 'least is 1']),
    not_a_number=(['--config', '{"learning_rate": NaN}'], ['NaN']),
    twice=(['--config', '{"batch_size": 2, "batch_size": 3}'], ['batch_size', 'twice']),
    no_equals=(['--set', 'batch_size'], ['key=value']),
    one_answer=(['--set', 'num_generations=1'], ['num_generations', 'ppo']),
    lengths=(['--set', 'max_length=64', '--set', 'max_new_tokens=64'], ['max_length']),
    template=(['--set', 'prompt_template=問題'], ['{query}']),
    preset=(['--preset', 'rtx4080'], ['rtx4080', 'rtx4070']),
    algorithm=(['--algorithm', 'gpro'], ['gpro', 'did you mean `grpo`']),
    builtin=(['--model', 'builtin:tinny'], ['builtin:tinny', 'builtin:tiny']),
    model_folder=(['--model', 'folder'], ['folder', 'config.json']),
    gguf=(['--model', 'model.gguf'], ['model.gguf']),
    flag=(['--modle', 'builtin:micro'], ['--modle', 'did you mean `--model`']),
    reward_weights=(['--config', '{"accuracy_weight": 0, "risk_assessment_weight": 0, "recommendation_weight": 0, "language_quality_weight": 0}'], ['weights']),
)

@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    "A folder to work in, with some files to trip over"
    monkeypatch.chdir(tmp_path)
    write_demo('demo.jsonl', 20)
    Path('folder').mkdir()
    Path('good.yaml').write_text('beta: 0.1\n', encoding='utf-8')
    Path('binary.json').write_bytes(b'\xff\xfe\x00{')
    Path('broken.json').write_text('{"batch_size": 2,\n "beta" 0.1}\n', encoding='utf-8')
    Path('file').write_text('mine', encoding='utf-8')

def listing(): return sorted(str(o) for o in Path().rglob('*'))

def refused(words, code, holds, capsys):
    "Run a command that must fail; check its code, its message and that it left nothing"
    before = listing()
    assert cli.main([str(o) for o in words]) == code
    err = capsys.readouterr().err
    assert err.startswith('error: ') and 'Traceback' not in err, err
    assert len(err.splitlines()) <= 14 and all(o in err for o in holds), err
    assert listing() == before
    return err

@pytest.mark.parametrize('name', DATA)
def test_bad_data(name, capsys):
    content,holds = DATA[name]
    Path('data.jsonl').write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(['train', '--dataset', 'data.jsonl', '--output', 'run', '--model', 'builtin:micro'], 3, holds, capsys)

@pytest.mark.parametrize('name', CONFIG)
def test_bad_settings(name, capsys):
    words,holds = CONFIG[name]
    refused(['train', '--dataset', 'demo.jsonl', '--output', 'run', *words], 2, holds, capsys)

@pytest.mark.parametrize('path,holds', [('missing.jsonl', 'missing.jsonl'), ('folder', 'folder'), ('dem.jsonl', 'demo.jsonl'), ('', '')])
def test_no_data_file(path, holds, capsys):
    refused(['train', '--dataset', path, '--output', 'run', '--model', 'builtin:micro'], 3, [holds], capsys)

@pytest.mark.parametrize('output', ['file', 'file/run', '', pytest.param('/proc/finrl/run', marks=pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc'))])
def test_output_that_cannot_be(output, capsys):
    refused(['train', '--dataset', 'demo.jsonl', '--output', output, '--model', 'builtin:micro'], 3 if output else 2, [output], capsys)
    assert Path('file').read_text(encoding='utf-8') == 'mine'

@pytest.mark.skipif(os.name == 'nt' or not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_output_without_permission(capsys):
    Path('folder').chmod(0o500)
    try: refused(['train', '--dataset', 'demo.jsonl', '--output', 'folder/run', '--model', 'builtin:micro'], 3, ['folder/run'], capsys)
    finally: Path('folder').chmod(0o700)

def test_demo_that_cannot_be_written(capsys):
    refused(['demo', '--dataset', 'file/demo.jsonl'], 3, ['file/demo.jsonl'], capsys)
    refused(['demo', '--dataset', 'new.jsonl', '--samples', '0'], 2, ['at least 1'], capsys)
    refused(['demo', '--dataset', 'new.jsonl', '--samples', 'many'], 2, ['--samples', 'many'], capsys)

@pytest.mark.parametrize('words', [['status', 'folder'], ['resume', 'folder'], ['stop', 'nowhere'], ['ckpt', 'folder']])
def test_no_run_there(words, capsys): refused(words, 3, ['no run in'], capsys)

def test_the_guide_script_says_the_same():
    script = Path(__file__).parent.parent/'gpu_training'/'grpo_trainer.py'
    for words,code,holds in [(['--dataset', 'missing.jsonl', '--output', 'run', '--model', 'builtin:micro'], 3, 'missing.jsonl'), (['--datset', 'x'], 2, '--dataset'),
        (['--dataset', 'demo.jsonl'], 2, '--output')]:
        run = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, encoding='utf-8', timeout=60)
        assert run.returncode == code and holds in run.stderr and 'Traceback' not in run.stderr, run.stderr

@pytest.mark.parametrize('how', ['skip', 'quarantine'])
def test_train_goes_on_without_bad_rows_when_told_to(how, capsys, monkeypatch):
    "`train --on-bad-row` leaves them out, says so, and a resume reads the file the same way"
    Path('data.jsonl').write_bytes(GOOD.encode()*20 + b'not json\n')
    seen = []
    monkeypatch.setattr('finrl_grpo.cli.start', lambda run, rows, *_: seen.append(len(rows)) or 75)
    refused(['train', '--dataset', 'data.jsonl', '--output', 'run', '--model', 'builtin:micro'], 3, ['data.jsonl:21', 'not json'], capsys)
    assert cli.main(['train', '--dataset', 'data.jsonl', '--output', 'run', '--model', 'builtin:micro', '--on-bad-row', how]) == 75
    assert 'bad rows left out: 1' in capsys.readouterr().err and Path('bad_rows.jsonl').exists() == (how == 'quarantine')
    assert cli.main(['resume', 'run']) == 75 and seen == [20, 20]

def test_too_few_rows_are_mentioned_once(capsys, monkeypatch):
    Path('few.jsonl').write_text(GOOD, encoding='utf-8')
    monkeypatch.setattr('finrl_grpo.cli.start', lambda *_: 0)
    cli.main(['train', '--dataset', 'few.jsonl', '--output', 'run', '--model', 'builtin:micro'])
    told = capsys.readouterr()
    assert (told.out+told.err).count('held back') == 1 and 'too few' not in told.out+told.err

texts = st.one_of(st.binary(max_size=120), st.lists(st.sampled_from([b'{', b'}', b'"', b':', b',', b'batch_size', b'beta', b'2', b'NaN', b'[', b']', b'\n', b'- ', b'&a', b'*a', b'!!python/object:os.system',
    b'{"batch_size": 2}', b'reward:', b' ', b'\xff', b'\x00', '學習'.encode(), b'1e999', b'null', b'<<:', b'"\\ud800"']), max_size=10).map(b''.join))

@given(content=texts)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_a_configuration_give_settings_or_a_message(content):
    from finrl_grpo.config import TrainConfig, UserError, load_config
    Path('any.yaml').write_bytes(content)
    for source in ['any.yaml'] + ([content.decode()] if content.startswith(b'{') and content.isascii() else []):
        try: c = load_config(source)
        except UserError as e: assert e.exit_code == 2 and len(str(e)) < 3000
        else: assert isinstance(c, TrainConfig)
