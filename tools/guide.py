"What the Chinese guide's notebook runs behind its pages: a folder of its own, the guide's commands, and its tables."
import io, json, os, runpy, shlex, sys, tempfile, time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from IPython.display import Markdown
from finrl_grpo import cli
from finrl_grpo.config import load_config
from finrl_grpo.memory import estimate
from finrl_grpo.reward import FinancialRewardModel
from finrl_grpo.text import asset

top = Path(__file__).parent.parent
QUICK_SETTINGS = dict(max_steps=2, num_generations=2, max_length=64, eval_samples=2, batch_size=2, gradient_accumulation_steps=1)
QUICK = f"--model builtin:micro --config '{json.dumps(QUICK_SETTINGS)}'"
TINY = QUICK + ' --set use_wandb=false --set ppo_epochs=1'

CONFIG = '''{
  "model_name": "microsoft/DialoGPT-medium",
  "max_length": 512,
  "learning_rate": 1.4e-5,
  "batch_size": 4,
  "mini_batch_size": 2,
  "gradient_accumulation_steps": 8,
  "ppo_epochs": 4,
  "num_train_epochs": 3,
  "use_fp16": true,
  "gradient_checkpointing": true,
  "use_wandb": true
}
'''
GRPO_ROWS = '''{"query": "分析台積電的投資價值", "context": "台股投資分析", "reference": "參考回答"}
{"query": "如何評估鴻海的財務狀況", "context": "財務分析", "reference": "參考回答"}
'''
INSTRUCTION_ROWS = '''{"instruction": "分析台積電的投資價值", "input": "", "output": "台積電是全球領先的晶圓代工廠..."}
{"instruction": "評估風險", "input": "鴻海科技", "output": "需要考慮以下風險因素..."}
'''

def start(): # A function that goes back and removes the folder
    "Enter a new folder that holds the guide's two files"
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ['WANDB_MODE'] = 'offline'
    home,folder = os.getcwd(),tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.chdir(folder.name)
    for name,text in {'configs/grpo_config.json':CONFIG, 'data/your_dataset.jsonl':GRPO_ROWS + INSTRUCTION_ROWS}.items():
        Path(name).parent.mkdir()
        Path(name).write_text(text, encoding='utf-8')
    def finish():
        os.chdir(home)
        folder.cleanup()
    return finish

def execute(
    words:list, # A command, split as a shell would
): # Exit code, or None
    "Run one command in this process"
    if words[0] == 'finrl-grpo': return cli.main(words[1:])
    before,sys.argv = sys.argv,words[1:]
    try: runpy.run_path(str(top/words[1]), run_name='__main__')
    except SystemExit as e: return e.code
    finally: sys.argv = before

def block(
    text:str, # What goes between the fences
    language:str='json', # For highlighting
)->Markdown:
    "A code block"
    return Markdown(f'```{language}\n{text.strip()}\n```')

def run(
    command:str, # As the guide has it
    more:str='', # Added words, not shown
    code:int=0, # Exit code that must come back
    last:int=None, # Lines of the output to show; unset = all
)->Markdown: # The command and what it printed
    "Run a command of the guide and show both sides"
    said = io.StringIO()
    words = shlex.split(command.replace('\\\n', ' ')) + shlex.split(more)
    with redirect_stdout(said), redirect_stderr(said): ended = execute(words) or 0
    text = said.getvalue().replace('\r', '\n')
    for path in (os.path.realpath('.'), os.getcwd()): text = text.replace(path, '.')
    assert ended == code, text
    lines = text.strip().replace('\\', '/').splitlines()
    shown = '\n'.join(lines[-last:] if last else lines)
    return Markdown(f'```bash\n{command.strip()}\n```' + (f'\n\n```text\n{shown}\n```' if shown else ''))

def memory_sentence()->Markdown:
    "What halving both batches does to the peak"
    smaller = dict(batch_size=2, mini_batch_size=1, gradient_accumulation_steps=16)
    before,after = (estimate(load_config(preset='rtx4070', **o)).peak_bytes/2**30 for o in ({}, smaller))
    assert after < before
    return Markdown(f'用預設的 DialoGPT-medium 來算，整體峰值從 {before:.2f} GiB 降到 {after:.2f} GiB（預估）。')

def least_seconds(
    *sources, # As for `load_config`
    preset:str='rtx4070', # Settings to start from
)->float: # Seconds a step
    "The floor of a step on the guide's card"
    return sum(estimate(load_config(*sources, preset=preset)).seconds.values())

def time_table()->Markdown:
    "What four settings do to the time of a step"
    changes = {'{"gradient_accumulation_steps": 16}':'題數加倍，時間也加倍', '{"ppo_epochs": 2}':'同一批回答少用兩遍',
        '{"num_generations": 4}':'每題 4 個回答，組內比較粗一點', '{"max_length": 256}':'問題和回答都短一半'}
    assert least_seconds('{"ppo_epochs": 2}') < least_seconds() < least_seconds('{"gradient_accumulation_steps": 16}')
    rows = [f"| `--config '{k}'` | {least_seconds(k):.0f} 秒 | {why} |" for k,why in changes.items()]
    return Markdown('\n'.join(['| 設定 | 一步至少（預估） | 代價 |', '|---|---|---|', f'| 預設 | {least_seconds():.0f} 秒 | – |', *rows]))

def reward_speed(
    n:int=300, # Answers to score
)->float: # Answers a second of processor time
    "How fast one process scores"
    reward,answer = FinancialRewardModel(),asset('quickstart_run.json')['answers'][0]['after']
    reward.score('', answer)
    began = time.process_time()
    for _ in range(n): reward.score('分析台積電的投資價值', answer)
    return n/(time.process_time()-began)

def predicted_rows()->list: # Lines of a table
    "Memory and time on an RTX 4070, by arithmetic"
    guide,qlora = (load_config(preset=o) for o in ('rtx4070', 'rtx4070-qlora'))
    memory,hours = [estimate(o) for o in (guide, qlora)],least_seconds()*guide.total_steps(900)/3600
    assert all(o.fits for o in memory)
    return [f'| 記憶體，預設設定（DialoGPT-medium，全參數） | 約 8–10 GB | 峰值 {memory[0].peak_bytes/2**30:.1f} GiB | 預估 |',
        f'| 記憶體，`rtx4070-qlora`（Qwen2.5-1.5B，4-bit） | – | 峰值 {memory[1].peak_bytes/2**30:.1f} GiB | 預估 |',
        f'| 一步的時間，預設設定（32 題 × 8 個回答，用 4 遍） | 每秒約 2–3 步 | 至少 {least_seconds():.0f} 秒 | 預估 |',
        f'| 一步的時間，`rtx4070-qlora`（16 題 × 8 個回答，用 1 遍） | – | 至少 {least_seconds(preset="rtx4070-qlora"):.0f} 秒 | 預估 |',
        f'| 中等資料集（1,000 題，其中 900 題訓練 3 輪），預設設定 | 2–4 小時 | 至少 {hours:.1f} 小時 | 預估 |',
        '| RTX 4070 上的實際速度與記憶體 | – | – | 未測 |', '| 批次大小 4 是不是最佳平衡 | 是 | – | 未測 |']

def measured_rows()->list: # Lines of a table
    "The recorded quickstart, and the reward's speed now"
    q = asset('quickstart_run.json')
    machine = '兩個 CPU 核心' + '，同時有別的工作'*('shared' in q['machine']) + '，2026 年 11 月'
    before,after = q['before'],q['after']
    return [f"| 快速上手：{q['settings']['max_steps']} 步，含建立模型和前後評估 | – | {q['seconds']} 秒（{machine}） | 實測 |",
        f"| 快速上手：沒訓練過的題目，獎勵平均 | – | {before['reward']:+.2f} → {after['reward']:+.2f}（{q['heldout_rows']} 題中問 32 題，每題 4 個回答） | 實測 |",
        f"| 快速上手：承諾獲利的回答 | – | {before['promises']:.0%} → {after['promises']:.0%} | 實測 |",
        f'| 獎勵模型評分速度 | – | 每秒約 {reward_speed():,.0f} 個回答（一個 CPU 核心，寫這一頁時） | 實測 |']

def performance_table()->Markdown:
    "Every figure of the original guide: measured, predicted or not measured"
    return Markdown('\n'.join(['| 項目 | 原版 | 現在 | 來源 |', '|---|---|---|---|', *predicted_rows(), *measured_rows()]))
