"best_model behind `transformers serve`, asked through the openai client as any agent would ask; needs `pip install finrl_grpo[serve]`"
import json, os, socket, subprocess, sys, time, urllib.request
import pytest
from finrl_grpo.cli import main
from finrl_grpo.data import write_demo
from finrl_grpo.reward import FinancialRewardModel

QUERY = '台積電現在適合買進嗎？'
SMALL = dict(batch_size=2, mini_batch_size=1, gradient_accumulation_steps=1, num_generations=2, ppo_epochs=1, max_prompt_length=32, max_new_tokens=8, max_steps=1,
    use_fp16=False, use_wandb=False, eval_fraction=0, gradient_checkpointing=False)

@pytest.fixture(scope='module')
def best_model(tmp_path_factory):
    "The model of a short run, with a chat template that leads to the tokens of training"
    from transformers import AutoTokenizer, GenerationConfig
    out = tmp_path_factory.mktemp('serve')
    assert main(['train', '--dataset', str(write_demo(out/'d.jsonl', 8)), '--output', str(out/'run'), '--model', 'builtin:micro', '--config', json.dumps(SMALL)]) == 0
    folder = out/'run'/'best_model'
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "<q>{% for m in messages %}{{ m['content'] }}\n{% endfor %}<a>"
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=1, pad_token_id=0, suppress_tokens=[0, 1, 2, 3]).save_pretrained(folder)
    return folder

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def answers(url):
    try: return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError: return False

@pytest.fixture(scope='module')
def server(best_model, tmp_path_factory):
    "Address of a server on a free port, stopped afterwards"
    for name in ('fastapi', 'uvicorn', 'openai'): pytest.importorskip(name)
    port,log = free_port(),tmp_path_factory.mktemp('log')/'server.log'
    command = [sys.executable, '-c', 'from transformers.cli.transformers import main; main()', 'serve', str(best_model), '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    with log.open('w', encoding='utf-8') as f: process = subprocess.Popen(command, stdout=f, stderr=f, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    try:
        until = time.monotonic() + 240
        while not answers(f'http://127.0.0.1:{port}/health'):
            assert process.poll() is None and time.monotonic() < until, log.read_text(encoding='utf-8')[-3000:]
            time.sleep(.5)
        yield f'http://127.0.0.1:{port}/v1'
    finally:
        process.terminate()
        process.wait(20)

@pytest.mark.slow
def test_openai_client(best_model, server):
    "The same text as plain transformers gives, greedily, and a score for it"
    import openai, transformers
    client = openai.OpenAI(base_url=server, api_key='none')
    said = client.chat.completions.create(model=str(best_model), messages=[dict(role='user', content=QUERY)], max_tokens=8, temperature=0, timeout=120)
    tokenizer = transformers.AutoTokenizer.from_pretrained(best_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(best_model)
    prompt = tokenizer(f'{QUERY}\n', return_tensors='pt')
    own = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0,prompt['input_ids'].shape[1]:]
    text = said.choices[0].message.content
    assert text and text.strip() == tokenizer.decode(own, skip_special_tokens=True).strip()
    assert -1 <= FinancialRewardModel().score(QUERY, text).total <= 1
