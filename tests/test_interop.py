"The reward inside other trainers: TRL's own loop, and the published signatures of verl and OpenRLHF."
import inspect
import pytest
from finrl_grpo.interop import answer_of, compute_score, question_of, reward_func, reward_parts
from finrl_grpo.reward import FinancialRewardModel

QUERY = '分析台積電的投資價值'
ANSWER = '目前本益比約25倍，高於五年平均。主要風險是匯率波動。因為評價偏高，建議分三批進場，跌破季線就停損。'

def test_verl_signature():
    "verl calls with these keywords (docs/preparation/reward_function.rst)"
    assert list(inspect.signature(compute_score).parameters)[:4] == ['data_source', 'solution_str', 'ground_truth', 'extra_info']
    out = compute_score(data_source='x', solution_str=ANSWER, ground_truth='', extra_info=dict(question=QUERY, split='train'), reward_router_address=None)
    assert isinstance(out['score'], float) and all(isinstance(v, float) for v in out.values())

def test_openrlhf_signature():
    "OpenRLHF calls with queries, prompts, labels (examples/python/reward_func.py)"
    assert list(inspect.signature(reward_func).parameters)[:3] == ['queries', 'prompts', 'labels']
    out = reward_func([QUERY + ANSWER], [QUERY], [''])
    assert out['rewards'].shape == out['scores'].shape == (1,) and 0 <= out['scores'].item() <= 1
    assert out['rewards'].item() == pytest.approx(FinancialRewardModel().score(QUERY, ANSWER).total)

@pytest.mark.parametrize('prompt', [QUERY, f'<|im_start|>system\n你是助理<|im_end|>\n<|im_start|>user\n{QUERY}<|im_end|>\n<|im_start|>assistant\n',
    f'<bos><start_of_turn>user\n{QUERY}<end_of_turn>\n<start_of_turn>model\n', f'<s>[INST] {QUERY} [/INST]',
    f'<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{QUERY}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'])
def test_question_and_answer_of_chat_templates(prompt):
    assert question_of(prompt) == QUERY and answer_of(prompt + ANSWER + '</s>', prompt) == ANSWER

@pytest.mark.slow
@pytest.mark.parametrize('chat', [False, True])
def test_trl_grpo_trainer_calls_it(tmp_path, chat):
    "One real step of TRL's GRPOTrainer, with the whole reward and with its four parts"
    pytest.importorskip('trl')
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from finrl_grpo.config import TrainConfig
    from finrl_grpo.models import load_policy
    policy = load_policy(TrainConfig(model_name='builtin:micro'))
    prompts = [[dict(role='user', content=QUERY)]]*4 if chat else [QUERY]*4
    if chat: policy.tokenizer.chat_template = '{% for m in messages %}{{ m["content"] }}{% endfor %}'
    rows = Dataset.from_dict(dict(prompt=prompts, reference=[ANSWER]*4, context=['']*4))
    parts,weights = reward_parts()
    args = GRPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
        reward_weights=[1., *weights], report_to=[], use_cpu=True, save_strategy='no')
    trainer = GRPOTrainer(model=policy.model, reward_funcs=[FinancialRewardModel(), *parts], args=args, train_dataset=rows, processing_class=policy.tokenizer)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert -1 <= logged['rewards/financial_reward/mean'] <= 1
    whole,split = logged['rewards/financial_reward/mean'], sum(w*logged[f'rewards/{p.__name__}/mean'] for p,w in zip(parts, weights))
    assert whole == pytest.approx(split, abs=1e-5)

def test_labels_carry_question_context_and_settings():
    "What `finrl-grpo export openrlhf` writes reaches the score, weights included"
    import json
    from finrl_grpo.config import FinancialRewardConfig
    label = json.dumps(dict(question=QUERY, context='本益比約25倍', reference=ANSWER), ensure_ascii=False)
    settings = FinancialRewardConfig(accuracy_weight=1, risk_assessment_weight=0, recommendation_weight=0, language_quality_weight=0)
    out = reward_func([f'別的提示{ANSWER}'], ['別的提示'], [label], settings=json.dumps(settings.to_dict()))
    assert out['rewards'].item() == pytest.approx(FinancialRewardModel(settings).score(QUERY, ANSWER, ANSWER, '本益比約25倍').total)
    verl = compute_score('x', ANSWER, ANSWER, dict(question=QUERY, context='本益比約25倍'), settings=json.dumps(settings.to_dict()))
    assert verl['score'] == pytest.approx(out['rewards'].item())

def test_a_prompt_that_is_not_there_is_an_error():
    from finrl_grpo.config import DataError
    with pytest.raises(DataError, match='does not contain its prompt'): answer_of(ANSWER, QUERY)
