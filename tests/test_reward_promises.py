"Promises and their denials: three labelled sets, and what the detector must not flag."
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

def test_second_set():
    "Written before the detector was run on it: F1 was 0.988 the first time"
    assert f1('negation_cases_2.json') >= .988

def test_third_set():
    "Written after, in two halves, in other people's manner: 0.743 and 0.927 the first time"
    assert f1('negation_cases_3.json') >= .975

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
    for name in ('negation_cases.json', 'negation_cases_2.json', 'negation_cases_3.json'):
        for row in json.loads((DATA/name).read_text(encoding='utf-8')):
            text = normalize(row['text']).text
            everywhere = tried(text, g, list(range(len(text))))
            assert [m.span() for m in everywhere] == [m.span() for m in tried(text, g, openings(text, g))], text

@pytest.mark.parametrize('text', ['保證獲利，'*20_000, '不'*100_000, '一定會'*30_000, '若' + '是'*100_000 + '獲利'])
def test_long_texts_end(text):
    "Time grows with the length: a minute would mean it does not"
    claims(normalize(text).text, default_grammar())

def test_technical_terms_are_no_wording():
    g = default_grammar()
    for text in ('維持保證金不足將被追繳。', '無風險利率約1.5%。', '背書保證金額達10億元。', '公司持股100%子公司。', '保證產品品質以提升獲利。', '毛利率有一定壓力。'):
        assert not wording(normalize(text).text, g), text
