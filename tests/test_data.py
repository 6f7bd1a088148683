"""Whatever a person may hand over as a data file: rows or one clear message, never a traceback.

The table `BAD_INPUTS` holds 35 kinds of input. Each case says what must come of it: examples and notes, or a message.
"""
import errno, gzip, io, json, os, sys
from collections import Counter
from pathlib import Path
from statistics import mean, median
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from finrl_grpo.config import ConfigError, DataError, OutputError, UserError
from finrl_grpo.data import (Example, content_hash, data_command, demo_answers, demo_command, demo_examples, demo_material, demo_rows,
    encode_prompt, leaks, load_dataset, long_prompts, prompt_text, render_prompt, split_examples, write_demo)
from finrl_grpo.reader import MAX_ROW, DataReader, array_elements, layout
from finrl_grpo.rows import RowFault, parse_row, question_key, row_to_example

EXCERPT = Path(__file__).parent/'data'/'consulting_part_20.json'
GOOD = '{"query": "分析台積電的投資價值", "context": "台股投資分析", "reference": "毛利率約55%。"}\n'
SECOND = '{"query": "如何評估鴻海的財務狀況", "reference": "看三張報表。"}\n'
SIMPLIFIED = '{"query": "分析台积电的投资价值", "reference": "毛利率约为百分之五十五，风险包括汇率波动与订单减少。"}\n'

def reads(n, *notes): return lambda path: _reads(path, n, notes)
def says(*parts, at=''): return lambda path: _says(path, parts, at)

def _reads(path, n, notes):
    ds = load_dataset(path)
    assert len(ds) == n
    for note in notes: assert any(note in o for o in ds.notes), (note, ds.notes)

def _checked(path, line):
    from contextlib import redirect_stdout
    with redirect_stdout(io.StringIO()) as out: data_command('check', str(path))
    assert line in out.getvalue()

def _says(path, parts, at):
    with pytest.raises(DataError) as e: load_dataset(path)
    text = str(e.value)
    assert text.startswith(f'{path}{at}') or not at, text
    for part in parts: assert part in text, (part, text)
    assert e.value.exit_code == 3

BAD_INPUTS = [
    ('01 byte order mark', '\ufeff' + GOOD, reads(1)),
    ('02 CRLF', (GOOD + SECOND).replace('\n', '\r\n'), reads(2)),
    ('03 blank lines', GOOD + '\n  \n' + SECOND, reads(2, 'blank lines: 2')),
    ('04 last line cut off', GOOD*19 + SECOND[:20], says('row ends too early', 'truncated', '19 of 20 rows are good', '--on-bad-row skip', at=':20:')),
    ('05 garbage line', GOOD + 'not json at all\n' + SECOND, says('not JSON: `not json at all`', at=':2:1 ')),
    ('06 trailing comma', GOOD + '{"query": "本益比",}\n', says('comma before', 'delete it', at=':2:16 ')),
    ('07 Python repr', GOOD + "{'query': '本益比'}\n", says('this is Python, not JSON', 'json.dumps', at=':2:2 ')),
    ('08 NaN', GOOD + '{"query": "本益比", "context": NaN}\n', says('NaN is not JSON: field `context`', at=':2:29 ')),
    ('08 Infinity', '{"query": "本益比", "reference": -Infinity}\n', says('-Infinity is not JSON: field `reference`', at=':1:')),
    ('09 no reference', GOOD + '{"query": "本益比"}\n', reads(2, 'rows without `reference`: 1 of 2')),
    ('09 no query', GOOD + '{"context": "台股"}\n', says('no `query` (required)', 'its keys: `context`', at=':2:1 ')),
    ('10 query null', GOOD + '{"query": null}\n', says('`query` is empty', at=':2:2 ')),
    ('10 query of U+3000 only', '{"query": "\u3000\u3000"}\n', says('`query` is empty', at=':1:')),
    ('11 query is a number', '{"query": 5}\n', says('`query` must be text, is a number (5)', 'quote it', at=':1:2 ')),
    ('12 query is an object', '{"query": {"text": "本益比"}}\n', says('`query` must be text, is an object', 'did you mean `query.text`?', at=':1:2 ')),
    ('13 chat messages', '{"query": [{"role": "user", "content": "本益比？"}, {"role": "assistant", "content": "20倍"}]}\n', reads(1)),
    ('13 query is a list', '{"query": ["本益比"]}\n', says('`query` must be text, is a list', at=':1:')),
    ('14 lone surrogate', '{"query": "漲\\ud83d"}\n', says('half an emoji', 're-encode', at=':1:13 ')),
    ('15 Big5', GOOD.encode('cp950'), says('look like Big5', '分析台積電', '--encoding cp950', at=':1:12 ')),
    ('16 UTF-16', GOOD.encode('utf-16'), says('look like UTF-16', '分析台積電', '--encoding utf-16')),
    ('17 Simplified', SIMPLIFIED, reads(1, 'mainly Simplified Chinese (100%')),
    ('17 GB18030', SIMPLIFIED.encode('gb18030'), says('look like GB18030', '分析台积电', '--encoding gb18030')),
    ('18 zero bytes', b'', says('the file is empty')),
    ('19 only blank lines', '\n \n\n', says('no rows', 'only blank lines')),
    ('20 one row', GOOD, lambda path: _checked(path, 'note: rows: 1, too few to hold some back')),
    ('21 JSON array', f'[{GOOD},\n{SECOND}]', reads(2)),
    ('22 one pretty-printed object', json.dumps(json.loads(GOOD), ensure_ascii=False, indent=2), reads(1)),
    ('23 array of strings', '["本益比", "殖利率"]', says('row is text', 'rows must be objects', ':1:2 ')),
    ('24 scalar lines', GOOD + '5\n', says('row is a number (5)', at=':2:1 ')),
    ('25 formats mixed', GOOD + '{"instruction": "評估風險", "input": "鴻海科技", "output": "…"}\n', reads(2, '1 GRPO, 1 instruction')),
    ('25 both formats in a row', '{"query": "本益比", "instruction": "評估風險"}\n', says('row has both `query` and `instruction`', at=':1:')),
    ('26 duplicate key', '{"query": "本益比", "query": "殖利率"}\n', says('`query` twice in one object', at=':1:18 ')),
    ('27 repeated row', GOOD + SECOND + GOOD, reads(3, 'repeats of an earlier row: 1 (line 3)')),
    ('27 another reference', GOOD + GOOD.replace('55', '60'), reads(2, 'an earlier question with another reference: 1 (line 2)')),
    ('28 control byte', GOOD + '{"query": "本益\x00比"}\n', says('control byte 0x00', at=':2:14 ')),
    ('29 endless line', '{"query": "' + '比'*(MAX_ROW + 13) + '"}', says('characters (limit 1,000,000)', '1,000,026')),
    ('31 HTML', '<!DOCTYPE html><html><body>404</body></html>', says('a web page')),
    ('31 CSV', 'query,context,reference\n本益比,台股,20倍\n', says('this is CSV')),
    ('31 gzip', gzip.compress(GOOD.encode()), says('a gzip archive')),
    ('31 git-lfs pointer', 'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', says('a git-lfs pointer', 'git lfs pull')),
    ('32 U+2028 in a value', '{"query": "本益比\u2028怎麼算？"}\n', reads(1)),
    ('33 ESC in a value', '{"query": "\\u001b[31m本益比"}\n', reads(1, 'control characters were removed: 1')),
    ('33 markup in a value', '{"query": "<script>alert(1)</script>本益比"}\n', reads(1)),
    ('35 other case', '{"Query": "本益比"}\n', says('unknown key `Query`', 'did you mean `query`?', at=':1:2 ')),
    ('35 other width', '{"ｑｕｅｒｙ": "本益比"}\n', says('did you mean `query`?')),
    ('35 other language', '{"問題": "本益比"}\n', says('did you mean `query`?')),
    ('35 misspelt', '{"query": "本益比", "refrence": "20倍"}\n', says('unknown key `refrence`', 'did you mean `reference`?', at=':1:')),
]

@pytest.mark.parametrize('content,check', [o[1:] for o in BAD_INPUTS], ids=[o[0] for o in BAD_INPUTS])
def test_bad_input(content, check, tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass'))
    check(path)

def test_30_prompts_beyond_the_window():
    long = Example('這檔好嗎？', '說明' * 40)
    assert long_prompts(Letters(), [Example('本益比'), long], 40) == [(len(prompt_text(long))+1, long)]
    assert len(encode_prompt(Letters(), long, max_length=40)) == 40

@pytest.mark.parametrize('case', ['missing', 'folder', 'empty name', 'below a file', 'NUL in the name', 'pipe', 'unreadable'])
def test_34_paths(case, tmp_path, monkeypatch):
    "No path ends in a traceback, and a near name is offered"
    (tmp_path/'demo_grpo_dataset.jsonl').write_text(GOOD, encoding='utf-8')
    paths = {'missing':tmp_path/'demo_grpo_datset.jsonl', 'folder':tmp_path, 'empty name':'', 'below a file':tmp_path/'demo_grpo_dataset.jsonl'/'x',
        'NUL in the name':str(tmp_path/'a\0b'), 'pipe':tmp_path/'pipe', 'unreadable':tmp_path/'demo_grpo_dataset.jsonl'}
    if case == 'pipe':
        if not hasattr(os, 'mkfifo'): pytest.skip('no pipes with names here')
        os.mkfifo(paths['pipe'])
    if case == 'unreadable':
        def refuse(*args, **kwargs): raise PermissionError(errno.EACCES, 'Permission denied')
        monkeypatch.setattr('builtins.open', refuse)
    expected = {'missing':'did you mean', 'folder':'is a folder', 'empty name':'is a folder', 'below a file':'no such file', 'NUL in the name':'cannot open',
        'pipe':'a pipe or a device', 'unreadable':'Permission denied'}
    with pytest.raises(DataError, match=expected[case]): load_dataset(paths[case])

def test_faults_of_a_file_are_listed_at_once(tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_text(GOOD + '{"query": 5}\n'*12, encoding='utf-8')
    with pytest.raises(DataError) as e: load_dataset(path)
    lines = str(e.value).split('\n')
    assert '12 bad rows' in lines[0] and 'and 2 more' in lines[11] and '1 of 13 rows are good' in lines[12]
    assert all(f'{path}:{i}:2 ' in lines[i-1] for i in range(2, 12))

def test_skip_and_quarantine(tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_bytes(GOOD.encode() + b'{"query": 5}\n' + b'{"query": "\xff"}\n' + SECOND.encode())
    assert len(load_dataset(path, 'skip')) == 2 and not (tmp_path/'bad_rows.jsonl').exists()
    ds = load_dataset(path, 'quarantine')
    rows = [json.loads(o) for o in (tmp_path/'bad_rows.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [(r['line'], r['column']) for r in rows] == [(2, 2), (3, 12)] and rows[0]['text'].strip() == '{"query": 5}'
    assert len(ds) == 2 and any('bad rows left out: 2, see' in o for o in ds.notes)
    with pytest.raises(UserError, match='on_bad_row'): load_dataset(path, 'ignore')

def test_nothing_good_is_an_error_in_every_mode(tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_text('{"query": 5}\n', encoding='utf-8')
    for mode in ('error', 'skip', 'quarantine'):
        with pytest.raises(DataError, match='must be text'): load_dataset(path, mode)

def test_quarantine_that_cannot_be_written(tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_text(GOOD + '5\n', encoding='utf-8')
    with pytest.raises(OutputError, match='cannot write'): list(DataReader(path, 'quarantine', bad_rows=tmp_path/'no'/'such'/'folder.jsonl'))

@pytest.mark.parametrize('codec', ['cp950', 'big5', 'Big5', 'utf-16', 'utf-16-le', 'utf-8', 'UTF8', 'utf-8-sig'])
@pytest.mark.parametrize('array', [False, True])
def test_named_encoding(codec, array, tmp_path):
    path = tmp_path/'data.jsonl'
    text = f'[{GOOD},{SECOND}]' if array else GOOD + '\n' + SECOND
    path.write_bytes(text.encode(codec))
    ds = load_dataset(path, encoding=codec)
    assert [e.query for e in ds] == ['分析台積電的投資價值', '如何評估鴻海的財務狀況']
    path.write_text(GOOD + SECOND, encoding='utf-8')
    assert ds.hash == load_dataset(path).hash

@pytest.mark.parametrize('array', [False, True])
def test_wrong_or_unknown_encoding(array, tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_bytes((f'[{GOOD}]' if array else GOOD).encode('cp950'))
    with pytest.raises(DataError, match='look like Big5'): load_dataset(path)
    with pytest.raises(DataError, match='not ascii'): load_dataset(path, encoding='ascii')
    with pytest.raises(UserError, match='unknown encoding'): load_dataset(path, encoding='big6')
    with pytest.raises(UserError, match='unknown encoding'): load_dataset(path, encoding='base64')

def test_one_damaged_line_is_not_an_encoding(tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_bytes(GOOD.encode() + GOOD.encode('cp950') + SECOND.encode())
    with pytest.raises(DataError, match=':2:12 byte 0x.. is not UTF-8'): load_dataset(path)
    assert len(load_dataset(path, 'skip')) == 2

def test_utf16_without_a_mark(tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_bytes(GOOD.encode('utf-16-le'))
    with pytest.raises(DataError, match='look like UTF-16'): load_dataset(path)

@pytest.mark.parametrize('text,message', [
    ('[{"query": "本益比"}, {"query": "殖利', 'file ends too early'), ('[{"query": "本益比"},\n]', ':2:1 a comma too many|:1:'),
    ('[\n{"query": "本益比"}]\n{"query": "x"}', 'something follows the array'), ('[]', 'no rows'), ('[', 'file ends too early'),
    ('[\n{"query": "本益比"},\n{"query": 5}]', ':3:2 `query` must be text'), ('{\n"query": "本益比"', 'file ends too early'), ('{\n\n}', 'no `query`')])
def test_broken_arrays(text, message, tmp_path):
    path = tmp_path/'data.json'
    path.write_text(text, encoding='utf-8')
    with pytest.raises(DataError, match=message): load_dataset(path)

def test_bad_element_of_an_array_is_skipped(tmp_path):
    path = tmp_path/'data.json'
    path.write_text(f'[\n{GOOD},\n{{"query": oops}},\n{SECOND}]', encoding='utf-8')
    ds = load_dataset(path, 'skip')
    assert [e.source for e in ds] == ['data.json:2', 'data.json:5']

@given(st.lists(st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(), st.lists(st.text(max_size=3), max_size=2)), max_size=3), max_size=5),
    st.integers(1, 7), st.sampled_from([None, 1]))
@settings(max_examples=150, deadline=None)
def test_array_elements_equal_json(rows, size, indent):
    "Cutting an array in pieces of any size finds what `json.loads` finds"
    text = json.dumps(rows, ensure_ascii=False, indent=indent)
    found = list(array_elements([text[i:i+size] for i in range(0, len(text), size)]))
    assert [fault for *_,fault in found] == [None]*len(rows)
    assert [json.loads(o) for _,_,o,_ in found] == rows
    for line,column,piece,_ in found: assert text.split('\n')[line-1][column-1:].startswith(piece.split('\n')[0])

pieces = st.sampled_from([GOOD.encode(), SECOND.encode(), GOOD.encode('cp950'), b'[', b']', b'{', b'}', b',', b'"', b'\\', b'\n', b'\r', b'\x00', b'\xff\xfe', b'\xef\xbb\xbf',
    b'"query": ', b'"instruction": "a"', b'null', b'NaN', b'1e999', b'-', b'"history": [[', b'\\ud83d', '比'.encode(), b'9'*50])

@given(content=st.one_of(st.binary(max_size=200), st.lists(st.one_of(pieces, st.binary(max_size=4)), max_size=12).map(b''.join)),
    mode=st.sampled_from(['error', 'skip']), codec=st.sampled_from([None, None, None, 'cp950', 'utf-16', 'utf-7', 'gb18030']))
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_rows_or_a_message(content, mode, codec, tmp_path):
    path = tmp_path/'any.jsonl'
    path.write_bytes(content)
    try: ds = load_dataset(path, mode, codec)
    except UserError as e: assert len(str(e)) < 3000
    else: assert ds and all(e.query.strip() for e in ds)

@pytest.mark.parametrize('text', ['['*100_000, '{"query": ' + '['*100_000, '{"query": ' + '9'*5000 + '}', '{"a":'*50_000])
def test_hostile_rows(text, tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_text(text, encoding='utf-8')
    with pytest.raises(DataError): load_dataset(path)

def test_a_stream_holds_one_row_at_a_time(tmp_path):
    "20 000 rows go by in little memory, in both layouts"
    import tracemalloc
    row = dict(query='分析台積電的投資價值', context='台股', reference='毛利率' * 100)
    for name,text in (('a.jsonl', '\n'.join([json.dumps(row)]*20_000)), ('b.json', json.dumps([row]*20_000))):
        (tmp_path/name).write_text(text, encoding='utf-8')
        reader = DataReader(tmp_path/name)
        tracemalloc.start()
        n = sum(1 for _ in reader)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n == 20_000 and peak < 8e6 < len(text)

def test_excerpt_of_disc_finllm():
    ds = load_dataset(EXCERPT)
    rows = json.loads(EXCERPT.read_text(encoding='utf-8'))
    assert [e.query for e in ds] == [r['instruction'] + ('\n' + r['input'] if r['input'].strip() else '') for r in rows]
    assert [e.reference for e in ds] == [r['output'] for r in rows]
    assert [bool(e.context) for e in ds] == [bool(r['history']) for r in rows]
    assert ds[0].context.startswith('問：' + rows[0]['history'][0][0])
    assert any('mainly Simplified' in o for o in ds.notes) and any('rows with `history`: 6' in o for o in ds.notes)

def test_no_history_is_no_history():
    for empty in (None, [], ''): assert row_to_example(dict(query='本益比', history=empty))[0].context == ''
    for wrong in ('abc', [['only one']], [['a', 'b', 'c']], [5], {'a':1}):
        with pytest.raises(RowFault): row_to_example(dict(query='本益比', history=wrong))

def test_two_rows_are_enough(tmp_path, caplog):
    path = tmp_path/'我的 資料.jsonl'
    path.write_text(GOOD + SECOND, encoding='utf-8')
    train,held = split_examples(load_dataset(path))
    assert len(train) == 2 and not held

def test_split_is_exact_and_repeatable():
    examples = [Example(q) for q in dict.fromkeys(e.query for e in demo_examples())]
    train,held = split_examples(examples, .1, seed=3)
    assert (train, held) == split_examples(examples, .1, seed=3) != split_examples(examples, .1, seed=4)
    assert len(held) == round(len(examples)*.1) and not leaks(train, held) and train + held != examples
    assert split_examples(examples, 0) == (examples, [])
    assert split_examples([Example('本益比')]*30) == ([Example('本益比')]*30, [])

@given(st.lists(st.integers(0, 12), min_size=20, max_size=60), st.floats(.01, .9), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_split_never_leaks(queries, fraction, seed):
    examples = [Example(f'第{q}題', f'{i}') for i,q in enumerate(queries)]
    train,held = split_examples(examples, fraction, seed)
    assert train and Counter(e.context for e in train + held) == Counter(e.context for e in examples)
    assert not leaks(train, held)

# ---- the demo set

PROMISES = '保證 穩賺 必漲 必賺 不賠 零風險 無風險 一定賺 一定會漲 絕對 翻倍 躺著 百分之百'.split()
MAINLAND = '市盈率 市淨率 淨利潤 投資者 盈利 止損 倉位 同比 環比 通脹 加息 對沖 期權 板塊 回報率 定投 分紅 美聯儲 互聯網 芯片'.split()

def test_demo_questions():
    demo = demo_examples()
    for field in ('query', 'context', 'reference'): assert len({getattr(e, field) for e in demo}) == len(demo) >= 48
    assert {'分析台積電的投資價值', '如何評估鴻海的財務狀況'} <= {e.query for e in demo}
    assert {r['topic'] for r in demo_material()['questions']} == set(demo_material()['repertoire'])
    assert min(len(e.query) for e in demo) < 8

@pytest.mark.parametrize('example', demo_examples(), ids=[e.query for e in demo_examples()])
def test_demo_reference(example):
    "150-220 characters with figures, a named risk, advice with a reason, and a warning; Taiwan usage, nothing promised"
    text = example.reference
    assert 150 <= len(text) <= 220 and text.endswith('。')
    assert sum(c.isdigit() for c in text) >= 4 and '風險' in text and '建議' in text
    assert any(w in text for w in ('因為', '由於', '考量', '因此'))
    assert any(w in text for w in ('審慎評估', '過去', '不構成', '僅供參考', '量力而為', '詳閱', '承受度', '自行評估', '評估', '配息率'))
    assert not [w for w in PROMISES + MAINLAND if w in text]

def test_demo_file(tmp_path):
    for n in (1, 60, 100, 1000):
        ds = load_dataset(write_demo(tmp_path/'資料 夾'/f'{n}.jsonl', n, seed=1))
        assert len(ds) == n == len({(e.query, e.context) for e in ds})
        assert len({e.query for e in ds}) == min(n, len(demo_examples()))
    assert (tmp_path/'資料 夾'/'100.jsonl').read_bytes() == write_demo(tmp_path/'again.jsonl', 100, seed=1).read_bytes() != write_demo(tmp_path/'other.jsonl', 100, seed=2).read_bytes()
    with pytest.raises(UserError): write_demo(tmp_path/'none.jsonl', 0)
    with pytest.raises(OutputError): write_demo(tmp_path/'again.jsonl'/'below.jsonl', 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['again.jsonl', 'other.jsonl', '資料 夾']

def test_demo_answers_are_mixed_on_purpose():
    answers = demo_answers(3000, seed=5)
    assert answers == demo_answers(3000, seed=5) != demo_answers(3000, seed=6)
    kinds = Counter(kind for *_,kind in answers)
    assert .17 < kinds['promise']/3000 < .3 and set(kinds) == {'good', 'poor', 'promise'}
    lengths = [len(a) for _,a,_ in answers]
    assert max(lengths) <= 190 and '{' not in ''.join(a for _,a,_ in answers)

def test_demo_answers_start_poor_and_can_end_well():
    "A model that imitates them has a poor reward, promises often, and has what a good answer needs"
    import random
    from finrl_grpo.data import _fill
    from finrl_grpo.promises import find_promises
    from finrl_grpo.reward import FinancialRewardModel
    score, rng, shared = FinancialRewardModel().score, random.Random(0), demo_material()['shared']
    answers = demo_answers(600, seed=1)
    wrong = [answer for _,answer,kind in answers if bool(find_promises(answer)) != (kind == 'promise')]
    assert len(wrong) <= 6, wrong
    assert -.3 < mean(score(q, a).total for q,a,_ in answers) < .05
    best = []
    for subject in demo_material()['questions']:
        topic = demo_material()['repertoire'][subject['topic']]
        picks = [[rng.choice(o) for o in (topic['fact'], topic['risk'], topic['advice'], shared['warning'])] for _ in range(30)]
        best.append(max(score(subject['query'], ''.join(_fill(t, subject, rng) for t in p)).total for p in picks))
    assert sum(b >= .6 for b in best) >= .85*len(best) and mean(best) > .7

# ---- prompts

class Letters:
    "One token a character"
    chat_template, all_special_tokens = None, ['<eos>']
    def encode(self, text, add_special_tokens=True): return [ord(c) for c in text]

class Chat(Letters):
    "The same with a chat template"
    chat_template = 'yes'
    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **_): return f'<u>{messages[0]["content"]}<a>'

def decode(ids): return ''.join(map(chr, ids))

def test_prompt_of_a_chat_model():
    e = Example('好嗎？<eos>', '殖利率5%')
    assert render_prompt(Chat(), e, 'ignored {query}') == '<u>殖利率5%\n好嗎？< eos><a>'
    assert decode(encode_prompt(Chat(), Example('好嗎？', '殖利率5%'), max_length=9)) == '<u>好嗎？<a>'
    with pytest.raises(ConfigError): encode_prompt(Chat(), e, max_length=6)

def test_template_is_not_a_format_string():
    assert render_prompt(Letters(), Example('{0} {query}'), '{x} {query}') == '{x} {0} {query}'

# ---- commands

def test_commands(tmp_path, capsys):
    path, plain = tmp_path/'demo.jsonl', tmp_path/'plain.jsonl'
    demo_command(str(path), 25, 0)
    assert '25 rows' in capsys.readouterr().out
    data_command('check', str(path))
    assert 'hash' in capsys.readouterr().out
    data_command('stats', str(EXCERPT))
    assert json.loads(capsys.readouterr().out)['rows'] == 20
    data_command('convert', str(EXCERPT), output=str(plain))
    assert load_dataset(plain).hash == load_dataset(EXCERPT).hash
    with pytest.raises(DataError, match='also in'): data_command('check', str(plain), against=str(EXCERPT))
    with pytest.raises(UserError, match='--output'): data_command('convert', str(path))
    with pytest.raises(UserError, match='unknown action'): data_command('look', str(path))

def test_demo_never_replaces_your_own_file(tmp_path, capsys):
    path = tmp_path/'mine.jsonl'
    path.write_text(GOOD.replace('台積電', '我的公司'), encoding='utf-8')
    before = path.read_bytes()
    with pytest.raises(OutputError, match='not a demo file'): demo_command(str(path), 10)
    assert path.read_bytes() == before
    demo_command(str(path), 10, overwrite=True)
    demo_command(str(path), 20)
    assert len(load_dataset(path)) == 20

def test_stats_of_a_stream_equal_those_of_a_list(tmp_path):
    from finrl_grpo.data import dataset_stats
    from statistics import median_low
    rows = load_dataset(EXCERPT)
    found = dataset_stats(DataReader(EXCERPT))
    assert found == dataset_stats(rows) and found['hash'] == rows.hash
    assert found['query']['median'] == median_low([len(e.query) for e in rows]) and found['questions'] == len({question_key(e.query) for e in rows})

def test_check_and_stats_hold_one_row_at_a_time(tmp_path, capsys):
    import tracemalloc
    path = tmp_path/'long.jsonl'
    with open(path, 'w', encoding='utf-8') as f:
        for i in range(4000): f.write(json.dumps(dict(query=f'第{i%50}題？', reference='毛利率'*300))+'\n')
    for action in ('check', 'stats'):
        tracemalloc.start()
        data_command(action, str(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6e6 < path.stat().st_size

def test_convert_writes_nothing_from_a_bad_file(tmp_path):
    path, out = tmp_path/'data.jsonl', tmp_path/'out.jsonl'
    path.write_text(GOOD + '5\n', encoding='utf-8')
    with pytest.raises(DataError): data_command('convert', str(path), output=str(out))
    assert [p.name for p in tmp_path.iterdir()] == ['data.jsonl']
    data_command('convert', str(path), output=str(out), on_bad_row='skip')
    assert len(load_dataset(out)) == 1

def test_convert_onto_itself(tmp_path):
    path = tmp_path/'data.jsonl'
    path.write_bytes((GOOD + SECOND).encode('cp950'))
    data_command('convert', str(path), output=str(path), encoding='cp950')
    assert len(load_dataset(path)) == 2

def test_light_import():
    import subprocess
    code = "import sys, finrl_grpo.data; bad = [m for m in ('torch', 'transformers', 'datasets', 'numpy', 'matplotlib') if m in sys.modules]; sys.exit(', '.join(bad) or 0)"
    assert not subprocess.run([sys.executable, '-c', code]).returncode
