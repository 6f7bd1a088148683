"""Memory runs out: smaller pieces, the same answers and the same effective batch; exit 5 with numbers when no piece is small enough.

The injector raises what torch would raise, in the forward of the model, whenever it is given more rows than the imaginary card holds.
"""
import pytest, torch
from finrl_grpo import run as run_module
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import OutOfMemoryError, TrainConfig
from finrl_grpo.data import demo_examples
from finrl_grpo.recover import Ladder, is_out_of_memory, next_rung
from finrl_grpo.run import run_training

ROWS = demo_examples()[:20]
SMALL = dict(model_name='builtin:micro', batch_size=4, mini_batch_size=4, gradient_accumulation_steps=1, num_generations=2, max_prompt_length=16, max_new_tokens=6,
    max_steps=3, learning_rate=3e-3, use_fp16=False, use_wandb=False, gradient_checkpointing=False, save_steps=2, eval_steps=9, eval_fraction=0., packed=False)

def start(folder, **changes): return RunFolder.create(folder, TrainConfig(**{**SMALL, **changes}).to_dict(), 'hash')

@pytest.fixture
def card(monkeypatch):
    "A function that gives every model made from now on a card that holds so many rows"
    build = run_module.build_trainer
    def limited(rows=None, error=torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), calls=None, grad_rows=None):
        count = iter(range(10**9))
        def check(module, args, kwargs):
            n,which = len(kwargs['input_ids']),next(count)
            if (rows and n > rows) or (grad_rows and torch.is_grad_enabled() and n > grad_rows) or (calls is not None and which in calls): raise error
        def with_hook(*args):
            trainer = build(*args)
            trainer.policy.backbone().register_forward_pre_hook(check, with_kwargs=True)
            return trainer
        monkeypatch.setattr(run_module, 'build_trainer', with_hook)
    return limited

def same(a, b):
    rows = lambda run: [{k:v for k,v in r.items() if not k.startswith(('time/', 'system/'))} for r in run.metrics()]
    assert rows(a) == rows(b) and a.samples() == b.samples()
    x,y = a.load_checkpoint().tensors,b.load_checkpoint().tensors
    for stem in x: assert all(torch.equal(x[stem][k], y[stem][k]) for k in x[stem]), stem

@pytest.mark.parametrize('changes', [{}, dict(algorithm='ppo', num_generations=1, batch_size=8, mini_batch_size=8), dict(lora_rank=2, ppo_epochs=2)], ids=['grpo', 'ppo', 'lora'])
def test_the_same_bits_as_a_run_that_was_started_small(tmp_path, card, changes):
    "Four rows fit, eight do not: two prompts a piece of GRPO's two answers each, four of PPO's one"
    size = 2 if changes.get('algorithm') != 'ppo' else 4
    tight,small = start(tmp_path/'tight', **changes),start(tmp_path/'small', **{**changes, 'batch_size':size, 'gradient_accumulation_steps':2, 'mini_batch_size':size})
    assert run_training(small, ROWS, progress=False) == 0
    card(4)
    assert run_training(tight, ROWS, progress=False) == 0
    same(tight, small)
    told = tight.events('out_of_memory')
    assert [o['phase'] for o in told] == ['rollout', 'prepare'] and all(o['step']==1 and 'Tried to allocate' in o['error'] for o in told)
    assert tight.metrics()[-1]['system/mini_batch_size'] == size and tight.stats()['out_of_memory'] == 2
    assert tight.config()['batch_size'] == 2*size, 'what was asked for stays in the folder'

def test_only_backward_runs_out(tmp_path, card):
    "The update retries the same answers with a smaller micro-batch; the rollout keeps its chunk"
    tight,small = start(tmp_path/'tight'),start(tmp_path/'small', mini_batch_size=2)
    assert run_training(small, ROWS, progress=False) == 0
    card(grad_rows=4)
    assert run_training(tight, ROWS, progress=False) == 0
    assert [(o['phase'], o['after']) for o in tight.events('out_of_memory')] == [('update', dict(mini_batch_size=2))]
    assert [r['reward_mean'] for r in tight.metrics()][0] == small.metrics()[0]['reward_mean']
    x,y = (o.load_checkpoint().tensors['policy'] for o in (tight, small))
    assert all(torch.allclose(x[k], y[k], atol=1e-4) for k in x)

@pytest.mark.parametrize('error', [RuntimeError('CUDA error: out of memory'), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 bytes"), MemoryError(),
    RuntimeError('Error out of memory at line 380 in file /src/ops.cu'), OSError(12, 'Cannot allocate memory'), RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.')],
    ids=['cuda', 'cublas', 'cpu', 'python', 'bitsandbytes', 'system', 'windows'])
def test_every_wording_is_known(error): assert is_out_of_memory(error)

def test_other_errors_pass_through(tmp_path, card):
    card(error=RuntimeError('mat1 and mat2 shapes cannot be multiplied'), calls={3})
    run = start(tmp_path/'run')
    with pytest.raises(RuntimeError, match='shapes'): run_training(run, ROWS, progress=False)
    assert not run.events('out_of_memory') and run.status()['state'] == 'failed'

def test_a_rung_outlives_a_resume(tmp_path, card, monkeypatch):
    "Once, in step 1; a later process does not climb up again"
    run = start(tmp_path/'run', max_steps=2)
    with monkeypatch.context() as m:
        m.setattr('finrl_grpo.run.STOP_CODES', dict(stop=75))
        card(calls={1})
        train = run_module.Trainer.one_step
        m.setattr(run_module.Trainer, 'one_step', lambda self, stop, save: train(self, stop, save) if self.steps_done < 1 else setattr(stop, 'reason', 'stop'))
        assert run_training(run, ROWS, progress=False) == 75
    first = run.metrics()[-1]
    assert first['system/batch_size'] == 2 and len(run.events('out_of_memory')) == 1
    assert run_training(run, ROWS, progress=False) == 0
    assert run.metrics()[-1]['step'] == 2 and run.metrics()[-1]['system/batch_size'] == 2

def test_when_nothing_is_small_enough(tmp_path, card):
    "Exit code 5, numbers, a plan, and a checkpoint that is as it was"
    run = start(tmp_path/'run', max_steps=2)
    assert run_training(run, ROWS, progress=False) == 0
    before = run.load_checkpoint()
    run.write_json('training_config.json', run.config()|dict(max_steps=4))
    card(1)
    with pytest.raises(OutOfMemoryError) as e: run_training(run, ROWS, progress=False)
    text = str(e.value)
    assert e.value.exit_code == 5 and 'step 3 (rollout), with one prompt at a time' in text and 'GiB' in text and 'fix: ' in text
    assert run.status()['exit_code'] == 5 and run.status()['state'] == 'failed'
    after = run.load_checkpoint()
    assert after.step == before.step and all(torch.equal(v, after.tensors['policy'][k]) for k,v in before.tensors['policy'].items())

def test_the_budgets_plan_is_in_the_message(monkeypatch):
    "A model that is too large for the machine: the plan of memory.fit in words"
    from finrl_grpo.recover import nearest_plan
    from finrl_grpo.sizes import card
    monkeypatch.setattr('finrl_grpo.sizes.this_machine', lambda: card('rtx4070'))
    text = nearest_plan(TrainConfig(model_name='Qwen/Qwen2.5-1.5B-Instruct'))
    assert 'saves' in text and 'lora_rank' in text, text

def test_rungs_never_change_the_effective_batch():
    for c in (TrainConfig(), TrainConfig(batch_size=6, gradient_accumulation_steps=5, mini_batch_size=7), TrainConfig(batch_size=1, mini_batch_size=1, gradient_checkpointing=False)):
        from dataclasses import replace
        for phase in ('rollout', 'prepare', 'update', 'evaluate'):
            now,n = c,0
            while rung := next_rung(now, phase):
                now,n = replace(now, **rung),n+1
                assert now.prompts_per_step == c.prompts_per_step and now.generations == c.generations and n < 20

@pytest.mark.gpu
def test_the_reference_waits_in_main_memory():
    "On a card: its weights are off it but while it is asked, and its answers are the same"
    from finrl_grpo.models import load_policy
    from finrl_grpo.recover import take_rung
    from finrl_grpo.trainer import Trainer
    c = TrainConfig(**{**SMALL, 'beta':.1})
    t = Trainer(c, load_policy(c), lambda completions, **_: [0.]*len(completions), ROWS)
    groups = t.rollout(ROWS[:2])
    def reference():
        with t.policy.reference() as r: return t.tables(groups, r)[0]
    before = reference()
    take_rung(t, dict(reference_on_cpu=True))
    assert next(t.policy.frozen.parameters()).device.type == 'cpu'
    assert torch.equal(reference(), before) and next(t.policy.frozen.parameters()).device.type == 'cpu'
