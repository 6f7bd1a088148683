"""Watching, evaluating and asking from a terminal and from a pipe."""
import io,json,os,subprocess,sys,threading,time
import pytest
from finrl_grpo import chat,cli,watch
from finrl_grpo.checkpoint import RunFolder
from finrl_grpo.config import TrainConfig
from finrl_grpo.data import demo_examples,write_demo
from finrl_grpo.evaluate import Evaluation,change,measure
from finrl_grpo.report import report_html,side_by_side
from finrl_grpo.reward import FinancialRewardModel
from finrl_grpo.view import write_example
from test_panel import Tree
from test_panel_browser import HOSTILE,hostile_run

LENGTHS = ['max_prompt_length=48', 'max_new_tokens=8', 'max_length=56']

def test_lines_are_printed_once_and_end_with_the_run(tmp_path):
    run,out = write_example(tmp_path/'run', steps=3),io.StringIO()
    run.set_status('running', 3, total=9)
    with run.lock():
        thread = threading.Thread(target=watch.watch_lines, args=(run.path, out), kwargs=dict(every=.02))
        thread.start()
        for i in range(4, 10):
            run.append_metrics(dict(step=i, reward_mean=i/9))
            time.sleep(.03)
        run.set_status('finished', 9, total=9)
        thread.join(10)
    assert [o.split()[0] for o in out.getvalue().splitlines()[:9]]==[f'step={i}' for i in range(1, 10)]
    assert 'run: finished at step 9 of 9' in out.getvalue() and '\r' not in out.getvalue() and '\x1b' not in out.getvalue()

@pytest.mark.skipif(os.name=='nt', reason='pseudo-terminals are POSIX')
def test_a_screen_in_a_terminal(tmp_path):
    import pty
    write_example(tmp_path/'run', steps=8)
    main,side = pty.openpty()
    env = dict(os.environ, TERM='xterm', COLUMNS='100', LINES='40', FINRL_UI='auto')
    process = subprocess.Popen([sys.executable, '-m', 'finrl_grpo.cli', 'watch', str(tmp_path/'run')], stdin=side, stdout=side, stderr=side, env=env)
    os.close(side)
    found = b''
    while True:
        try: piece = os.read(main, 65536)
        except OSError: break
        if not piece: break
        found += piece
    assert process.wait(60)==0
    text = found.decode('utf-8', 'replace')
    assert '✓ finished 已完成' in text and 'recommendation' in text and '█' in text and '\x1b[' in text

def test_hostile_texts_do_not_reach_the_terminal(tmp_path):
    from rich.console import Console
    run,out = hostile_run(tmp_path/'run'),io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(watch.screen(watch.Reader(run).snapshot()))
    watch.watch_lines(run, out)
    assert not [o for o in out.getvalue() if o in '\x1b\x07\x00\u202e'] and '<script>' in out.getvalue()

def test_the_report_is_a_page_of_its_own(tmp_path):
    judge = FinancialRewardModel()
    both = [Evaluation([measure(q, q*n, judge.score(q, q*n)) for q in HOSTILE], '<b>'+name) for name,n in (('base', 1), ('tuned', 2))]
    page = report_html(*both, title='</title><script>', note='<img src=x>')
    tree = Tree(page.partition('>')[2])
    assert not {'script', 'img', 'iframe', 'a', 'form'} & set(tree.names) and page.count('<article>')==len(HOSTILE) and tree.wrong==[]
    assert not [k for k,_ in tree.attributes if k.startswith('on') or k in ('src', 'href')]

def test_changes_are_paired():
    rows = lambda gain: [dict(query=str(i), reward=(i % 7)/7+gain+(i % 2)*.01, **dict.fromkeys(('accuracy', 'risk_assessment', 'recommendation', 'language_quality', 'promises', 'repetition', 'relevance', 'length'), 0.)) for i in range(40)]
    before,after = Evaluation(rows(0.), 'base'),Evaluation(rows(.05), 'tuned')
    assert '+0.05 (+0.05 to +0.05) *' in side_by_side(before, after)
    with pytest.raises(ValueError, match='different questions'): change(before, Evaluation(rows(0.)[1:]))

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run of two steps with a best model, and its data"
    folder = tmp_path_factory.mktemp('trained')
    write_demo(folder/'demo.jsonl', n=24)
    small = dict(model_name='builtin:micro', batch_size=2, gradient_accumulation_steps=1, num_generations=2, max_prompt_length=48, max_new_tokens=8, ppo_epochs=1, max_steps=2,
        use_fp16=False, use_wandb=False, gradient_checkpointing=False)
    assert cli.main(['train', '--dataset', str(folder/'demo.jsonl'), '--output', str(folder/'run'), '--config', json.dumps(small)])==0
    return folder

def test_eval_compares_with_the_base(trained, capsys):
    capsys.readouterr()
    assert cli.main(['eval', str(trained/'run'), '--json'])==0
    found = json.loads(capsys.readouterr().out)
    assert found['base']['name']=='base: builtin:micro' and set(found['change'])==set(found['summary']) and found['rows']==2
    page = (trained/'run'/'evaluation.html').read_text(encoding='utf-8')
    assert page.count('<article>')==2 and 'held back' in page

def test_eval_of_a_model_alone(trained, capsys):
    assert cli.main(['eval', 'builtin:micro', '--dataset', str(trained/'demo.jsonl'), '--samples', '3', *[o for s in LENGTHS for o in ('--set', s)]])==0
    said = capsys.readouterr()
    assert 'means over 3 questions' in said.out and 'report' not in said.out and 'the first 3 of 24' in said.err
    assert cli.main(['eval', 'builtin:micro', '--dataset', str(trained/'demo.jsonl'), '--base', 'builtin:mikro'])==2

def test_chat_reads_its_questions_from_stdin(trained, monkeypatch, capsys):
    monkeypatch.setattr('sys.stdin', io.StringIO('台積電可以買嗎？\n\n台積電可以買嗎？\n'))
    capsys.readouterr()
    assert cli.main(['chat', str(trained/'run'), '--json', '--greedy'])==0
    said = capsys.readouterr()
    first,second = map(json.loads, said.out.splitlines())
    assert first==second and first['question']=='台積電可以買嗎？' and 'evidence' in first and '問>' not in said.err

@pytest.mark.slow
def test_chat_at_the_end_of_a_pipe(trained):
    command = [sys.executable, '-m', 'finrl_grpo.cli', 'chat', str(trained/'run'), '--greedy']
    done = subprocess.run(command, input='台積電可以買嗎？\n美元呢？\n', capture_output=True, text=True, encoding='utf-8', timeout=120)
    assert done.returncode==0 and done.stdout.count('問：')==2 and '問>' not in done.stderr

def test_chat_draws_anew_unless_greedy(trained):
    c = TrainConfig.from_dict(RunFolder.open(trained/'run').config())
    drawn,same = chat.Chat('builtin:micro', c),chat.Chat('builtin:micro', c, greedy=True)
    assert drawn.ask('美元？').answer!=drawn.ask('美元？').answer
    assert same.ask('美元？').answer==same.ask('美元？').answer
    assert drawn.ask('美元？', context='匯率 31.5').breakdown.total <= 1
