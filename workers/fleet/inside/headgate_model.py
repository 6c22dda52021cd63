"""Make a Llama of random weights with a tokenizer of its own, from nothing but this machine's Python files.

    python headgate_model.py nano DIRECTORY

Runs in vLLM's own environment. Beside the model it writes `headgate.json`: the tokens that a server on an emulated
clock speaks in. Each is one whole word, so that its text turns into the same token again.
"""

import json
import sys
import sysconfig
from pathlib import Path

SHAPES = {
    # hidden size, layers, attention heads, KV heads, feed-forward size
    "nano": (64, 1, 2, 1, 128),  # 128 bytes of KV a token: a GPU's whole cache in 54 MB
    "tiny": (256, 4, 4, 2, 704),  # 7 million weights: really computes, 3 ms a token on one core
}

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
VOCABULARY = 8192
MAX_LEN = 131_072

# Whitespace stays as it is: a conversation's next turn begins with exactly the tokens of this one.
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make(shape, directory):
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    tokenizer.save_pretrained(directory)
    hidden, layers, heads, kv_heads, ffn = SHAPES[shape]
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=MAX_LEN,
        **marks,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(**marks)
    model.save_pretrained(directory)
    told = {"words": words_of(tokenizer), "eos": 1, "kv_bytes_per_token": kv_bytes(shape)}
    # Last, and whole: that it exists says that the model does.
    (directory / "headgate.json").write_text(json.dumps(told), "utf-8")


def tokenizer_of(files):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train([str(path) for path in files[:150]], trainer)
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        model_max_length=MAX_LEN,
        clean_up_tokenization_spaces=False,
    )
    outer.chat_template = CHAT
    return outer


def words_of(tokenizer):
    """Ids of tokens that are a space and small letters, and are found again in their own text."""
    words = []
    for token in range(len(SPECIAL), len(tokenizer)):
        text = tokenizer.decode([token])
        is_word = text[:1] == " " and text[1:].isascii() and text[1:].isalpha()
        if is_word and text.islower() and tokenizer.encode(text) == [token]:
            words.append(token)
    return words


def kv_bytes(shape):
    """Bytes of keys and values of one token, in bfloat16."""
    hidden, layers, heads, kv_heads, _ = SHAPES[shape]
    return 2 * 2 * layers * kv_heads * (hidden // heads)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
