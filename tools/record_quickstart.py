"""Keep what one run of the quickstart showed, for the pages that would take minutes to run it themselves.

    finrl-grpo quickstart --output quickstart_run > quickstart.log
    python tools/record_quickstart.py quickstart_run quickstart.log "2 CPU cores, November 2026"

Writes finrl_grpo/assets/quickstart_run.json: settings, one row a step, both measurements and three answered questions.
"""
import json,re,sys
from pathlib import Path
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import TrainConfig

TARGET = Path(__file__).parent.parent/'finrl_grpo'/'assets'/'quickstart_run.json'
KEPT = 'step', 'reward_mean', 'reward_std', 'promises', 'kl', 'completion_length', 'eval/reward'
SETTINGS = 'model_name', 'algorithm', 'batch_size', 'learning_rate', 'beta', 'temperature', 'max_steps', 'prompts_per_step', 'generations'

def answers_in(
    printed:str, # What the quickstart printed
)->list[dict]: # query, before, after, and the two scores
    "The questions that were answered twice"
    pattern = r'問：(.+)\n  前（([-+.\d]+)）：(.*)\n  後（([-+.\d]+)）：(.*)'
    rows = [o.groups() for o in re.finditer(pattern, printed)]
    return [dict(query=q, before=a, before_reward=float(x), after=b, after_reward=float(y)) for q,x,a,y,b in rows]

def rounded(
    row:dict, # Numbers by name
)->dict: # The same with four digits behind the point
    "Short numbers, for a short file"
    return {k:round(v, 4) if isinstance(v, float) else v for k,v in row.items()}

def record(
    run:RunFolder, # Of a finished quickstart
    printed:str, # What it printed
    machine:str, # On what, and when
)->dict: # Ready for JSON
    "Everything that the pages show"
    stats, config = run.stats(), TrainConfig.from_dict(run.config())
    if stats.get('state') != 'finished' or 'quickstart' not in stats: raise SystemExit(f'{run.path} is no finished quickstart')
    steps = [rounded({k:row[k] for k in KEPT if k in row}) for row in run.metrics()]
    measured = {k:rounded(v) for k,v in stats['quickstart'].items()}
    seconds = int(re.search(r'^(\d+) s\. Written to', printed, flags=re.M)[1])
    table = '\n'.join(o for o in printed.splitlines() if o.startswith('|'))
    return dict(machine=machine, seconds=seconds, reward_version=stats['reward_version'], parameters=stats['parameters'],
        train_rows=stats['train_rows'], heldout_rows=stats['heldout_rows'], settings={k:getattr(config, k) for k in SETTINGS} | dict(answers=config.prompts_per_step*config.generations),
        **measured, table=table, answers=answers_in(printed), steps=steps)

if __name__ == '__main__':
    if len(sys.argv) != 4: sys.exit(__doc__)
    found = record(RunFolder.open(sys.argv[1]), Path(sys.argv[2]).read_text(encoding='utf-8'), sys.argv[3])
    lines = json.dumps({k:v for k,v in found.items() if k != 'steps'}, ensure_ascii=False, indent=1)[:-2]
    rows = ',\n  '.join(json.dumps(o) for o in found['steps'])
    TARGET.write_text(f'{lines},\n "steps": [\n  {rows}\n ]\n}}\n', encoding='utf-8')
    print(f'{len(found["steps"])} steps and {len(found["answers"])} answers in {TARGET}')
