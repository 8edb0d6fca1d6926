"""The architecture and the tokenizer of `tiny`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

IMAGE_SIZE = 32
VOCABULARY = 6144
CONTEXT = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# What CLIP splits text by: contractions, runs of letters, single digits, runs of other signs.
_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def train_tokenizer(texts: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Train CLIP's kind of byte-level BPE on the texts and save it in `folder`.

    The library breaks ties between merges arbitrarily: two runs differ in some rare words' pieces.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet),
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, and the two special tokens last, so that
    # the end token has the largest id and is none of the small ids with a legacy meaning.
    tokens = alphabet + [c + "</w>" for c in alphabet]
    tokens += [t for t in dict.fromkeys(a + b for a, b in merges) if t not in set(tokens)]
    tokens += [BOS, EOS]
    vocab = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=EOS, bos_token=BOS, eos_token=EOS, pad_token=EOS,
        model_max_length=CONTEXT,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """The configuration of `tiny`: 27.5 MFLOP an image, both towers 128 wide."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shared = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    shared |= {"hidden_act": "gelu", "projection_dim": 128}
    return CLIPConfig(
        projection_dim=128,
        logit_scale_init_value=2.66,
        text_config=shared
        | {
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 2,
            "max_position_embeddings": CONTEXT,
            **ids,
        },
        vision_config=shared | {"image_size": IMAGE_SIZE, "patch_size": 8, "num_hidden_layers": 4},
        **ids,
    )


def new_model(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """`tiny` with random weights of that seed."""
    torch.manual_seed(seed)
    return CLIPModel(config(tokenizer))
