"Hill climbing over phrases: what a search without grammar can reach."
import random
import pytest
from finrl_grpo.reward import FinancialRewardModel

QUERY = '分析台積電的投資價值'
GLUE = ['，', '。', '、', '；']*40 + ['15%', '20倍', '3億元']*10
PADDING = '的 是 了 在 和 與 對 從 這 那 我 你 他 很 更 又 不 有 要 到 說 去 看 上 下 著 給 把 被 讓 比 而 且 其 此 各 每 某 只 才'.split()

def climb(score, pool, steps=1500, start=30, longest=60, seed=0):
    "Change, insert, drop or swap phrases; keep what does not lower the score"
    rng = random.Random(seed)
    now = [rng.choice(pool) for _ in range(start)]
    best = score(''.join(now))
    for _ in range(steps):
        new, i, kind = list(now), rng.randrange(len(now)), rng.random()
        if kind < .4: new[i] = rng.choice(pool)
        elif kind < .65 and len(new) < longest: new.insert(i, rng.choice(pool))
        elif kind < .8 and len(new) > 3: del new[i]
        else:
            j = rng.randrange(len(new))
            new[i],new[j] = new[j],new[i]
        s = score(''.join(new))
        if s >= best: now,best = new,s
    return best, ''.join(now)

@pytest.fixture(scope='module')
def model(): return FinancialRewardModel()

def pools(model):
    groups = model.tools.lexicon
    words = sorted({w for name in groups.groups for w in groups.parts(name)})
    harmless = sorted({w for name in groups.groups if not name.startswith(('promise', 'hype', 'mainland', 'boiler')) for w in groups.parts(name)})
    return dict(every_word=words + GLUE, harmless=harmless + GLUE, padded=harmless + GLUE + PADDING*20,
        with_commas=[w + '，' for w in harmless] + [w + '。' for w in harmless] + GLUE)

@pytest.mark.parametrize('pool', ['every_word', 'harmless', 'padded', 'with_commas'])
@pytest.mark.parametrize('seed', [0, 1])
def test_phrases_without_grammar_stay_low(model, pool, seed):
    best,text = climb(lambda s: model.score(QUERY, s).total, pools(model)[pool], seed=seed)
    assert best < .35, text

@pytest.mark.parametrize('pool', ['harmless', 'padded'])
@pytest.mark.parametrize('seed', [0, 1])
def test_short_lists_stay_low_too(model, pool, seed):
    "Short answers are forgiven a lack of loose words; a short list must not profit from it"
    best,text = climb(lambda s: model.score(QUERY, s).total, pools(model)[pool], steps=1000, start=8, longest=18, seed=seed)
    assert best < .35, text

def test_a_good_answer_as_the_start_of_the_climb_does_not_rise_far(model):
    "Words added to a good answer: nothing to gain but what they say"
    good = model_answer()
    before = model.score(QUERY, good).total
    pool = pools(model)['harmless']
    best = max(model.score(QUERY, good + random.Random(i).choice(pool)*3).total for i in range(200))
    assert best <= before + .03

def model_answer():
    from finrl_grpo.data import demo_examples
    return next(e.reference for e in demo_examples() if e.query==QUERY)
