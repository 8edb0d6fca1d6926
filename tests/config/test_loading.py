"""Configuration files and overrides: what is read, and what is said about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedclip.config import Config
from fedclip.config.loading import dump_config, load_config
from fedclip.errors import UsageError

GUIDE = """\
# configs/clip_lora.yaml
model:
  type: "clip"
  model_name: "openai/clip-vit-base-patch32"

  # LoRA微调配置
  lora:
    enabled: true                    # 启用LoRA微调
    r: 8                            # LoRA rank (1-64)
    lora_alpha: 16                  # LoRA scaling参数
    lora_dropout: 0.05              # LoRA dropout概率
    target_modules:
      vision_encoder: ["q_proj", "v_proj", "k_proj", "out_proj"]
      text_encoder: ["q_proj", "v_proj", "k_proj", "out_proj"]
client:
  local_epochs: 3                   # LoRA可以使用更多本地轮数
  learning_rate: 0.0001            # LoRA使用稍高的学习率

optimizer:
  learning_rate: 1e-4              # LoRA微调学习率
  weight_decay: 0.01               # 较小的权重衰减

data:
  batch_size: 32                   # LoRA可以使用较大批次
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "guide.yaml"
    path.write_text(GUIDE, encoding="utf-8")
    return path


def refused(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        load_config(path, overrides)
    return str(error.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_by_pattern_are_blamed_by_pattern_and_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model:\n  lora:\n    rank_pattern:\n      layers.0.fc1: 99\n      q_proj: 4\n"
        "optimizer:\n  rate_pattern: {lora_B: -1}\n",
    )
    text = refused(path, "model.lora.dropout_pattern={k: 1}")
    assert (
        "model.lora.rank_pattern[layers.0.fc1] must be a whole number from 1 to 64, got 99 "
        f"({path}, line 3)"
    ) in text
    assert f"optimizer.rate_pattern[lora_B] must be a number >= 0, got -1 ({path}, line 7)" in text
    assert "model.lora.dropout_pattern[k] must be a number from 0 to 0.3, got 1 " in text
    assert "(command line: model.lora.dropout_pattern={k: 1})" in text


def test_patterns_survive_a_round_trip(tmp_path: Path) -> None:
    pattern = r"vision_model\.encoder\.layers\.[0-3]\..*"
    path = written(
        tmp_path,
        f"model:\n  lora:\n    rank_pattern: {{'{pattern}': 4}}\n    exclude_modules: [q_proj]\n",
    )
    config = load_config(path, ["model.lora.alpha_pattern={text_encoder.layers.0-1: 3}"])
    assert config.model.lora.rank_pattern == {pattern: 4}
    assert config.model.lora.alpha_pattern == {"text_encoder.layers.0-1": 3}
    again = written(tmp_path, dump_config(config))
    assert load_config(again) == config


def test_the_configuration_of_the_guide(file: Path) -> None:
    config = load_config(file)
    assert config.client.learning_rate == config.optimizer.learning_rate == 1e-4
    assert config.client.local_epochs == 3
    assert config.model.lora.target_modules.text_encoder == (
        "q_proj",
        "v_proj",
        "k_proj",
        "out_proj",
    )


def test_shipped_configurations_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert {file.stem for file in files} >= {
        "clip_lora",
        "fashion_mnist",
        "icons",
        "imagefolder",
        "quickstart",
    }
    for path in files:
        load_config(path)


def test_overrides_change_single_keys(file: Path) -> None:
    config = load_config(
        file,
        [
            "federation.rounds=3",
            "data.class_names=[cat, 'dog, wild']",
            "optimizer.max_grad_norm=null",
            "model.lora.target_modules.text_encoder=[]",
            "optimizer.weight_decay=5e-2",
            "data.path=a=b",
        ],
    )
    assert config.federation.rounds == 3
    assert config.data.class_names == ("cat", "dog, wild")
    assert config.optimizer.max_grad_norm is None
    assert config.optimizer.weight_decay == 0.05
    assert config.data.path == "a=b"
    assert config.model.lora.target_modules.text_encoder == ()
    assert len(config.model.lora.target_modules.vision_encoder) == 4
    assert config.client.local_epochs == 3


def test_the_last_override_of_a_key_counts() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("key", ["client.learning_rate", "optimizer.learning_rate"])
def test_an_override_replaces_both_learning_rates(file: Path, key: str) -> None:
    config = load_config(file, [f"{key}=1e-2"])
    assert config.client.learning_rate == config.optimizer.learning_rate == 0.01


def test_an_override_settles_a_disagreement_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "client:\n  learning_rate: 0.1\noptimizer:\n  learning_rate: 0.2\n")
    text = refused(path)
    assert "client.learning_rate is 0.1 and optimizer.learning_rate is 0.2" in text
    assert f"({path}, line 2)" in text
    assert load_config(path, ["client.learning_rate=0.3"]).optimizer.learning_rate == 0.3


def test_two_different_learning_rates_on_the_command_line() -> None:
    text = refused(None, "client.learning_rate=0.1", "optimizer.learning_rate=0.2")
    assert "client.learning_rate=0.1 and optimizer.learning_rate=0.2 differ" in text
    same = load_config(None, ["client.learning_rate=0.1", "optimizer.learning_rate=1e-1"])
    assert same.client.learning_rate == 0.1


def test_a_bad_override_names_the_command_line() -> None:
    assert refused(None, "model.lora.r=128") == (
        "model.lora.r must be a whole number from 1 to 64, got 128 (command line: model.lora.r=128)"
    )
    assert "(command line: client=5)" in refused(None, "client=5")
    assert "did you mean federation.rounds? (command line: federation.round=5)" in refused(
        None, "federation.round=5"
    )
    assert "optimizer.learning_rate must be" in refused(None, "client.learning_rate=fast")


@pytest.mark.parametrize("text", ["rounds", "=3", "a..b=3", ".=1", "federation.=3"])
def test_an_override_without_a_key_or_a_value(text: str) -> None:
    assert "must have the form key=value" in refused(None, text)


def test_all_bad_overrides_come_at_once() -> None:
    text = refused(None, "rounds", "seed=[1", "x")
    assert text.startswith("3 problems:")
    assert "'seed=[1': the value is not valid YAML" in text


def test_lines_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\nmodel:\n  lora:\n    r: 128\n    rnk: 3\nclient: [1]\n")
    text = refused(path)
    assert f"model.lora.r must be a whole number from 1 to 64, got 128 ({path}, line 4)" in text
    assert "unknown key model.lora.rnk; known keys under model.lora: enabled, r, " in text
    assert f"({path}, line 5)" in text
    assert f"got [1] ({path}, line 6)" in text


def test_a_missing_file(tmp_path: Path) -> None:
    assert "there is no configuration file" in refused(tmp_path / "none.yaml")
    assert "cannot be read as a text file" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert refused(path).startswith(f"{path} ")


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    assert "must hold a mapping of keys such as `seed: 0`, not a list" in refused(
        written(tmp_path, "- seed\n")
    )
    assert "not a single value" in refused(written(tmp_path, "seed\n"))


def test_a_syntax_error_names_the_line(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\nmodel: [1,\nclient: {}\n")
    text = refused(path)
    assert text.startswith(f"{path}, line 4, column 1: this is not valid YAML: ")
    assert "begins in line 2" in text
    path = written(tmp_path, "seed: 1\n\tmodel: 3\n")
    assert refused(path).startswith(f"{path}, line 2, column")


def test_a_key_given_twice_is_named(tmp_path: Path) -> None:
    text = refused(written(tmp_path, "seed: 1\nseed: 2\n"))
    assert "line 2" in text
    assert "duplicate key seed" in text


def test_binary_and_numeric_keys_do_not_end_in_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xd8\xff\x00")
    assert "cannot be read as a text file" in refused(path)
    assert "unknown key 3" in refused(written(tmp_path, "3: x\n"))
    assert "not valid YAML" in refused(written(tmp_path, "null: y\n"))


def test_references_between_keys_are_resolved(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 4\nfederation:\n  rounds: ${seed}\n")
    assert load_config(path).federation.rounds == 4
    assert load_config(path, ["seed=6"]).federation.rounds == 6
    assert "nothing" in refused(written(tmp_path, "seed: ${nothing}\n"))


def test_an_empty_mapping_takes_the_place_of_what_the_file_has(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: {head: linear, lora: {target_modules: {vision_encoder: [fc1]}, "
        "rank_pattern: {fc1: 2}}}\nclient: {local_epochs: 3}\n"
    )
    empty = load_config(file, ["model.lora.target_modules={}", "model.lora.rank_pattern={}"]).model
    assert empty.trains == "head"
    assert empty.lora.rank_pattern == {}
    inside = load_config(file, ["model.lora={target_modules: {}, rank_pattern: {}}"]).model
    assert inside.trains == "head"
    one, key = "model.lora.target_modules={}", "model.lora.target_modules.text_encoder=[fc2]"
    both = load_config(file, [one, key, "model.lora.rank_pattern={}"]).model.lora.target_modules
    assert (both.vision_encoder, both.text_encoder) == ((), ("fc2",))
    assert load_config(file, ["client={}"]).client.local_epochs == Config().client.local_epochs
    laid_over = load_config(file, [key]).model.lora.target_modules
    assert (laid_over.vision_encoder, laid_over.text_encoder) == (("fc1",), ("fc2",))
