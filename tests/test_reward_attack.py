"Hill climbing over phrases: what a search without grammar can reach."
import random
import pytest
from finrl_grpo.reward import FinancialRewardModel

QUERY = '分析台積電的投資價值'
GLUE = ['，', '。', '、', '；']*40 + ['15%', '20倍', '3億元']*10
PADDING = '的 是 了 在 和 與 對 從 這 那 我 你 他 很 更 又 不 有 要 到 說 去 看 上 下 著 給 把 被 讓 比 而 且 其 此 各 每 某 只 才'.split()

def climb(score, pool, steps=1500, start=30, longest=60, seed=0):
    "From phrases drawn at random"
    rng = random.Random(seed)
    best,now = climb_from(score, pool, [rng.choice(pool) for _ in range(start)], steps, longest, rng)
    return best, ''.join(now)

def climb_from(score, pool, now, steps, longest, rng):
    "Change, insert, drop or swap phrases; keep what does not lower the score"
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
    return best, now

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
    assert best < .3, text

@pytest.mark.parametrize('pool', ['harmless', 'padded'])
@pytest.mark.parametrize('seed', [0, 1])
def test_short_lists_stay_low_too(model, pool, seed):
    "Short answers are forgiven a lack of loose words; a short list must not profit from it"
    best,text = climb(lambda s: model.score(QUERY, s).total, pools(model)[pool], steps=1000, start=8, longest=18, seed=seed)
    assert best < .35, text

@pytest.mark.parametrize('pool', ['padded', 'every_word'])
@pytest.mark.parametrize('seed', [0, 1])
def test_a_head_start_does_not_help(model, pool, seed, monkeypatch):
    "A search that first climbs without the gate on prose, and so past its plateau, ends low as well"
    rng,pool = random.Random(seed),pools(model)[pool]
    start = [rng.choice(pool) for _ in range(30)]
    with monkeypatch.context() as m:
        m.setattr('finrl_grpo.reward.prose_gate', lambda r: 1.)
        free,start = climb_from(lambda s: model.score(QUERY, s).total, pool, start, 1500, 60, rng)
    best,text = climb_from(lambda s: model.score(QUERY, s).total, pool, start, 2000, 60, rng)
    assert free > .5 and best < .3, ''.join(text)

CUT_PHRASES = ['食安季增我保證收入質量下那非常見手法和隱憂他，又通膨共同基金從不構成買賣建議不僅研發費用定期不定額賣出15%換股；自行承擔20倍考量中期，才若想下市場上沒有研發、單一個股上限15%說20倍的槓杆風險到資產配置。季線分兩次基於不該投入只和抱牢且才產品組合而盡管如此；',
    '不宜單押100%賺各多重資產基金；逾放15%alpha此受限於各ipo低相關6個月、15%分批買進此外而考量到讓自行承擔風險盡管比削價競爭。可能損失本金ai分散投資期限的財報地雷很，對方怎麼說tsmc景氣反轉指數才roic給半導體循環不著是熱錢定期定額把偏向從pharmaessentia此不要把雞蛋放在同一個籃子倘若。風控更爆量kd值得一提的是',
    '每季分批進場詳閱公開說明書虧審慎投資風險管理不可因為20倍再平衡給從評價面來看、tsm綜合以上，合理價值不要再猶豫15%晶圓代工也評價；提前贖回風險有任何涉及由本金支出的部份,可能導致原始投資金額減損',
    '，關稅把每年檢視15%對看避免過度集中我2330內在價值3億元有賺有賠保留現金從不要投入更有機會成本的倒閉說20倍私募。']

@pytest.mark.parametrize('text', CUT_PHRASES)
def test_phrases_that_cut_each_other_leave_no_language(model, text):
    "Found by longer climbs, they scored .73 to .89 as long as only the first of two overlapping words was taken out"
    assert max(model.score(q, text).total for q in (QUERY, '0050適合新手定期定額嗎？')) < .2

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
