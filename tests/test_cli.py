"The command line: what it reads, what it says when it cannot, and what it leaves alone."
import json, os, subprocess, sys, time
from pathlib import Path
import pytest
from finrl_grpo import cli, config as cfg
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.data import load_dataset, write_demo

MICRO = ['--model', 'builtin:micro']

@pytest.fixture
def demo(tmp_path):
    "A data file of 30 rows"
    return write_demo(tmp_path/'demo.jsonl', 30)

@pytest.fixture
def no_training(monkeypatch):
    "Let `start` note its run instead of training"
    started = []
    monkeypatch.setattr(cli, 'start', lambda run,rows: started.append((run, rows)) or 0)
    return started

def train(*words): return cli.main(['train', *map(str, words)])

def said(capsys):
    "stderr so far"
    return capsys.readouterr().err

def program(*words, **env):
    "`finrl-grpo …` in a process of its own, stdout and stderr as bytes"
    return subprocess.run([sys.executable, '-m', 'finrl_grpo.cli', *words], capture_output=True, env={**os.environ, **env}, timeout=60)

# Parsing

def example(
    place:str, # By place
    *,
    number:int=3, # With a default
    ratio:float|None=None, # Unset
    needed:str, # Required
    on:bool=True, # A switch that is on
    json_:bool=False, # A switch that is off
    more:list=(), # Repeatable
): "An example"

def parse(*words): return cli.parser_for(example, 'x').parse(list(words))

def test_a_signature_becomes_a_command_line():
    expected = dict(place='p', number=4, ratio=.5, needed='n', on=False, json_=True, more=['a', 'b'])
    assert parse('p', '--number', '4', '--ratio=0.5', '--needed', 'n', '--no-on', '--json', '--more', 'a', '--more', 'b') == expected
    assert parse('p', '--needed', 'n') == dict(place='p', number=3, ratio=None, needed='n', on=True, json_=False, more=[])

def test_repeatable_options_do_not_share_their_list():
    assert parse('p', '--needed', 'n', '--more', 'a')['more'] == ['a']
    assert parse('p', '--needed', 'n')['more'] == []

@pytest.mark.parametrize('words,expected', [
    (['p', '--need', 'n'], 'unknown option --need'), (['p', '--needed', 'n', '--numbr', '4'], 'did you mean `--number`?'),
    (['p', '--needed', 'n', '--number', 'x'], 'invalid int value'), (['p'], '--needed'), (['--needed', 'n'], 'place'),
    (['p', 'q', '--needed', 'n'], 'unrecognized arguments: q'), (['p', '--needed', 'n', '-z'], '-z')])
def test_a_wrong_word_is_named(words, expected):
    with pytest.raises(cfg.UserError, match=expected): parse(*words)

def test_a_value_may_look_like_a_flag(): assert parse('p', '--needed=--x y')['needed'] == '--x y'

def by_fastcore_rule(place:str, option:str='x'): "No star: what has a default is an option"
def by_star(place:str, second:str='s', *, option:str='x'): "A star: what is before it goes by place"

def test_both_ways_of_marking_options():
    assert cli.parser_for(by_fastcore_rule, 'x').parse(['p', '--option', 'o']) == dict(place='p', option='o')
    assert cli.parser_for(by_star, 'x').parse(['p', 'q', '--option', 'o']) == dict(place='p', second='q', option='o')
    assert cli.parser_for(by_star, 'x').parse(['p'])['second'] == 's'

def test_a_room_may_parse_for_itself():
    def own(argv): return len(argv)
    assert cli.call(own, 'x', ['a', '--b', 'c']) == 3

@pytest.mark.parametrize('name', cli.COMMANDS)
def test_every_command_exists_and_explains_itself(name, capsys):
    assert cli.main([name, '--help']) == 0
    out = capsys.readouterr().out
    assert f'finrl-grpo {name}' in out and '==SUPPRESS==' not in out
    assert cli.main(['help', name]) == 0 and capsys.readouterr().out == out

def test_help_is_short_and_quick():
    start = time.perf_counter()
    lines = program('--help').stdout.decode().splitlines()
    assert time.perf_counter()-start < 1.5
    assert len(lines) <= 40 and max(map(len, lines)) <= 110 and all(any(o.strip().startswith(name) for o in lines) for name in cli.COMMANDS)

def test_light_commands_load_nothing_heavy(demo, tmp_path):
    words = [['config'], ['version'], ['demo', '--dataset', str(tmp_path/'d.jsonl')], ['data', 'check', str(demo)], ['status', str(tmp_path)], ['resume', str(tmp_path)],
        ['train', '--dataset', str(demo), '--output', str(tmp_path/'r'), *MICRO, '--dry-run'], ['trian'], ['train', '--dataset', 'x', '--output', 'y', '--set', 'bta=1']]
    code = f'import sys\nfrom finrl_grpo.cli import main\nprint([main(o) for o in {words!r}])\nprint([m for m in ("torch", "transformers", "datasets", "matplotlib", "wandb") if m in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, encoding='utf-8', timeout=60)
    assert run.stdout.splitlines()[-2:] == ['[0, 0, 0, 0, 3, 3, 0, 2, 2]', '[]'], run.stderr

# Endings

@pytest.mark.parametrize('kind,code', [(cfg.UserError, 2), (cfg.ConfigError, 2), (cfg.DataError, 3), (cfg.OutputError, 3), (cfg.LockedError, 4),
    (cfg.OutOfMemoryError, 5), (cfg.CheckpointError, 6), (cfg.DivergedError, 7)])
def test_exit_codes_of_mistakes(kind, code, capsys):
    def action(_): raise kind('the what', 'the why', 'the fix')
    assert cli.guarded(action, []) == code
    assert said(capsys) == 'error: the what\n  why: the why\n  fix: the fix\n'

def test_a_fault_is_one_line_and_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.tempfile, 'gettempdir', lambda: str(tmp_path))
    def action(_): raise ZeroDivisionError('first line\nsecond line')
    assert cli.guarded(action, []) == 1
    err = said(capsys)
    assert 'ZeroDivisionError: first line' in err and 'second line' not in err and 'Traceback' not in err and 'finrl-grpo-error.log' in err
    assert 'Traceback' in (tmp_path/'finrl-grpo-error.log').read_text(encoding='utf-8')

def test_a_fault_in_a_run_is_written_beside_it(capsys, demo, tmp_path, monkeypatch):
    import finrl_grpo.run
    def action(run, rows): raise ZeroDivisionError('in a run')
    monkeypatch.setattr(finrl_grpo.run, 'run_training', action)
    assert train('--dataset', demo, '--output', tmp_path/'run', *MICRO) == 1
    assert 'in a run' in (tmp_path/'run'/'finrl-grpo-error.log').read_text(encoding='utf-8')

@pytest.mark.parametrize('how', ['flag', 'variable'])
def test_the_traceback_is_shown_on_request(how, capsys, monkeypatch):
    if how == 'variable': monkeypatch.setenv('FINRL_TRACEBACK', '1')
    assert cli.main(['config', '--set', 'bta=1'] + ['--traceback'][:how == 'flag']) == 2
    assert 'Traceback' in said(capsys)

@pytest.mark.parametrize('error,code', [(KeyboardInterrupt(), 130), (SystemExit(5), 5), (SystemExit(None), 0), (SystemExit('text'), 1)])
def test_other_endings(error, code, capsys):
    def action(_): raise error
    assert cli.guarded(action, []) == code

@pytest.mark.skipif(os.name == 'nt', reason='pipes of a POSIX shell')
def test_a_closed_pipe_is_quiet():
    p = subprocess.Popen([sys.executable, '-u', '-m', 'finrl_grpo.cli', 'config'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert p.wait(timeout=60) == 141
    assert p.stderr.read() == b''

def test_any_text_on_any_console():
    run = program('config', '--set', 'prompt_template=台灣：{query}', PYTHONIOENCODING='cp1252')
    assert '台灣：{query}' in run.stdout.decode('utf-8')

def test_an_interrupted_run_says_how_to_go_on(capsys, demo, tmp_path, monkeypatch):
    import finrl_grpo.run
    def action(run, rows): raise KeyboardInterrupt
    monkeypatch.setattr(finrl_grpo.run, 'run_training', action)
    assert train('--dataset', demo, '--output', tmp_path/'run', *MICRO) == 130
    assert said(capsys).splitlines()[-1] == f'interrupted; go on with: finrl-grpo resume {tmp_path/"run"}'

# Settings

def settings(capsys, *words):
    "`finrl-grpo config …` as a dict from key to its line"
    assert cli.main(['config', *words]) == 0
    return {o.split()[0]:o for o in capsys.readouterr().out.splitlines() if o.strip()}

def test_later_layers_win_and_say_so(capsys, tmp_path):
    (tmp_path/'a.yaml').write_text('beta: 0.1\nlearning_rate: 1e-4\nbatch_size: 2\n', encoding='utf-8')
    s = settings(capsys, '--set', 'beta=0.3', '--config', str(tmp_path/'a.yaml'), '--config', '{"batch_size": 3}', '--preset', 'quickstart')
    assert '0.3' in s['beta'] and '--set beta=0.3' in s['beta']
    assert '0.0001' in s['learning_rate'] and 'a.yaml' in s['learning_rate']
    assert ' 3 ' in s['batch_size'] and 'inline JSON' in s['batch_size']
    assert 'builtin:tiny' in s['model_name'] and 'preset quickstart' in s['model_name']
    assert s['seed'].endswith('default') and 'accuracy_weight' in s

def test_flags_win_over_all():
    c = cli.merged_config(['{"model_name": "a", "algorithm": "ppo"}'], ['model_name=b'], None, 'builtin:micro', 'grpo')
    assert (c.model_name, c.algorithm) == ('builtin:micro', 'grpo')
    assert (c.origin['model_name'], c.origin['algorithm']) == ('--model', '--algorithm')

def test_config_as_json_is_a_config_file(capsys, tmp_path):
    assert cli.main(['config', '--preset', 'quickstart', '--set', 'accuracy_weight=0.7', '--json']) == 0
    (tmp_path/'c.json').write_text(capsys.readouterr().out, encoding='utf-8')
    again = cfg.load_config(str(tmp_path/'c.json'))
    assert again == cfg.load_config(preset='quickstart', sets=['accuracy_weight=0.7'])

# Starting and resuming

def test_train_prepares_the_folder_before_anything_heavy(demo, tmp_path, no_training, capsys):
    assert train('--dataset', demo, '--output', tmp_path/'run', *MICRO, '--set', 'max_steps=2') == 0
    run = RunFolder.open(tmp_path/'run')
    rows = load_dataset(demo)
    assert run.read_json('data.json') == dict(path=str(demo), hash=rows.hash, rows=30, on_bad_row='error', encoding=None)
    assert run.config()['max_steps'] == 2 and len(no_training) == 1
    out = capsys.readouterr().out
    assert '--model' in out and '--set max_steps=2' in out and '27 to train on, 3 held back' in out

def test_the_guides_model_gets_a_word_of_advice(demo, tmp_path, monkeypatch, capsys):
    (tmp_path/'hub'/'models--microsoft--DialoGPT-medium'/'snapshots').mkdir(parents=True)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path/'hub'))
    assert train('--dataset', demo, '--output', tmp_path/'run', '--dry-run') == 0
    assert said(capsys).count('no Chinese') == 1

def test_dry_run_leaves_nothing(demo, tmp_path, no_training, capsys):
    assert train('--dataset', demo, '--output', tmp_path/'run', *MICRO, '--dry-run') == 0
    assert not (tmp_path/'run').exists() and no_training == [] and 'plan' in capsys.readouterr().out

def test_the_plan_says_why_nothing_is_held_back(demo):
    plan = lambda rows,**kw: cli.plan_text(cfg.load_config(**kw), rows)
    rows = load_dataset(demo)
    assert 'fewer than 20 rows' in plan(rows[:5])
    assert '`eval_fraction` is 0' in plan(rows, eval_fraction=0.)
    assert '1 of 27 prompts' in plan(rows, num_train_epochs=1)
    assert '3 of 32 prompts' in plan(rows) and '1 of 32 prompts' in plan(rows, max_steps=1)
    assert '1 of 6 prompts' in plan(rows[:2])

def test_an_existing_run_is_refused_and_resume_offered(demo, tmp_path, no_training, capsys):
    words = '--dataset', demo, '--output', tmp_path/'run', *MICRO
    assert train(*words) == 0
    before = {o:o.stat().st_mtime_ns for o in (tmp_path/'run').iterdir()}
    assert train(*words) == 3
    assert f'resume {tmp_path/"run"}' in said(capsys) and len(no_training) == 1
    assert {o:o.stat().st_mtime_ns for o in (tmp_path/'run').iterdir()} == before

@pytest.fixture
def begun(demo, tmp_path, no_training):
    "A run that was prepared and never trained"
    assert train('--dataset', demo, '--output', tmp_path/'run', *MICRO) == 0
    no_training.clear()
    return tmp_path/'run'

def test_resume_reads_its_data_again(begun, demo, no_training):
    assert cli.main(['resume', str(begun)]) == 0
    assert list(no_training[0][1]) == list(load_dataset(demo))

def test_resume_refuses_other_data(begun, demo, no_training, capsys):
    with open(demo, 'a', encoding='utf-8') as f: f.write('{"query": "新的問題"}\n')
    assert cli.main(['resume', str(begun)]) == 3
    err = said(capsys)
    assert 'had 30 rows, now 31' in err and 'new run' in err and no_training == []

def test_resume_finds_moved_data(begun, demo, tmp_path, no_training, capsys):
    demo.rename(tmp_path/'moved.jsonl')
    assert cli.main(['resume', str(begun)]) == 3
    assert '--dataset FILE' in said(capsys)
    assert cli.main(['resume', str(begun), '--dataset', str(tmp_path/'moved.jsonl')]) == 0 and len(no_training) == 1

def test_resume_of_a_finished_run_is_nothing(begun, no_training, capsys):
    RunFolder.open(begun).set_status('finished', 3, total=3)
    assert cli.main(['resume', str(begun)]) == 0
    assert 'is finished: 3 of 3 steps' in capsys.readouterr().out and no_training == []

@pytest.mark.parametrize('name', ['training_config.json', 'data.json'])
@pytest.mark.parametrize('how', ['missing', 'damaged'])
def test_resume_needs_its_files(name, how, begun, no_training, capsys):
    (begun/name).unlink() if how == 'missing' else (begun/name).write_text('{', encoding='utf-8')
    assert cli.main(['resume', str(begun)]) == 3
    assert name in said(capsys) and no_training == []

def test_a_run_in_use_is_left_alone(begun, no_training, capsys):
    with RunFolder.open(begun).lock():
        assert cli.main(['resume', str(begun)]) == 4
        assert 'in use' in said(capsys) and no_training == []

def test_a_killed_quickstart_finds_its_questions(tmp_path, no_training):
    from finrl_grpo.quickstart import quickstart_config, quickstart_rows
    RunFolder.create(tmp_path/'q', quickstart_config().to_dict(), 'quickstart')
    assert cli.main(['resume', str(tmp_path/'q')]) == 0
    assert no_training[0][1] == quickstart_rows()

# Looking

def status(run, capsys):
    "`finrl-grpo status RUN --json`"
    assert cli.main(['status', str(run), '--json']) == 0
    return json.loads(capsys.readouterr().out)

def test_status_of_a_run(begun, capsys):
    capsys.readouterr()
    assert status(begun, capsys)['state'] == 'new'
    run = RunFolder.open(begun)
    with run.lock():
        run.set_status('running', 1, total=9)
        run.append_metrics(dict(step=1, reward_mean=.25))
        now = status(begun, capsys)
        assert (now['state'], now['step'], now['total'], now['reward_last'], now['best_model']) == ('running', 1, 9, .25, None)
        assert cli.main(['status', str(begun)]) == 0 and 'running, step 1 of 9' in capsys.readouterr().out
    assert status(begun, capsys)['state'] == 'interrupted'
    assert cli.main(['status', str(begun)]) == 0 and f'resume {begun}' in capsys.readouterr().out

def test_stop_asks_a_run_that_runs_and_no_other(begun, capsys):
    assert cli.main(['stop', str(begun)]) == 0 and 'not running' in capsys.readouterr().out
    run = RunFolder.open(begun)
    assert run.requested() == ''
    with run.lock():
        assert cli.main(['stop', str(begun)]) == 0
        assert run.requested() == 'stop'

def test_eval_needs_questions(begun, capsys):
    assert cli.main(['eval', 'builtin:micro']) == 2 and '--dataset is missing' in said(capsys)
    assert cli.main(['eval', str(begun)]) == 3 and 'no best_model yet' in said(capsys)

def test_eval_of_a_run_asks_what_was_held_back(begun, demo, capsys):
    c,run = cfg.TrainConfig.from_dict(RunFolder.open(begun).config()),RunFolder.open(begun)
    assert len(cli.eval_rows(run, c)) == 3
    capsys.readouterr()
    assert len(cli.eval_rows(run, c, str(demo))) == 30 and 'trained on' in said(capsys)

# The small ones

def test_notebooks_are_copied_and_never_replaced(tmp_path, capsys):
    copy = lambda *words: cli.main(['notebooks', str(tmp_path/'nb'), *words])
    assert copy() == 0
    names = [o.relative_to(tmp_path/'nb') for o in (tmp_path/'nb').rglob('*.ipynb')]
    assert Path('index.ipynb') in names and Path('15_cli.ipynb') in names and not any(str(o).startswith(('_', '.')) for o in names)
    assert copy() == 0
    (tmp_path/'nb'/'index.ipynb').write_text('mine', encoding='utf-8')
    assert copy() == 3 and 'index.ipynb' in said(capsys)
    assert (tmp_path/'nb'/'index.ipynb').read_text(encoding='utf-8') == 'mine'
    assert copy('--overwrite') == 0 and (tmp_path/'nb'/'index.ipynb').read_text(encoding='utf-8') != 'mine'

def test_version(capsys):
    from finrl_grpo import __version__
    assert [cli.main(o) for o in (['version'], ['--version'])] == [0, 0]
    assert capsys.readouterr().out == f'finrl_grpo {__version__}\n'*2

def test_no_command_is_a_usage_error(capsys): assert cli.main([]) == 2 and '--help' in said(capsys)
