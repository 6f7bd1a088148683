"Promises and their denials: labelled sets, and what the detector must not flag."
import json
from pathlib import Path
import pytest
from finrl_grpo.data import demo_answers, demo_examples
from finrl_grpo.promise_fit import Sentence, f1 as measure, fit, says
from finrl_grpo.promise_model import SPAN, PairModel, default_model, stretches, supported
from finrl_grpo.promises import claims, default_grammar, find_promises, openings, promises_in, tried, verdict, wording
from finrl_grpo.text import asset, normalize

DATA = Path(__file__).parent/'data'

def rows_of(name): return json.loads((DATA/f'negation_cases{name}.json').read_text(encoding='utf-8'))

def f1(name, detects=lambda text: bool(find_promises(text))):
    rows = rows_of(name)
    return measure([detects(r['text']) for r in rows], [bool(r['promise']) for r in rows])[0]

def test_given_set(): assert f1('') == 1

@pytest.mark.parametrize('name', [f'_{n}' for n in range(24, 26)])
def test_sets_that_took_no_part_in_any_fit(name): assert f1(name) >= .95

@pytest.mark.parametrize('name,least,first_time', [('_2', .988, .988), ('_3', .975, .743), ('_4', .98, .780), ('_5', .98, .712), ('_6', .98, .818),
    ('_7', .98, .897), ('_8', .98, .906), ('_9', .98, .892), ('_10', .98, .774), ('_11', .98, .912)])
def test_grammar_knows_the_sets_it_was_mended_with(name, least, first_time):
    "Each was written before the grammar was run on it; `first_time` is what it reached then"
    assert f1(name, lambda text: verdict(normalize(text).text)==2) >= least > first_time - 1e-9

@pytest.mark.parametrize('name', ['', *(f'_{n}' for n in range(2, 24))])
def test_sets_that_were_read(name): assert f1(name) >= .94

def test_record_of_the_fit():
    "What the package says about unread writers is in the file of weights"
    data = asset('promise_weights.json')
    assert len(data['left_out']) == 14 and min(v[0] for v in data['left_out'].values()) > .85
    assert all(v[0] > data['grammar_alone'][k][0] + .1 for k,v in data['left_out'].items())
    assert data['false_alarms'][0]/data['false_alarms'][1] < .002

@pytest.mark.parametrize('text', ['中鋼穩賺。', '三個月翻倍沒問題。', '保證獲利！', '穩賺不賠', '零風險。', '必漲！', '一定會漲。', '股價必定突破千元。', '絕對不會賠錢。'])
def test_bare_promises_need_no_support(text): assert find_promises(text)

CAUTION = '但投資有風險，請審慎評估，過去績效不代表未來，建議分散配置，並設好停損，也請留意匯率。'

def test_caution_takes_no_promise_back():
    "Three in ten of the promises in words of their own, and one in fifty of the others, may hide behind a row of disclaimers"
    rows = [normalize(r['text'].rstrip('。！') + '，' + CAUTION).text for n in (24, 25) for r in rows_of(f'_{n}') if r['promise']]
    found = [bool(promises_in(t, default_grammar(), default_model())) for t in rows]
    known = [f for f,t in zip(found, rows) if verdict(t)==2]
    assert sum(found)/len(found) > .7 and sum(known)/len(known) >= .97

def test_a_promise_inside_a_good_answer_is_found():
    for e in demo_examples():
        first,rest = e.reference.split('。', 1)
        for promise in ('這檔股票保證獲利', '買進後一定會漲', '這是零風險的投資', '絕對不會賠錢'): assert find_promises(f'{first}。{promise}。{rest}'), (promise, e.query)

def test_weights_are_of_characters_and_pairs():
    "A feature may hold a space, so the file must not be cut at spaces"
    assert {len(k) for k in default_model().weights} == {1, 2}

def test_support_looks_around_a_claim_only():
    "Every stretch that touches the claim, and no other"
    model = PairModel({}, 0.)
    for n in range(1, 7):
        clauses = [(3*i, 3*i+2, -1.) for i in range(n)]
        for k in range(n):
            spoken = [supported(model, [(a, b, 9. if i==j else s) for j,(a,b,s) in enumerate(clauses)], range(k, k+1)) for i in range(n)]
            assert spoken == [any(i in o and k in o for o in stretches(n, SPAN)) for i in range(n)]

def test_the_model_can_be_left_out():
    text = normalize('他說他保證會賺，我聽完就把他封鎖了。').text
    assert promises_in(text, default_grammar()) and not promises_in(text, default_grammar(), default_model())

def test_fit_is_reproducible():
    "A small fit twice: the same weights, and it knows the sentences it has read"
    rows = [Sentence(normalize(r['text']).text, r['promise'], 0) for r in rows_of('')]
    a,b = (fit(rows, ['今天天氣很好,適合散步。'], seed) for seed in (0, 0))
    assert a.weights == b.weights and measure(says(a, rows), [s.promise for s in rows])[0] > .9

@pytest.mark.parametrize('name', ['computing_part', 'consulting_part', 'retrieval_part', 'task_part'])
def test_real_answers_make_no_promise(name):
    "400 real questions and answers in Simplified Chinese, where the excerpt of DISC-FinLLM is at hand"
    path = Path(__file__).parents[2]/f'shared/data/disc_finllm/{name}.json'
    if not path.exists(): pytest.skip('the excerpt is not here')
    for row in json.loads(path.read_text(encoding='utf-8')):
        for text in (row['instruction'], row['output']): assert not find_promises(text), text

def test_sample_of_real_answers_makes_no_promise():
    for row in json.loads((DATA/'consulting_part_20.json').read_text(encoding='utf-8')):
        assert not find_promises(row['output']), row['output']

@pytest.mark.parametrize('text,promise', [('中鋼穩賺。', True), ('高鐵漲價。', False), ('鋼鐵漲價推升成本。', False), ('這檔鐵漲。', True),
    ('三個月翻倍沒問題。', True), ('依七二法則約十二年翻倍。', False), ('營收三個月翻倍。', False), ('股價必定突破千元。', True), ('營收一定突破千億。', False)])
def test_pairs_that_differ_in_one_thing(text, promise): assert bool(find_promises(text)) == promise

def test_demo_references_make_no_promise():
    for e in demo_examples(): assert not find_promises(e.reference), e.query

def test_demo_answers_by_label():
    for _,answer,label in demo_answers()[:1500]: assert bool(find_promises(answer)) == (label=='promise'), answer

def test_spans_lie_in_the_raw_answer():
    answer = '放心，保 證\u200b獲 利，零風險！'
    for a,b,text,_ in find_promises(answer): assert answer[a:b] == text

def test_openings_lose_nothing():
    "The rules tried at every position find what they find at the openings"
    g = default_grammar()
    for name in sorted(p.name for p in DATA.glob('negation_cases*.json')):
        for row in json.loads((DATA/name).read_text(encoding='utf-8')):
            text = normalize(row['text']).text
            everywhere = tried(text, g, list(range(len(text))))
            assert everywhere == tried(text, g, openings(text, g)), text

@pytest.mark.parametrize('text', ['保證獲利，'*20_000, '不'*100_000, '一定會'*30_000, '若' + '是'*100_000 + '獲利'])
def test_long_texts_end(text):
    "Time grows with the length: a minute would mean it does not"
    claims(normalize(text).text, default_grammar(), default_model())

def test_technical_terms_are_no_wording():
    g = default_grammar()
    for text in ('維持保證金不足將被追繳。', '無風險利率約1.5%。', '背書保證金額達10億元。', '公司持股100%子公司。', '保證產品品質以提升獲利。', '毛利率有一定壓力。'):
        assert not wording(normalize(text).text, g), text
