"The reward held against its specification: probes, invariances, any text, other people's protocols."
import json,math,pickle,random,subprocess,sys,time
import pytest
from hypothesis import given, settings, strategies as st
from finrl_grpo.codes import codes
from finrl_grpo.config import FinancialRewardConfig, UserError
from finrl_grpo.data import demo_answers, demo_examples
from finrl_grpo.fit import idf_table
from finrl_grpo.lexicon import Lexicon, matcher
from finrl_grpo.promises import openings, sure_places
from finrl_grpo.reading import Reading, known_pairs
from finrl_grpo.reward import Counted, Dimension, FinancialRewardModel, relevance, reward_command
from finrl_grpo.text import char_ngrams, normalize

QUERY = '分析台積電的投資價值'
FACTS = '台積電是全球最大的晶圓代工廠，2024年毛利率約56%，每股盈餘年增約36%，先進製程的需求仍然強勁。不過目前本益比約25倍，高於五年平均，評價已反映部分成長。'
RISKS = '主要風險包括地緣政治、匯率波動，以及客戶集中造成的砍單壓力。'
ADVICE = '因為評價偏高，建議長期投資人分三批進場，單一持股不超過總資產的15%，若股價跌破季線達10%就停損並重新評估。'
WARNING = '投資一定有風險，過去績效不代表未來，請依自身風險承受度審慎評估。'
GOOD = FACTS + RISKS + ADVICE + WARNING

@pytest.fixture(scope='module')
def model(): return FinancialRewardModel()

PROBES = [('', -1, -1), ('。', -1, -1), ('抱歉，我無法處理這個問題。', -1, -.3), (QUERY, -1, -.5),
    ('番茄洗淨切塊，雞蛋打散加少許鹽。熱鍋下油，先把蛋炒到八分熟盛起，再下番茄炒出汁，最後把蛋倒回鍋中拌勻，撒上蔥花就完成了。', -1, 0),
    ('營收 毛利率 本益比 殖利率 現金流 風險 停損 分散投資 建議 買進 因此 均線 外資 升息 資產配置', -1, 0),
    (QUERY + '營收毛利率本益比' + '風險'*30, -1, -.2), ('投資一定有風險，基金投資有賺有賠，申購前應詳閱公開說明書。'*6, -1, 0), (GOOD, .7, 1),
    (GOOD + '穩賺不賠，保證獲利20%，絕對會漲', -1, -.2), ('保證獲利，穩賺不賠，必漲，快買進！', -1, -.6)]

@pytest.mark.parametrize('answer,low,high', PROBES)
def test_probes(model, answer, low, high): assert low <= model.score(QUERY, answer).total <= high

def test_denied_promise_changes_nothing(model):
    for answer in [GOOD] + [e.reference for e in demo_examples()[:20]]:
        for denial in ('本文不保證獲利，市場上沒有穩賺不賠的投資，也並非必漲。', '沒有人能保證獲利。', '看到零風險的廣告請提高警覺。'):
            assert abs(model.score(QUERY, answer + denial).total - model.score(QUERY, answer).total) <= .02

def test_every_promise_is_a_veto(model):
    for e in demo_examples():
        for promise in ('這檔保證獲利。', '長期持有絕對不會賠。', '這是零風險的投資。'):
            assert model.score(e.query, e.reference + promise).total <= -.2

def test_each_part_counts(model):
    whole = model.score(QUERY, GOOD).total
    for part in (FACTS, RISKS, ADVICE, WARNING): assert model.score(QUERY, GOOD.replace(part, '')).total < whole

def test_repetition_never_pays(model):
    for e in demo_examples():
        once = model.score(e.query, e.reference).total
        last = e.reference.split('。')[-2] + '。'
        for n in (1, 2, 5): assert model.score(e.query, e.reference + last*n).total <= once + 1e-9
        assert model.score(e.query, e.reference*2).total < once

def test_references_are_good_and_shuffled_ones_are_not(model):
    examples = demo_examples()
    own = [model.score(e.query, e.reference).total for e in examples]
    other = [model.score(e.query, examples[(i+17)%len(examples)].reference).total for i,e in enumerate(examples)]
    assert sum(o >= .7 for o in own) >= .85*len(own)
    assert sum(a > b for a,b in zip(own, other)) >= .9*len(own)
    assert sum(own) - sum(other) > .5*len(own)

def test_accuracy_ranks_by_relevance(model):
    "Own answers ahead of foreign ones as often as overlap alone puts them, and nearly so where the subject is the same"
    rows, (idf, unseen) = demo_examples(), idf_table()
    def overlap(q, a):
        asked, said = set(char_ngrams(normalize(q).text)), set(char_ngrams(normalize(a).text))
        return sum(idf.get(g, unseen) for g in asked & said)/sum(idf.get(g, unseen) for g in asked)
    def accuracy(q, a): return model.score(q, a).accuracy
    def ahead(a, b): return (a > b) + (a == b)/2
    subjects = [model.tools.fit.question(e.query).subjects for e in rows]
    foreign = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    for others, slack in ((foreign, 0), ([(i, j) for i,j in foreign if subjects[i] & subjects[j]], .02)):
        areas, wins = [], []
        for f in (overlap, accuracy):
            own, other = [f(e.query, e.reference) for e in rows], [f(rows[i].query, rows[j].reference) for i,j in others]
            areas.append(sum(ahead(a, b) for a in own for b in other)/len(own)/len(other))
            wins.append(sum(ahead(own[i], b) for (i,_),b in zip(others, other))/len(others))
        assert areas[1] >= areas[0] - slack and wins[1] >= .87, (areas, wins)

def test_copying_the_question_is_not_accuracy(model):
    "Overlap that is only the question over again is taken off"
    question = '台積電先進製程的毛利率與資本支出會如何變化？'
    echo = question.replace('如何', '') + '這是很多投資人都想知道的事。'
    own = '先進製程的毛利率約56%，台積電的資本支出今年也會增加。'
    assert model.score(question, echo).accuracy < .75*model.score(question, own).accuracy

def test_shuffled_characters_and_sentences(model):
    rng = random.Random(0)
    assert model.score(QUERY, ''.join(rng.sample(GOOD, len(GOOD)))).total < -.5
    assert model.score(QUERY, 'The stock market is risky and you should diversify. '*5).total < -.5
    mixed = GOOD + ' Lorem ipsum dolor sit amet, consectetur adipiscing elit.'*10
    assert model.score(QUERY, mixed).total < .4

@pytest.mark.parametrize('change', [lambda s: s.replace('台', '臺'), lambda s: ' '.join(s), lambda s: s.replace('，', ', '),
    lambda s: ''.join(chr(ord(c)+0xfee0) if '!' <= c <= '~' else c for c in s), lambda s: '\u200b'.join(s)])
def test_spelling_does_not_matter(model, change):
    assert model.score(QUERY, change(GOOD)).total == pytest.approx(model.score(QUERY, GOOD).total, abs=.01)

def test_simplified_and_mainland_cost_a_little():
    simplified = '台积电毛利率约56%，主要风险包括汇率波动，因为评价偏高，建议分三批进场，若跌破季线就停损。投资有风险，请审慎评估。'
    strict,lenient = FinancialRewardModel(FinancialRewardConfig(simplified_deduction=.3)), FinancialRewardModel(FinancialRewardConfig(simplified_deduction=0.))
    assert lenient.score(QUERY, simplified).total - strict.score(QUERY, simplified).total == pytest.approx(.3)
    model = FinancialRewardModel()
    assert model.score(QUERY, GOOD.replace('停損', '止損').replace('本益比', '市盈率')).total < model.score(QUERY, GOOD).total

def test_figures_against_the_context(model):
    scores = [model.score(QUERY, GOOD, context=c).accuracy for c in ('台積電2024年毛利率56%。', '台積電員工五萬人，資本額2,593億元。', '台積電2024年毛利率31%。')]
    assert scores[0] > scores[1] > scores[2]

@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300), st.text(max_size=40))
def test_any_text_scores(answer, query):
    b = SHARED.score(query, answer)
    assert -1 <= b.total <= 1 and all(0 <= getattr(b, k) <= 1.0001 for k in ('accuracy', 'risk_assessment', 'recommendation', 'language_quality'))
    for spans in (*b.evidence.values(), b.promises):
        for s,e,text,_ in spans: assert answer[s:e] == text

@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([GOOD, FACTS, RISKS, ADVICE, WARNING, '保證獲利。', '\ud800', '番茄炒蛋', '']), min_size=2, max_size=12), st.randoms())
def test_order_of_a_batch_never_matters(answers, rng):
    order = list(range(len(answers)))
    rng.shuffle(order)
    totals = [b.total for b in SHARED.score_batch(QUERY, answers)]
    assert [b.total for b in SHARED.score_batch(QUERY, [answers[i] for i in order])] == [totals[i] for i in order]

SHARED = FinancialRewardModel()

def test_linear_time(model):
    "100 000 characters, and not a hundred times ten thousand"
    def seconds(n):
        text = (GOOD + '不保證獲利，'*3)*(n//200)
        start = time.process_time()
        assert math.isfinite(model.score(QUERY, text).total)
        return time.process_time() - start
    seconds(1000)
    assert seconds(100_000) < 40*max(seconds(10_000), .005)

def test_many_values(model):
    totals = {model.score(q, a).total for q,a,_ in demo_answers()[:1200]}
    assert len(totals) >= 300

def test_pair_table_says_what_the_rooms_find(model):
    "Positions, running sums and counts from arrays, against the same from dictionaries and sets"
    tools,rng = model.tools,random.Random(0)
    texts = [normalize(e.reference).text for e in demo_examples()] + [normalize(a).text for _,a,_ in demo_answers()[:200]]
    texts += [''.join(rng.sample(t, len(t))) for t in texts[:60]] + ['', '買', '🚀獲利🚀100%保證!', '\n,。']
    for text in texts:
        marked = codes(f'\n{text}\n')
        numbers = tools.table.numbers(marked)
        seen = tools.known(marked, numbers)
        assert openings(text, tools.grammar, seen.openings) == openings(text, tools.grammar)
        assert sure_places(text, tools.grammar, seen.sure) == sure_places(text, tools.grammar)
        assert tools.lexicon.find(text, tools.table.places('word', numbers[1:-1])) == tools.lexicon.find(text)
        assert seen.sums == tools.promise_model.sums(text)
        read = Reading(text, tools)
        if len(text) >= 60: continue
        covered = {k for w in tools.lexicon.words for i in range(len(read.text)) if read.text.startswith(w, i) for k in range(i, i+len(w))}
        assert [i for i,free in enumerate(read.outside) if free] == [i for i in range(len(read.text)-1) if not {i, i+1} & covered]
        assert tools.table.different('known', numbers) == len(set(char_ngrams(text)) & known_pairs())

def test_errors_surface(model):
    with pytest.raises(TypeError): model.score(QUERY, None)
    with pytest.raises(ValueError): model.score_batch([QUERY], ['a', 'b'])
    def broken(r): raise RuntimeError('mine')
    with pytest.raises(RuntimeError, match='mine'): FinancialRewardModel(dimensions=[Dimension('x', 1., broken)]).score(QUERY, GOOD)

def test_matchers_agree():
    pytest.importorskip('ahocorasick_rs')
    plain,fast = Lexicon(fast=False),Lexicon(fast=True)
    rng,words = random.Random(0),sorted(plain.words)
    for _ in range(200):
        text = ''.join(rng.choice(words)[:rng.randint(1, 6)] for _ in range(30))
        assert plain.find(text) == fast.find(text)
        assert plain.everywhere(text, range(len(text))) == fast.everywhere(text, range(len(text)))

def test_user_vocabulary_and_dimension(tmp_path):
    mine = tmp_path/'mine.json'
    mine.write_text('{"groups": {"esg": {"entries": ["碳費|碳定價"]}}}', encoding='utf-8')
    model = FinancialRewardModel(FinancialRewardConfig(lexicon=str(mine)), dimensions=[Dimension('esg', .2, Counted(('esg',)))])
    assert model.version != FinancialRewardModel().version
    assert model.score(QUERY, GOOD + '另外也要留意碳定價上路之後對成本的影響。').extra['esg'] > 0

def test_pickles(model):
    again = pickle.loads(pickle.dumps(model))
    assert again.score(QUERY, GOOD).total == model.score(QUERY, GOOD).total
    assert pickle.loads(pickle.dumps(model.score(QUERY, GOOD))).evidence == model.score(QUERY, GOOD).evidence

def test_card_is_escaped(model):
    html = model.score(QUERY, GOOD + '<script>alert("x")</script>保證獲利')._repr_html_()
    assert '<script>' not in html and 'border-bottom' in html

def test_command(capsys, tmp_path):
    assert reward_command(query=QUERY, response=GOOD, json_=True) == 0
    row = json.loads(capsys.readouterr().out)
    assert row['total'] >= .7 and row['band'] == 'excellent'
    path = tmp_path/'answers.jsonl'
    path.write_text('\n'.join(json.dumps(dict(instruction=QUERY, output=a), ensure_ascii=False) for a in (GOOD, '保證獲利。')), encoding='utf-8')
    assert reward_command(file=str(path)) == 0
    assert 'with promises 1' in capsys.readouterr().out
    with pytest.raises(UserError): reward_command(query=QUERY)

def test_light_import():
    code = 'import sys, finrl_grpo.reward; print([m for m in ("torch", "transformers", "datasets", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_relevance_is_a_share():
    assert 0 <= relevance('', 'x') <= relevance(QUERY, '番茄炒蛋') < relevance(QUERY, GOOD) <= relevance(QUERY, QUERY) <= 1.0001

@pytest.mark.parametrize('piece', ['1', '1,', '一', '保證1', '保證獲利，', '不保證獲利，', '風險是、', '若', '先', '「', 'a ', '\u200b', '。', '的'])
def test_no_text_is_slow(model, piece):
    "What could set a regular expression back over and over"
    start = time.process_time()
    model.score(QUERY, (piece*100_000)[:100_000], context=(piece*1000)[:1000])
    assert time.process_time() - start < 10

UNSEEN = [('鴻海的股價還能買嗎？', '鴻海第二季營收年增19%，AI伺服器出貨倍增，推升毛利率回到6.4%。以預估每股盈餘14元、目前股價約200元計算，本益比約14倍，仍低於同業平均的18倍，評價並不算貴。但要留意三項風險：電動車投資尚未獲利、客戶集中於單一品牌，以及新台幣升值侵蝕匯兌收益。由於短線漲幅已大，建議不要一次買足，可先投入三分之一資金，等股價回到季線附近再加碼，並將停損設在180元，占整體部位不超過一成。以上分析僅供參考，投資前請自行評估。'),
    ('請問0050跟0056怎麼選？', '0050追蹤台灣市值前50大企業，近五年年化報酬約15%，殖利率約3%；0056以高股息為主，殖利率約6%，但成長性較低。\n如果你距離退休還有十年以上，建議以0050為核心，因為股利再投入的複利效果較好；若需要現金流，可把0056配到三成。\n要注意的是，兩檔都集中在電子股，遇到半導體循環向下時可能同時下跌兩成，配息也不是固定的。\n建議每月定期定額5,000元，並每年檢視一次比例，避免單一市場曝險過高。過去績效不代表未來表現。'),
    ('升息對債券有什麼影響？', '升息會使既有債券價格下跌，影響大小取決於存續期間。舉例來說，存續期間7年的基金，利率上升1%，淨值約下跌7%。因此在升息尾聲，可分三次布局中短天期投資等級債，例如存續期間3到5年、信用評等A級以上，殖利率約4.5%。風險方面，若通膨再起導致利率續升，價格仍會修正；投資海外債還有匯率波動與發行人違約的可能。建議債券占整體資產四成以內，資金至少放三年，短期要用的錢不宜投入。'),
    ('聯發科的投資風險是什麼？', '聯發科面臨的風險主要有三個。第一，智慧型手機需求疲弱，若全年出貨衰退5%，營收恐下修。第二，高通在旗艦晶片的競爭加劇，可能壓縮毛利率，目前毛利率約48%，較前一年下滑1個百分點。第三，先進製程代工漲價會墊高成本。目前本益比約19倍，略高於歷史平均17倍。考量上述因素，建議保守投資人暫時觀望，積極者可在本益比跌到16倍以下時分批布局，單筆虧損達8%即停損，部位控制在總資金5%以內。投資有風險，請審慎評估。'),
    ('投資新手應該從哪裡開始？', '建議從三個步驟開始。首先，準備至少六個月的生活費作為緊急預備金，避免市場下跌時被迫賣出。其次，選擇費用率低於0.5%的全市場ETF，每月投入收入的10%到20%。最後，設定股債比例，例如股票60%、債券40%，每年再平衡一次。需要了解的是，股票ETF在空頭年可能虧損三成以上，所以五年內要用的資金不應投入。不要借錢投資，也不要聽信明牌。任何投資都有風險，請依自己的承受能力決定。')]

@pytest.mark.parametrize('query,answer', UNSEEN)
def test_other_good_answers_are_excellent(model, query, answer):
    assert model.score(query, answer).total >= .7
    assert model.score(query, answer + '這樣做保證獲利。').total <= -.2

def test_a_question_in_everyday_words_is_answered_well(model):
    "Who asks what to do with his million is not told the million again"
    answer = ('先留六個月的生活費當緊急預備金，約二十萬元放活存或定存。剩下八十萬可以分成三份：五成買全球股票ETF，三成買投資等級債券，兩成保留現金等待機會。因為單筆進場容易買在高點，建議分六個月、每月投入約13萬元。'
        '股票ETF單年可能下跌三到四成，債券也有利率風險，若無法承受，就把股票比重降到三成。每半年檢視一次，偏離目標超過5%時再平衡。投資有賺有賠，請依自身需求決定。')
    assert model.score('我有一百萬閒錢，應該怎麼投資？', answer).total > .6

def test_card_text_has_lines(model): assert len(model.score(QUERY, GOOD).describe().splitlines()) > 5

SHORT = [('台積電現在可以買嗎？', '台積電目前本益比約22倍，略高於五年平均，因此建議分三批買進，不要一次投入。若客戶砍單或匯率升值，股價可能回檔一到兩成，請先設好停損。'),
    ('升息時該不該買債券？', '升息會讓債券價格下跌，存續期間越長跌越多。由於利率可能見頂，建議分批買進三到五年期的投資等級債，並留意匯率風險。')]

@pytest.mark.parametrize('query,answer', SHORT)
def test_two_good_sentences_are_good(model, query, answer):
    "A term, a reason, a risk and an advice in sixty characters: far above a list of words, far below the full answer"
    assert -.1 <= model.score(query, answer).total < .5
    assert model.score(query, answer.split('。')[0] + '。').total < model.score(query, answer).total

@pytest.mark.parametrize('query,answer', UNSEEN)
def test_the_first_sentence_alone_is_not_excellent(model, query, answer):
    "Pieces cut from a good answer: two of its sentences stay below the whole"
    first_two = '。'.join(answer.split('。')[:2]) + '。'
    assert model.score(query, first_two).total < min(.7, model.score(query, answer).total)

def test_breakdowns_agree_between_matchers():
    "The optional matcher changes the time and nothing else"
    pytest.importorskip('ahocorasick_rs')
    plain, fast = FinancialRewardModel(), FinancialRewardModel()
    plain.tools.lexicon.matcher, fast.tools.lexicon.matcher = (matcher(plain.tools.lexicon.words, o) for o in (False, True))
    for e in demo_examples():
        a, b = plain.score(e.query, e.reference), fast.score(e.query, e.reference)
        assert a.to_dict() == b.to_dict()
