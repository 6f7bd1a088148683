"A warm start, updates over model families and optimizers, and proof that the loop learns"
import json, math
import pytest, torch
from finrl_grpo import losses, trainer
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import DataError, TrainConfig, UserError
from finrl_grpo.data import Example, demo_examples
from finrl_grpo.models import load_policy
from finrl_grpo.run import StopFlag, build_trainer, run_training
from finrl_grpo.trainer import Trainer, lr_factor
from finrl_grpo.warm_start import Fluency, advice, advise, fluency, warm_base, warm_start

MICRO = dict(model_name='builtin:micro', use_fp16=False, use_wandb=False, gradient_checkpointing=False, batch_size=2, gradient_accumulation_steps=1,
    max_prompt_length=32, max_new_tokens=12, num_generations=4, ppo_epochs=1, warmup_ratio=0., lr_scheduler='constant')
REFERENCES = [e for e in demo_examples() if e.reference][:8]

def config(**changes): return TrainConfig(**{**MICRO, **changes})

# ---- warm start

@pytest.mark.parametrize('lora', [0, 4])
def test_warm_start_is_the_base_and_the_reference_of_the_run(tmp_path, lora):
    "The policy starts at the warm model, and so does the KL: an adapter's references would otherwise be the cold base"
    c = config(warm_start_epochs=1., lora_rank=lora, beta=.1, max_steps=2, max_new_tokens=48)
    run = RunFolder.create(tmp_path/'run', c.to_dict(), 'hash')
    warm = build_trainer(c, REFERENCES, run=run)
    cold = fluency(load_policy(c), REFERENCES, c).loss
    assert fluency(warm.policy, REFERENCES, c).loss < cold
    groups = warm.rollout(warm.examples_of(0))
    assert warm.update(groups, warm.score(groups))['kl'] < 1e-6

def test_a_run_with_a_warm_start_resumes_to_the_same_bits(tmp_path):
    class AfterOne(StopFlag):
        def wants_stop(self, save=None): return 'stop' if len(cut.metrics())==1 else None

    c = config(warm_start_epochs=1., max_steps=3, save_steps=1, lora_rank=4, learning_rate=1e-2, eval_fraction=0.)
    whole,cut = (RunFolder.create(tmp_path/o, c.to_dict(), 'hash') for o in ('whole', 'cut'))
    assert run_training(whole, REFERENCES, progress=False) == 0
    with cut.session():
        t = build_trainer(c, REFERENCES, run=cut)
        t.train(cut, stop=AfterOne())
        t.save(cut)
    made = (cut.path/'warm_start'/'model.safetensors').stat().st_mtime_ns
    assert run_training(cut, REFERENCES, progress=False) == 0
    assert (cut.path/'warm_start'/'model.safetensors').stat().st_mtime_ns == made
    plain = lambda run: [{k:v for k,v in r.items() if not k.startswith(('time/', 'system/'))} for r in run.metrics()]
    assert plain(whole) == plain(cut)
    files = [(o.path/'best_model'/'model.safetensors').read_bytes() for o in (whole, cut)]
    assert files[0] == files[1]

def test_the_same_warm_start_twice_gives_the_same_bits():
    c = config(warm_start_epochs=1., beta=0.)
    a,b = load_policy(c),load_policy(c)
    for p in (a, b): warm_start(p, REFERENCES, c, learning_rate=1e-2)
    assert all(torch.equal(x, y) for x,y in zip(a.state_tensors().values(), b.state_tensors().values()))

def test_a_warm_start_needs_references_and_a_folder():
    c = config(warm_start_epochs=1.)
    with pytest.raises(DataError, match='no row has a reference'): warm_start(load_policy(c), [Example('甲？')], c)
    with pytest.raises(UserError, match='without a run folder'): build_trainer(c, REFERENCES)

def test_advice_names_the_model_and_only_where_it_helps(capsys, monkeypatch):
    assert 'warm_start_epochs' in advice(Fluency(2.9, 12.), 'gpt2') and 'gpt2' in advice(Fluency(2.9, 12.), 'gpt2')
    assert advice(Fluency(.7, 3.), 'qwen') == ''
    c = config(max_new_tokens=48)
    t = Trainer(c, load_policy(c), None, REFERENCES)
    advise(t)
    assert capsys.readouterr().err == ''
    t.cfg.model_name = 'some/model'
    advise(t)
    assert 'some/model reads these references' in capsys.readouterr().err
    t.cfg.warm_start_epochs = 1.
    advise(t)
    assert capsys.readouterr().err == ''
