"""Write a random model of six small layers, to try everything but the quality: python tiny.py FOLDER TEXTS.

TEXTS is a folder of JSON Lines; the tokenizer learns its words from them. A run warns that such a model predicts no
better than a guess, which it does not.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]


def main(folder: str, texts: str) -> None:
    """Make both and save them as every other model is saved, for everybody to read."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=letters)
    words.train([str(path) for path in sorted(Path(texts).glob("*.jsonl"))], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **tokens)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in Path(folder).iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main(*sys.argv[1:])
