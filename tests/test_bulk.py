"Large files of answers: same output from any number of processes, in order, in memory that does not grow"
import io, json, os, subprocess, sys, time
import pytest
from finrl_grpo import bulk
from finrl_grpo.bulk import BLOCK, blocks, score_stream
from finrl_grpo.cli import main
from finrl_grpo.data import demo_answers
from finrl_grpo.reward import score_file

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp('answers')/'answers.jsonl'
    out.write_text('\n'.join(json.dumps(dict(query=q, response=f'{a}{i}'), ensure_ascii=False) for i,(q,a,_) in enumerate(demo_answers(500))), encoding='utf-8')
    return out

@pytest.mark.parametrize('as_json', [[], ['--json']])
def test_same_output_in_order(path, capsys, as_json):
    outs = []
    for workers in ('1', '2', '3'):
        assert main(['reward', '--file', str(path), '--workers', workers, *as_json]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] == outs[2]
    lines = outs[0].splitlines()
    expected = score_file(str(path))
    assert [json.loads(o)['total'] for o in lines] == [b.total for b in expected] if as_json else lines[:-1] == list(map(str, expected))

def test_only_a_few_blocks_at_a_time(path, monkeypatch):
    "However far the reader is behind, no more than 2 blocks a worker (and the one in hand) have been read"
    read = []
    def counted(p, size=5):
        for o in blocks(p, 5):
            read.append(o[0])
            yield o
    monkeypatch.setattr(bulk, 'blocks', counted)
    ahead = [len(read)-i for i,_ in enumerate(score_stream(path, 2))]
    assert len(ahead) == 100 and max(ahead) <= 6

def test_byte_order_mark_blank_lines_and_line_ends(tmp_path, path):
    rows = path.read_text(encoding='utf-8').splitlines()[:3]
    odd = tmp_path/'odd.jsonl'
    odd.write_bytes(b'\xef\xbb\xbf' + '\r\n\r\n'.join(rows).encode() + b'\r\n')
    assert [o for _,lines,*_ in score_stream(odd) for o in lines] == list(map(str, score_file(str(path))[:3]))

@pytest.mark.parametrize('workers', ['1', '2'])
@pytest.mark.parametrize('text,said', [(b'{"query": "a", "response": "b"}\n{', 'bad.jsonl, line 2: is not JSON'), (b'\xff\xfe{}', 'is not UTF-8 near line 1'), (None, 'cannot be read')])
def test_bad_files_say_where(tmp_path, capsys, workers, text, said):
    bad = tmp_path/'bad.jsonl'
    if text is not None: bad.write_bytes(text)
    assert main(['reward', '--file', str(bad), '--workers', workers]) == 3
    assert said in capsys.readouterr().err

def test_wrong_number_of_workers(path, capsys):
    assert main(['reward', '--file', str(path), '--workers', '-1']) == 2
    assert '--workers -1' in capsys.readouterr().err

def test_progress_is_on_stderr(path, capsys, monkeypatch):
    bulk.print_scores(path, 1, every=0)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == -(-500//BLOCK) and err[-1].startswith('500 answers, 100%')

@pytest.mark.slow
def test_two_processes_are_faster(tmp_path):
    "At least 1.8 times one process on two free cores, 20 000 answers"
    if (os.cpu_count() or 1) < 2 or os.getloadavg()[0] > .5*os.cpu_count(): pytest.skip('needs two free cores')
    big = tmp_path/'big.jsonl'
    big.write_text('\n'.join(json.dumps(dict(query=q, response=a), ensure_ascii=False) for q,a,_ in demo_answers(20_000)), encoding='utf-8')
    def seconds(workers):
        began = time.perf_counter()
        subprocess.run([sys.executable, '-m', 'finrl_grpo.cli', 'reward', '--file', str(big), '--workers', str(workers)], stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter()-began
    assert max(seconds(1)/seconds(2) for _ in range(3)) >= 1.8
