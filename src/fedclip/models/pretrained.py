"""The pretrained CLIP that everyone starts from: from the hub, a folder, the package, or random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as library_logging

from fedclip.device import return_freed_memory
from fedclip.errors import UsageError
from fedclip.models.architectures import OPENAI_CLIP, openai_config
from fedclip.models.model_config import check_preprocessing, clip_config, tokenizer_class
from fedclip.models.preprocessing import Pixels
from fedclip.models.tokenizer import Tokens, remapped

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
RANDOM = "random:"
# A legacy value of OpenAI's own files: it means "pool at the largest token id".
LEGACY_END = 2


@dataclass(frozen=True)
class Base:
    """A CLIP in fp32 and evaluation mode, with what turns texts and images into its input."""

    name: str
    model: CLIPModel
    tokens: Tokens
    pixels: Pixels


def base_folder(name: str) -> Path:
    """Folder of an embedded model, in the hub's format."""
    if name not in EMBEDDED:
        known = ", ".join(EMBEDDED)
        raise UsageError(f"no embedded model is called {name!r}; there is: {known}")
    return EMBEDDED[name]


def advice_on_size(model_name: str) -> str:
    """What to do where a model's input is too small for the images."""
    if model_name.removeprefix(RANDOM) in EMBEDDED:
        return (
            "For photographs set model.model_name to a larger model: "
            "openai/clip-vit-base-patch32, another of the hub, or a folder on disk"
        )
    return (
        "If such details matter, take a model with a larger input, such as "
        "openai/clip-vit-large-patch14-336, or cut the images to what matters"
    )


def load_base(model_name: str, *, seed: int = 0) -> Base:
    """Load a hub id, a folder in the hub's format, `tiny`, or `random:<hub id or folder>`.

    `seed` decides the weights of a random model and nothing else; the global generator stays
    as it is. Raises `UsageError` when the model cannot be had.
    """
    config = _load_config(model_name)
    with quiet(), _told(model_name):
        if model_name.startswith(RANDOM):
            model = _random_model(config, seed)
        else:
            model = _pretrained_model(model_name, config)
    model.eval()
    tokens = _load_tokens(model_name, config)
    return Base(model_name, model, tokens, _load_pixels(model_name, config))


def load_pixels(model_name: str) -> Pixels:
    """A model's image preprocessing alone, without loading its weights."""
    return _load_pixels(model_name, _load_config(model_name))


def load_tokens(model_name: str) -> Tokens:
    """A model's tokenizer alone, without loading its weights."""
    return _load_tokens(model_name, _load_config(model_name))


def enable_checkpointing(model: CLIPModel) -> None:
    """Recompute activations in the backward pass; works where the embeddings are frozen."""
    return_freed_memory()  # who asks for this wants the memory back
    # transformers renamed it within version 5 and warns under the old name.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def source_of(model_name: str) -> str:
    """What `from_pretrained` is asked for: a folder as a path, or a hub id."""
    name = model_name.removeprefix(RANDOM)
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    folder = Path(name).expanduser()
    looks_like_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_path and not folder.is_dir():
        raise UsageError(f"model.model_name: the folder {folder} does not exist")
    return str(folder) if folder.is_dir() else name


def _load_config(model_name: str) -> CLIPConfig:
    """The architecture, checked to be a CLIP."""
    config = _find_config(model_name)
    towers: Any = (config.text_config, config.vision_config)
    for tower in towers:
        tower.attention_dropout = 0.0  # its masks would come from no named seed
    return config


def _find_config(model_name: str) -> CLIPConfig:
    name = model_name.removeprefix(RANDOM)
    if model_name.startswith(RANDOM):
        if name in OPENAI_CLIP:
            return openai_config(name)
        if name not in EMBEDDED and not Path(name).expanduser().is_dir():
            known = ", ".join([*OPENAI_CLIP, *EMBEDDED])
            raise UsageError(
                f"model.model_name: random:{name} is not known; after 'random:' comes one of "
                f"{known}, or a folder that holds a config.json"
            )
    with quiet(), _told(model_name):
        found, _ = CLIPConfig.get_config_dict(source_of(model_name))
        if not found:
            raise OSError("there is no config.json in it")
        return clip_config(found, name)


def _pretrained_model(model_name: str, config: CLIPConfig) -> CLIPModel:
    """Weights from safetensors, in fp32, with none missing."""
    # With loading info the library returns a pair, which its types do not say.
    loaded: Any = CLIPModel.from_pretrained(
        source_of(model_name),
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, notes = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            f"model.model_name: {model_name} holds an adapter beside the model "
            "(adapter_config.json); name the base model, and load the adapter into it"
        )
    missing = sorted(notes["missing_keys"])
    if missing:
        raise UsageError(
            f"model.model_name: the weights of {model_name} lack {len(missing)} tensors that its "
            f"config.json asks for, {missing[0]} among them; is the download complete?"
        )
    return model


def _random_model(config: CLIPConfig, seed: int) -> CLIPModel:
    """Seeded random weights, as transformers initialises a CLIP before training."""
    # devices=[]: forking and seeding touch the CPU generator only, where the weights are drawn.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = CLIPModel(config)
    return model.float()


def _load_tokens(model_name: str, config: CLIPConfig) -> Tokens:
    """The model's tokenizer; for random weights the embedded one under that model's end ids."""
    text: Any = config.text_config
    if model_name.startswith(RANDOM):
        legacy = text.eos_token_id == LEGACY_END
        begin, end = text.bos_token_id, text.eos_token_id
        if legacy:
            begin, end = text.vocab_size - 2, text.vocab_size - 1
        embedded = _load_tokens("tiny", _load_config("tiny"))
        return remapped(
            embedded,
            vocab_size=text.vocab_size,
            begin=begin,
            end=end,
            max_length=text.max_position_embeddings,
        )
    with quiet(), _told(model_name):
        reader = tokenizer_class(get_tokenizer_config(source_of(model_name)), model_name)
        longest = text.max_position_embeddings  # whatever the folder says
        tokenizer = reader.from_pretrained(source_of(model_name), model_max_length=longest)
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    last = max(len(tokenizer), (begin or 0) + 1, (end or 0) + 1) - 1
    pooled = last if text.eos_token_id == LEGACY_END else text.eos_token_id
    if begin is None or end is None or pooled != end or last >= text.vocab_size:
        raise UsageError(
            f"model.model_name: the tokenizer of {model_name} does not fit its text tower: it has "
            f"begin and end ids {begin} and {end} and a largest id of {last}; the tower has "
            f"{text.vocab_size} ids and reads the text at id {pooled}"
        )

    def encode_plain(texts: list[str]) -> list[list[int]]:
        # Split: a name such as "<|endoftext|>" is a text, and does not end one.
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        with _told(model_name):
            return tokenizer(texts, **options)["input_ids"]

    return Tokens(encode_plain, begin=begin, end=end, max_length=text.max_position_embeddings)


def _load_pixels(model_name: str, config: CLIPConfig) -> Pixels:
    """The model's image preprocessing; CLIP's default at the right size for random weights."""
    vision: Any = config.vision_config
    size = int(vision.image_size)
    name = model_name.removeprefix(RANDOM)
    if model_name.startswith(RANDOM) and name not in EMBEDDED:
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    else:
        with quiet(), _told(model_name):
            # The PIL variant by name: the pixels do not depend on what else is installed.
            processor = CLIPImageProcessorPil.from_pretrained(source_of(model_name))
            check_preprocessing(processor, size, model_name)
    return Pixels(processor, size)


@contextmanager
def _told(model_name: str) -> Iterator[None]:
    """Turn the many ways in which a model cannot be opened into one message for the user."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # the libraries raise a score of unrelated types
        source = source_of(model_name)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(source).is_dir():
            where = f"the folder {source}"
            mend = (
                "a model folder holds config.json, model.safetensors, preprocessor_config.json and "
                "the tokenizer's files, as save_pretrained writes them (pickled weights, *.bin, "
                "are not read)"
            )
        else:
            where = f"a folder of that name, the Hugging Face hub's cache and the hub for {source}"
            mend = (
                f"check the spelling and the network, or download it once where there is one "
                f"(hf download {source}) and name the folder; with HF_HUB_OFFLINE=1 only the "
                f"cache is read; model_name: tiny needs no download"
            )
        raise UsageError(
            f"model.model_name: cannot load {model_name}: tried {where}: {reason}\n{mend}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's notes and bars off the screen, but for the bar of a download."""
    level = library_logging.get_verbosity()
    bars = library_logging.is_progress_bar_enabled()
    download_bars = not are_progress_bars_disabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    if download_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()
