"Promises and their denials: labelled sets, and what the detector must not flag."
import json
from pathlib import Path
import pytest
from finrl_grpo.data import demo_answers, demo_examples
from finrl_grpo.promises import claims, default_grammar, find_promises, openings, tried, wording
from finrl_grpo.text import normalize

DATA = Path(__file__).parent/'data'

def f1(name):
    rows = json.loads((DATA/name).read_text(encoding='utf-8'))
    found = [(bool(find_promises(r['text'])), bool(r['promise'])) for r in rows]
    both = sum(p and y for p,y in found)
    return 2*both/(sum(p for p,_ in found) + sum(y for _,y in found))

def test_given_set(): assert f1('negation_cases.json') == 1

@pytest.mark.parametrize('name,least,first_time', [('negation_cases_2.json', .988, .988), ('negation_cases_3.json', .975, .743),
    ('negation_cases_4.json', .98, .780), ('negation_cases_5.json', .98, .712), ('negation_cases_6.json', .98, .818), ('negation_cases_7.json', .98, .897),
    ('negation_cases_8.json', .98, .906), ('negation_cases_9.json', .98, .892), ('negation_cases_10.json', .98, .774),
    ('negation_cases_11.json', .98, .912)])
def test_fresh_sets(name, least, first_time):
    "Each was written before the detector was run on it; `first_time` is what it reached then, before it was mended"
    assert f1(name) >= least > first_time - 1e-9

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
    claims(normalize(text).text, default_grammar())

def test_technical_terms_are_no_wording():
    g = default_grammar()
    for text in ('維持保證金不足將被追繳。', '無風險利率約1.5%。', '背書保證金額達10億元。', '公司持股100%子公司。', '保證產品品質以提升獲利。', '毛利率有一定壓力。'):
        assert not wording(normalize(text).text, g), text
