"""The guide, word for word: its commands, files, formats and snippets, on the smallest built-in model.

The commands run as a reader types them, in a folder that holds `gpu_training/` as a clone does. Only what makes them quick is added:
`--model builtin:micro` and a few settings with two steps.
"""
import json, os, shlex, shutil, subprocess, sys, time
from pathlib import Path
import pytest
from finrl_grpo import cli
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.data import load_dataset

top = Path(__file__).parent.parent
sys.path.insert(0, str(top/'tools'))
from guide import CONFIG as RTX4070, GRPO_ROWS, INSTRUCTION_ROWS
QUICK = '{"max_steps": 2, "num_generations": 2, "max_length": 64, "eval_samples": 2}'
QUICK_STEP = '{"batch_size": 2, "gradient_accumulation_steps": 1}'

CREATE = 'python gpu_training/grpo_trainer.py --create-demo --dataset ./data/demo_grpo_dataset.jsonl --demo-samples 100'
TRAIN = 'python gpu_training/grpo_trainer.py --dataset ./data/demo_grpo_dataset.jsonl --output ./models/grpo_financial_model'
TRAIN_CONFIG = 'python gpu_training/grpo_trainer.py --dataset ./data/your_dataset.jsonl --output ./models/your_model --config ./configs/grpo_config.json'

REWARD = '''{
  "accuracy_weight": 0.4,
  "risk_assessment_weight": 0.3,
  "recommendation_weight": 0.2,
  "language_quality_weight": 0.1,
  "max_reward": 1.0,
  "min_reward": -1.0
}
'''
CUSTOM_REWARD = '''
from gpu_training.grpo_trainer import FinancialRewardModel, FinancialRewardConfig

# 創建自定義獎勵配置
custom_reward_config = FinancialRewardConfig(
    accuracy_weight=0.5,  # 提高準確性權重
    risk_assessment_weight=0.3,
    recommendation_weight=0.15,
    language_quality_weight=0.05
)

# 創建自定義獎勵模型
reward_model = FinancialRewardModel(custom_reward_config)
'''
INFERENCE = '''
from transformers import AutoTokenizer, AutoModelForCausalLM

# 載入訓練好的模型
model_path = "./models/grpo_financial_model/best_model"
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path)

# 測試推理
query = "分析台積電的投資價值"
inputs = tokenizer.encode(query, return_tensors="pt")
outputs = model.generate(inputs, max_length=200, do_sample=True)
response = tokenizer.decode(outputs[0], skip_special_tokens=True)
print(response)
'''

@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A folder that looks like a clone to the guide's commands, with a home of its own"
    folder = tmp_path_factory.mktemp('clone')
    shutil.copytree(top/'gpu_training', folder/'gpu_training', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('data', 'configs', 'home'): (folder/name).mkdir()
    (folder/'data'/'your_dataset.jsonl').write_text(INSTRUCTION_ROWS, encoding='utf-8')
    (folder/'configs'/'grpo_config.json').write_text(RTX4070, encoding='utf-8')
    return folder

def shell(
    clone, # Where to run
    command:str, # As in the guide
    *more, # Added words
    timeout:float=300, # Seconds
    **env, # Environment; None removes
): # The finished process
    "Run a command of the guide, without W&B credentials"
    words = [sys.executable, *shlex.split(command)[1:], *more]
    hidden = ('WANDB_MODE', 'WANDB_API_KEY', 'WANDB_PROJECT', 'NETRC')
    vars = {k:v for k,v in os.environ.items() if k not in hidden} | dict(HOME=str(clone/'home'), USERPROFILE=str(clone/'home'), PYTHONUTF8='1')
    vars = {k:v for k,v in (vars | env).items() if v is not None}
    return subprocess.run(words, cwd=clone, env=vars, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8', timeout=timeout)

def ok(run):
    "The process, if it went well"
    assert run.returncode == 0, run.stdout + run.stderr
    return run

@pytest.fixture(scope='module')
def demo(clone):
    "The guide's demo file"
    start = time.perf_counter()
    ok(shell(clone, CREATE))
    assert time.perf_counter()-start < 5
    return clone/'data'/'demo_grpo_dataset.jsonl'

@pytest.fixture(scope='module')
def trained(clone, demo):
    "The guide's first training, W&B on as it is there, and no key"
    return ok(shell(clone, TRAIN, '--model', 'builtin:micro', '--config', QUICK, '--config', QUICK_STEP, WANDB_PROJECT='tradingagents-grpo'))

def test_demo_data(demo):
    rows = [json.loads(o) for o in demo.read_text(encoding='utf-8').splitlines()]
    assert len(rows) == 100 and all(set(o) == {'query', 'context', 'reference'} and o['query'] and o['reference'] for o in rows)
    assert len({o['query'] for o in rows}) >= 40 and len({o['reference'] for o in rows}) >= 40

def test_training_leaves_what_the_guide_says(clone, trained):
    output = clone/'models'/'grpo_financial_model'
    config,stats = (json.loads((output/o).read_text(encoding='utf-8')) for o in ('training_config.json', 'training_stats.json'))
    assert config['use_wandb'] and config['ppo_epochs'] == 4 and config['max_steps'] == 2
    assert stats['steps'] == 2 and stats['exit_code'] == 0
    assert (output/'best_model'/'tokenizer.json').is_file() and (output/'best_model'/'model.safetensors').is_file()
    assert len(RunFolder.open(output).metrics()) == 2
    assert {'metrics.jsonl', 'samples.jsonl', 'events.jsonl', 'checkpoints'} <= {o.name for o in output.iterdir()}

def test_training_says_what_it_used_and_from_where(trained):
    out = trained.stdout
    for line in ('model_name', 'max_steps', 'batch_size'): assert line in out
    assert '--model' in out and out.count('inline JSON') == 6 and '90 to train on, 10 held back' in out

def test_wandb_without_a_key_goes_on_offline(trained):
    told = [o for o in (trained.stdout+trained.stderr).splitlines() if 'W&B' in o]
    assert len(told) == 1 and 'offline' in told[0]

def test_log_file_is_in_the_output_folder(clone, trained):
    if Path('/app/logs/training').is_dir(): pytest.skip("the guide's own log folder exists here")
    assert (trained.stdout+trained.stderr).count('grpo_trainer.log') == 1
    assert (clone/'models'/'grpo_financial_model'/'grpo_trainer.log').is_file()

def test_training_again_offers_to_resume(clone, trained):
    run = shell(clone, TRAIN, '--model', 'builtin:micro')
    assert run.returncode == 3 and 'resume' in run.stderr and 'Traceback' not in run.stderr

def test_inference_snippet(clone, trained):
    (clone/'inference.py').write_text(INFERENCE, encoding='utf-8')
    assert ok(shell(clone, 'python inference.py')).stdout.strip()

def test_custom_reward_snippet():
    check = '''
import sys
good = reward_model.score("分析台積電的投資價值", "建議分批買進台積電，因為獲利穩定；但仍有市場風險，請分散投資。")
bad = reward_model.score("分析台積電的投資價值", "保證獲利，穩賺不賠，全部買進！")
assert -1 <= bad.total < good.total <= 1 and bad.promises, (bad.total, good.total)
assert "torch" not in sys.modules and reward_model.config.accuracy_weight == .5
'''
    ok(subprocess.run([sys.executable, '-c', CUSTOM_REWARD + check], cwd=top, capture_output=True, text=True, encoding='utf-8', timeout=60))

def test_config_file_two_rows_and_fragments(clone):
    fragments = '{"gradient_checkpointing": true}', '{"ppo_epochs": 2}', REWARD, '{"num_generations": 2, "max_length": 64}'
    run = ok(shell(clone, TRAIN_CONFIG, '--model', 'builtin:micro', *[o for f in fragments for o in ('--config', f)]))
    assert 'grpo_config.json' in run.stdout and 'inline JSON' in run.stdout
    config = RunFolder.open(clone/'models'/'your_model').config()
    given = json.loads(RTX4070) | dict(model_name='builtin:micro', ppo_epochs=2, max_length=64)
    assert {k:config[k] for k in given} == given
    assert {k:config['reward'][k] for k in json.loads(REWARD)} == json.loads(REWARD)
    assert RunFolder.open(clone/'models'/'your_model').stats()['train_rows'] == 2

@pytest.mark.parametrize('fragment', ['{"batch_size": 2, "mini_batch_size": 1}', '{"gradient_checkpointing": true}', '{"gradient_accumulation_steps": 16}', '{"ppo_epochs": 2}'])
def test_each_fragment_is_taken(fragment, demo, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(cli, 'plan_text', lambda c,rows: made.append(c) or '')
    assert cli.guide_main(['--dataset', str(demo), '--output', 'unused', '--model', 'builtin:micro', '--dry-run', '--config', fragment]) == 0
    assert {k:getattr(made[0], k) for k in json.loads(fragment)} == json.loads(fragment)
    assert capsys.readouterr().out.count('inline JSON') == len(json.loads(fragment))

def test_the_default_model_without_a_hub(clone, demo):
    start = time.perf_counter()
    run = shell(clone, 'python gpu_training/grpo_trainer.py --dataset ./data/demo_grpo_dataset.jsonl --output ./models/default',
        HF_HUB_OFFLINE=None, HF_ENDPOINT='http://192.0.2.1', HF_HOME=str(clone/'home'/'hf'))
    assert run.returncode == 2 and time.perf_counter()-start < 5
    for word in ('microsoft/DialoGPT-medium', 'builtin:tiny', '.gguf', 'no Chinese', '12 GB'): assert word in run.stderr
    assert not (clone/'models'/'default').exists()

def test_create_demo_never_trains(clone, tmp_path):
    run = ok(shell(clone, CREATE.replace('./data', tmp_path.as_posix()), '--output', str(tmp_path/'run')))
    assert 'only writes the data file' in run.stderr and not (tmp_path/'run').exists()

# The rest trains in this process, where torch is imported once

def train_here(folder, text, *words, name='rows.jsonl'):
    "Train on a file with this text, and return its run"
    folder.mkdir(exist_ok=True)
    (folder/name).write_text(text, encoding='utf-8')
    small = ['--config', QUICK, '--config', QUICK_STEP, '--set', 'use_wandb=false', '--set', 'ppo_epochs=1']
    assert cli.guide_main(['--dataset', str(folder/name), '--output', str(folder/'run'), '--model', 'builtin:micro', *small, *words]) == 0
    return RunFolder.open(folder/'run')

@pytest.fixture(scope='module')
def yaml_file(tmp_path_factory):
    "A configuration in YAML"
    path = tmp_path_factory.mktemp('yaml')/'c.yaml'
    path.write_text('learning_rate: 1e-4\nuse_fp16: off\nreward:\n  accuracy_weight: 0.5\n', encoding='utf-8')
    return path

@pytest.fixture(scope='module')
def two_rows(tmp_path_factory, yaml_file):
    "A run on the guide's two rows of the GRPO format"
    return train_here(tmp_path_factory.mktemp('two'), GRPO_ROWS, '--config', str(yaml_file))

def test_two_rows_of_the_grpo_format(two_rows):
    stats = two_rows.stats()
    assert stats['train_rows'] == 2 and not stats['heldout_rows'] and stats['steps'] == 2 and (two_rows.path/'best_model').is_dir()

def test_yaml_configuration(two_rows):
    config = two_rows.config()
    assert (config['learning_rate'], config['use_fp16'], config['reward']['accuracy_weight']) == (1e-4, False, .5)

def test_both_formats_in_one_file_and_ppo(tmp_path):
    run = train_here(tmp_path, GRPO_ROWS+INSTRUCTION_ROWS, '--algorithm', 'ppo', '--set', 'num_generations=1')
    assert run.stats()['algorithm'] == 'ppo' and {o['query'] for o in run.samples()} <= {'分析台積電的投資價值', '如何評估鴻海的財務狀況', '評估風險\n鴻海科技'}
    assert all({'value_loss', 'explained_variance'} <= set(o) for o in run.metrics())

def test_a_json_array_with_history(tmp_path):
    rows = [json.loads(o) | dict(history=[]) for o in INSTRUCTION_ROWS.splitlines()]
    rows[1]['history'] = [['什麼是晶圓代工？', '替別的公司製造晶片。']]
    run = train_here(tmp_path, json.dumps(rows, ensure_ascii=False, indent=2), name='rows.json')
    assert run.stats()['train_rows'] == 2
    assert [o.query for o in load_dataset(tmp_path/'rows.json')] == ['分析台積電的投資價值', '評估風險\n鴻海科技']

def numbers(run): return [{k:v for k,v in o.items() if not k.startswith(('time/', 'system/'))} for o in run.metrics()]

def test_a_run_killed_before_its_first_step_is_resumed(tmp_path, two_rows, yaml_file, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setattr(cli, 'start', lambda run,rows: 0)
        killed = train_here(tmp_path, GRPO_ROWS, '--config', str(yaml_file))
    assert cli.main(['status', str(killed.path)]) == 0 and 'step 0' in capsys.readouterr().out
    assert cli.main(['resume', str(killed.path)]) == 0
    assert numbers(killed) == numbers(two_rows)
    assert cli.main(['resume', str(killed.path)]) == 0 and 'nothing to do' in capsys.readouterr().out

def test_evaluating_a_run_and_a_model(two_rows, capsys):
    capsys.readouterr()
    assert cli.main(['eval', str(two_rows.path)]) == 2 and 'held no questions back' in capsys.readouterr().err
    for model in (str(two_rows.path), 'builtin:micro'):
        assert cli.main(['eval', model, '--dataset', str(two_rows.path.parent/'rows.jsonl'), '--set', 'max_length=64', '--json']) == 0
        found = json.loads(capsys.readouterr().out)
        assert found['rows'] == 2 and set(found['summary']) == set(found['intervals']) and -1 <= found['summary']['reward'] <= 1
