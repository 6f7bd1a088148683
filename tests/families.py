"Tiny random models of the families that people bring, for the tests of more than one page"
import torch, transformers
from finrl_grpo.builtin import train_tokenizer
from finrl_grpo.config import TrainConfig

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
FAMILIES = dict(
    gpt2=(transformers.GPT2Config, dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)),
    llama=(transformers.LlamaConfig, SMALL),
    qwen2=(transformers.Qwen2Config, {**SMALL, 'tie_word_embeddings':True}),
    qwen3=(transformers.Qwen3Config, {**SMALL, 'head_dim':8, 'tie_word_embeddings':True}),
    gemma3=(transformers.Gemma3TextConfig, {**SMALL, 'head_dim':8, 'sliding_window':8, 'layer_types':['sliding_attention', 'sliding_attention', 'full_attention']}),
    gemma2=(transformers.Gemma2Config, {**SMALL, 'head_dim':8, 'sliding_window':8, 'query_pre_attn_scalar':8, 'final_logit_softcapping':2.}),
    granite=(transformers.GraniteConfig, {**SMALL, 'logits_scaling':3.}))

def write_families(
    tmp_path_factory, # Of pytest
    names, # Which of `FAMILIES`
)->dict: # Name -> folder
    "One tiny random model a family, saved as people have them"
    tokenizer,found = train_tokenizer([]),{}
    for name in names:
        kind,shape = FAMILIES[name]
        found[name] = str(tmp_path_factory.mktemp(name))
        torch.manual_seed(1)
        config = kind(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=.2, **shape)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found

def config(name='builtin:micro', **kw): return TrainConfig(**{**dict(model_name=name, use_fp16=False, gradient_checkpointing=False), **kw})

def shake(policy):
    "Give an adapter something to do: its B starts at zero"
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for n,p in policy.trainable():
            if 'lora_B' in n: p.copy_(torch.randn(p.shape, generator=g)*.1)
    return policy
