"""Folders for other engines: the rows, the settings and the reward, read back by the engines' own code where they are installed

The engines are not among this package's dependencies. Without them the published signatures are tested; the tests marked slow use
verl 0.9.1, OpenRLHF 0.11.2 and lm-eval 0.4.13 on a machine without a card.
"""
import argparse, ast, asyncio, importlib.util, json, shlex, shutil, subprocess
from pathlib import Path
import pytest, yaml
from finrl_grpo.cli import main
from finrl_grpo.config import ConfigError, DataError, load_config
from finrl_grpo.data import load_dataset, prompt_text, split_examples, write_demo
from finrl_grpo.export import EXPORTS, SCORES, answer_scores, command_line, export_command, openrlhf_flags, size_for
from finrl_grpo.reward import FinancialRewardModel

ANSWER = '目前本益比約25倍，高於五年平均。主要風險是匯率波動。因為評價偏高，建議分三批進場，跌破季線就停損。'
WEIGHTS = ['accuracy_weight=0.7', 'lexicon=none']

@pytest.fixture(scope='module')
def data(tmp_path_factory): return write_demo(tmp_path_factory.mktemp('data')/'demo.jsonl', 60)

@pytest.fixture(scope='module')
def folders(data, tmp_path_factory):
    "All three exports, with weights that are not the default"
    root = tmp_path_factory.mktemp('exports')
    for target in EXPORTS: export_command(target, str(root/target), dataset=str(data), set_=WEIGHTS)
    return root

@pytest.fixture(scope='module')
def split(data): return split_examples(load_dataset(data), .1, 0)

def expected(e, answer):
    "The score by our own model, with the weights of the export"
    return FinancialRewardModel(load_config(sets=WEIGHTS).reward).score(e.query, answer, e.reference or None, e.context or None).total

def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found

def test_verl_rows_and_reward(folders, split):
    "The published signature: keywords, one sample a call, a dict with `score`"
    import pyarrow.parquet as pq
    rows = pq.read_table(folders/'verl'/'train.parquet').to_pylist()
    assert [o['extra_info']['question'] for o in rows] == [e.query for e in split[0]] and rows[0]['prompt'] == [dict(content=prompt_text(split[0][0]), role='user')]
    o,e = rows[0],split[0][0]
    score = module(folders/'verl'/'reward.py').compute_score(data_source=o['data_source'], solution_str=ANSWER, ground_truth=o['reward_model']['ground_truth'], extra_info=o['extra_info'])
    assert score['score'] == pytest.approx(expected(e, ANSWER)) != FinancialRewardModel().score(e.query, ANSWER, e.reference, e.context or None).total

def test_openrlhf_rows_and_reward(folders, split):
    "The published signature: three lists, by place"
    rows = [json.loads(o) for o in (folders/'openrlhf'/'heldout.jsonl').read_text(encoding='utf-8').splitlines()]
    prompt = f"<|im_start|>user\n{rows[0]['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    out = module(folders/'openrlhf'/'reward.py').reward_func([prompt + ANSWER + '<|im_end|>'], [prompt], [rows[0]['label']])
    assert len(rows) == len(split[1]) and out['rewards'].item() == pytest.approx(expected(split[1][0], ANSWER), abs=1e-6)

def test_lm_eval_task(folders, split):
    "The published YAML keys, and the numbers of our own evaluation"
    text = (folders/'lm-eval'/'finrl_grpo.yaml').read_text(encoding='utf-8')
    task = yaml.safe_load(text.replace('!function ', ''))
    assert task['output_type'] == 'generate_until' and [o['metric'] for o in task['metric_list']] == list(SCORES)
    rows = [json.loads(o) for o in (folders/'lm-eval'/'heldout.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [o['query'] for o in rows] == [e.query for e in split[1]]
    assert answer_scores(rows[0], ANSWER, '{"accuracy_weight": 0.7}')['reward'] == pytest.approx(expected(split[1][0], ANSWER))

@pytest.mark.parametrize('target', ['verl', 'openrlhf'])
@pytest.mark.skipif(shutil.which('bash') is None, reason='no bash')
def test_scripts_are_shell(folders, target):
    for o in (folders/target).glob('*.sh'): subprocess.run(['bash', '-n', str(o)], check=True)

@pytest.mark.parametrize('cards', [1, 8])
@pytest.mark.parametrize('sets', [[], ['num_mini_batches=4'], ['batch_size=3', 'gradient_accumulation_steps=1'], ['batch_size=64']])
def test_sizes_divide(cards, sets):
    c = load_config(sets=sets)
    s = size_for(cards, c, 90)
    assert s.prompts <= 90 and s.prompts%cards == 0 and (s.prompts//s.updates)%cards == 0 and s.tokens >= c.window
    assert (s.prompts*c.generations)%s.updates == 0

def test_bad_input(tmp_path, data, capsys):
    with pytest.raises(ConfigError, match='algorithm: ppo'): export_command('verl', str(tmp_path/'a'), dataset=str(data), set_=['algorithm=ppo'])
    with pytest.raises(DataError, match='no rows are held back'): export_command('lm-eval', str(tmp_path/'a'), dataset=str(data), set_=['eval_fraction=0'])
    assert main(['export', 'vrl', str(tmp_path/'a'), '--dataset', str(data)]) == 2 and 'vrl' in capsys.readouterr().err
    assert not (tmp_path/'a').exists()
    assert main(['export', 'verl', str(data.parent), '--dataset', str(data)]) == 3 and 'never overwrites' in capsys.readouterr().err
    assert main(['export', 'lm-eval', str(tmp_path/'b'), '--dataset', str(data)]) == 0 and (tmp_path/'b'/'utils.py').is_file()

# Through the engines' own code

class Letters:
    "A tokenizer of characters"
    chat_template = None
    def __call__(self, text, **kwargs):
        import torch
        return dict(input_ids=torch.tensor([list(map(ord, text))]))
    def decode(self, ids, skip_special_tokens=False): return ''.join(map(chr, map(int, ids)))
    def apply_chat_template(self, chat, tokenize=True, **kwargs):
        text = f'<|im_start|>user\n{chat[-1]["content"]}<|im_end|>\n<|im_start|>assistant\n'
        return list(map(ord, text)) if tokenize else text

def paths(d, front=''):
    "Every key of a nested dict, dotted"
    for k,v in d.items():
        if isinstance(v, dict): yield from paths(v, f'{front}{k}.')
        else: yield front + k

@pytest.mark.slow
@pytest.mark.parametrize('cards', [1, 8])
def test_verl_composes_loads_and_scores(folders, split, cards, monkeypatch):
    "verl's own configuration, data set, reward loader and reward manager"
    verl = pytest.importorskip('verl')
    import numpy as np, torch
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.utils.dataset.rl_dataset import RLHFDataset
    monkeypatch.chdir(folders/'verl')
    with initialize_config_dir(str(folders/'verl'), version_base=None): cfg = compose(f'gpus{cards}')
    ours = yaml.safe_load((folders/'verl'/f'gpus{cards}.yaml').read_text(encoding='utf-8'))
    with initialize_config_dir(str(Path(verl.__file__).parent/'trainer'/'config'), version_base=None): base = compose('ppo_trainer')
    known = lambda key: key.rpartition('.')[2] in OmegaConf.select(base, key.rpartition('.')[0]).keys()
    strangers = [k for k in paths({k:v for k,v in ours.items() if k not in ('hydra', 'defaults')}) if not known(k)]
    assert strangers == [] and cfg.trainer.n_gpus_per_node == cards and cfg.actor_rollout_ref.actor.loss_agg_mode == 'seq-mean-token-mean'
    rows = RLHFDataset('train.parquet', Letters(), cfg.data)
    assert len(rows) == len(split[0])
    o = rows[0]
    manager = load_reward_manager(cfg, Letters())
    ids = torch.tensor([list(map(ord, ANSWER))])
    batch = DataProto.from_dict(tensors=dict(responses=ids, prompts=ids[:,:1], attention_mask=torch.ones(1, ids.shape[1]+1, dtype=torch.long)),
        non_tensors={k:np.array([o[k]], dtype=object) for k in ('data_source', 'reward_model', 'extra_info')})
    async def score():
        manager.loop = asyncio.get_running_loop()
        return await manager.run_single(batch)
    assert asyncio.run(score())['reward_score'] == pytest.approx(expected(split[0][0], ANSWER))

@pytest.mark.slow
def test_openrlhf_loads_and_scores(folders, split):
    "OpenRLHF's own data set and its executor, with an engine that always gives the same answer"
    pytest.importorskip('openrlhf')
    from types import SimpleNamespace as NS
    from openrlhf.datasets.prompts_dataset import PromptDataset
    from openrlhf.datasets.utils import blending_datasets
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    strategy = NS(args=NS(data=NS(input_key='messages', label_key='label', apply_chat_template=True)), print=print, is_rank_0=lambda: False)
    rows = PromptDataset(blending_datasets(str(folders/'openrlhf'/'train.jsonl'), strategy=strategy), Letters(), strategy)
    _,prompt,label,_ = rows[0]
    class Engine:
        async def generate(self, ids, params, multi_modal_data=None):
            return NS(outputs=[NS(token_ids=list(map(ord, ANSWER + '<|im_end|>')), finish_reason='stop', logprobs=None)])
    run = SingleTurnAgentExecutor(str(folders/'openrlhf'/'reward.py')).execute(prompt, label, NS(max_tokens=200, logprobs=None), 4096, Letters(), Engine())
    out = asyncio.run(run)
    assert out['reward'].item() == pytest.approx(expected(split[0][0], ANSWER), abs=1e-6) and 0 <= out['scores'].item() <= 1

@pytest.mark.slow
@pytest.mark.parametrize('cards', [1, 8])
@pytest.mark.parametrize('sets', [[], ['loss_type=gspo', 'beta=0'], ['scale_rewards=none', 'loss_type=dapo', 'lora_rank=8']])
def test_openrlhf_parses_our_flags(cards, sets):
    "The parser out of OpenRLHF's own script, which cannot be imported without a card"
    spec = importlib.util.find_spec('openrlhf')
    if spec is None: pytest.skip('openrlhf is not installed')
    source = ast.parse((Path(spec.submodule_search_locations[0])/'cli'/'train_ppo_ray.py').read_text(encoding='utf-8'))
    body = next(o for o in source.body if isinstance(o, ast.If)).body
    end = next(i for i,o in enumerate(body) if isinstance(o, ast.Assign) and 'parse_args' in ast.unparse(o))
    scope = dict(argparse=argparse, datetime=__import__('datetime').datetime)
    exec(compile(ast.Module(body[:end], []), 'train_ppo_ray', 'exec'), scope)
    c = load_config(sets=sets)
    flags = openrlhf_flags(c, size_for(cards, c, 90))
    args = vars(scope['parser'].parse_args(shlex.split(command_line(flags).replace('\\\n', ' '))))
    assert all(args[k] == (list(v) if isinstance(v, tuple) else v) for k,v in flags.items() if v is not False)

@pytest.mark.slow
def test_lm_eval_scores_a_model(folders, split):
    "lm-eval's own evaluator with the micro model"
    lm_eval = pytest.importorskip('lm_eval')
    from lm_eval.tasks import TaskManager
    from finrl_grpo.builtin import model_folder
    out = lm_eval.simple_evaluate(model='hf', model_args=f'pretrained={model_folder("builtin:micro")},max_length=1200', tasks=['finrl_grpo'], limit=2, gen_kwargs='max_gen_toks=8',
        task_manager=TaskManager(include_path=str(folders/'lm-eval'), include_defaults=False), device='cpu', bootstrap_iters=0)
    found = out['results']['finrl_grpo']
    assert -1 <= found['reward,none'] <= 1 and all(f'{k},none' in found for k in SCORES)
    sample = out['samples']['finrl_grpo'][0]
    assert sample['doc']['query'] == split[1][0].query and sample['reward'] == pytest.approx(expected(split[1][0], sample['resps'][0][0]))
