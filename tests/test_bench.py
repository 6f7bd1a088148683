"The bench: equal work on both sides, and ratios that mean what they say"
import json
from dataclasses import replace
import pytest, torch
from finrl_grpo import bench
from finrl_grpo.bench import FORMATS, SCENARIOS, Job, Scenario, bench_model, bench_prompts, bench_reward, force_ends, run_ours

SMALL = Scenario('small', prompt=40, answer=12, lengths=(3, 5, 12, 7, 12, 1, 2, 9), prompts=2, hidden=192, layers=2)

def fake_run(job):
    "TRL takes 10 s in fp32, 8 in bf16, 9 in bf16 weights; we take 2"
    step = 2. if job.side=='ours' else dict(zip(FORMATS, (10., 8., 9.)))[job.precision]
    return dict(steps=[dict(step=step, rollout=step/2, update=step/2, cpu=step)], peak=(100 if job.side=='ours' else 300) // (2 if job.lean else 1) * 2**20)

def test_trl_gets_its_fastest_format_and_both_settings():
    jobs = []
    rows = bench.bench(SMALL, rounds=2, steps=1, run=lambda job: (jobs.append(job), fake_run(job))[1])
    assert [(r['scenario'], r['setting'], r['precision'], r['rows']) for r in rows] == [('small', 'fastest', 'bf16', 16), ('small', 'leanest', 'bf16', 8)]
    assert all(r['step_time_ratio'] == .25 and r['peak_memory_ratio'] == pytest.approx(1/3, abs=.001) for r in rows)
    assert [j.side for j in jobs[3:]] == ['ours', 'trl']*4
    assert all(j.precision=='bf16' for j in jobs[3:]) and all(a.rows==b.rows for a,b in zip(jobs[3::2], jobs[4::2]))

@pytest.mark.parametrize('json_', [False, True])
def test_standard_output_is_json_only(monkeypatch, capsys, json_):
    monkeypatch.setattr(bench, 'run_job', fake_run)
    monkeypatch.setattr(bench.bench, '__defaults__', (2, 2, 2, fake_run, lambda text: None))
    monkeypatch.setattr(bench, 'bench_model', lambda folder, s: str(folder))
    bench.bench_command(scenario='short', json_=json_)
    out,err = capsys.readouterr()
    rows = json.loads(out)
    assert len(rows)==2 and {'scenario', 'step_time_ratio', 'rollout_ratio', 'update_ratio', 'peak_memory_ratio'} <= set(rows[0])
    assert bool(err) != json_

def test_scenarios_are_those_of_the_issue():
    assert set(SCENARIOS)=={'short', 'long', 'ragged', 'lora'} and all(s.G==8 for s in SCENARIOS.values())
    assert SCENARIOS['short'].prompt==32 and SCENARIOS['long'].prompt==256 and SCENARIOS['lora'].lora > 0
    assert min(SCENARIOS['ragged'].ends)==8 and max(SCENARIOS['ragged'].ends)==256

def test_prompts_have_the_length_they_say(tmp_path):
    from finrl_grpo.data import Example, encode_prompt
    from finrl_grpo.models import load_tokenizer
    for s in (SMALL, *SCENARIOS.values()):
        folder = bench_model(tmp_path/s.name, replace(s, hidden=64, layers=1))
        tokenizer = load_tokenizer(folder)
        for o in bench_prompts(s):
            assert len(tokenizer(o)['input_ids'])==s.prompt==len(encode_prompt(tokenizer, Example(o), '{query}', s.prompt))

def test_ends_are_forced():
    logits = torch.zeros(3, 5)
    force_ends(logits, 4, torch.tensor([5, 6, 12]), 2, 12)
    assert logits.argmax(1).tolist()==[2, 0, 0] and logits[1,2] < -1e3
    force_ends(logits, 11, torch.tensor([12, 12, 12]), 2, 12)
    assert (logits[:,2] < 0).all()

def test_rewards_differ_within_a_group():
    assert len(set(bench_reward(['']*8)))==8

@pytest.mark.parametrize('changes', [{}, dict(lean=True), dict(packed=False), dict(precision='bf16')], ids=['fast', 'lean', 'padded', 'bf16'])
def test_our_side_runs_the_work_prescribed(tmp_path, changes):
    "run_ours itself checks where answers end"
    found = run_ours(Job('ours', bench_model(tmp_path, SMALL), SMALL, steps=1, **changes))
    assert len(found['steps'])==1 and 0 < found['steps'][0]['rollout'] < found['steps'][0]['step'] and found['peak'] > 0

@pytest.mark.slow
@pytest.mark.parametrize('lora', [0, 4])
def test_both_sides_in_processes_of_their_own(lora):
    pytest.importorskip('trl')
    rows = bench.bench(replace(SMALL, lora=lora), rounds=1, steps=1)
    assert [r['setting'] for r in rows]==['fastest', 'leanest'] and all(r['step_time_ratio'] > 0 for r in rows)

def test_the_floor_counts_rows_that_are_left():
    "Two answers of 2 and 4 tokens: three tokens are fed, to 2, 1 and 1 rows"
    s = Scenario('toy', prompt=10, answer=4, lengths=(2, 4), prompts=1, G=2, hidden=10)
    floor = bench.floor_seconds(s, 2000, dict(flops=1., bytes=1e9), vocab=100)
    assert floor['rollout'] == pytest.approx(2*1000*10 + 2*2000*(2+1+1))
    assert floor['update'] == pytest.approx(6*1000*(10+1+3) + 8*1000*6)

def test_shares_of_operators_add_up():
    a = torch.randn(64, 64)
    shares = bench.op_shares(lambda: [(a@a).tanh() for _ in range(10)])
    assert sum(shares.values()) == pytest.approx(1, abs=.01) and shares['products'] > 0 and shares['attention']==0

def test_products_in_bf16_are_counted_by_their_shapes(tmp_path):
    "A clock that ticks once a call: every try takes one second"
    from finrl_grpo.models import load_policy
    from finrl_grpo.rollout import can_lay_out
    policy = load_policy(bench.our_config(Job('ours', bench_model(tmp_path, SMALL), SMALL, precision='bf16')))
    n = sum(p.numel() for p in policy.model.parameters() if p.dim()==2)
    for laid_out in (False, True):
        if laid_out and not can_lay_out(policy): continue
        ticks = iter(range(100))
        assert bench.product_rate(policy, 3, laid_out, lambda: next(ticks)) == 2*3*n
    shares = bench.op_shares(lambda: bench.product_rate(policy, 64, can_lay_out(policy)))
    assert shares['products'] > .2
