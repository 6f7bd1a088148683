"""The recorded quickstart that the README and two pages quote: whole, of one run, and made from what the quickstart prints."""
import sys
from pathlib import Path
from finrl_grpo.quickstart import show_answers
from finrl_grpo.evaluate import Evaluation, compare, measure
from finrl_grpo.reward import FinancialRewardModel
from finrl_grpo.text import asset

sys.path.insert(0, str(Path(__file__).parent.parent/'tools'))
from record_quickstart import answers_in

def test_the_recording_is_whole():
    r = asset('quickstart_run.json')
    assert len(r['steps']) == r['settings']['max_steps'] == r['steps'][-1]['step']
    assert r['settings']['answers'] == r['settings']['prompts_per_step']*r['settings']['generations']
    assert {'reward', 'promises', 'repetition', 'relevance'} <= set(r['before']) & set(r['after'])
    for line in compare(Evaluation()).splitlines()[2:]: assert line.split('|')[1] in r['table']
    assert r['answers'] and all(o['query'] and o['before'] and o['after'] for o in r['answers'])
    assert '20' in r['machine'] and r['seconds'] > 0

def test_answers_are_read_back_as_they_were_printed():
    reward = FinancialRewardModel()
    def answered(text): return Evaluation([measure(q, text, reward.score(q, text)) for q in ('定存好嗎？', '0050好嗎？')])
    before, after = answered('保證獲利，快買！'), answered('利率約1.7%，可以先留半年生活費，再考慮其他投資。')
    found = answers_in(f'1/4 the model\n\n{show_answers(before, after)}\n| measure | before |')
    assert [o['query'] for o in found] == ['定存好嗎？', '0050好嗎？']
    assert [o['before'] for o in found] == ['保證獲利，快買！']*2 and found[0]['after'] == after.rows[0]['answer']
    assert abs(found[0]['before_reward'] - before.rows[0]['reward']) < .006
