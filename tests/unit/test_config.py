"""The configuration: whole, strict, and helpful about misspelt keys."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from medsam_lora import config as module
from medsam_lora.config import Config, Section, apply_overrides, build_config, dump_config, load_config, load_yaml
from medsam_lora.errors import ConfigError

SECTIONS = [
    "data",
    "slicing",
    "crop",
    "intensity",
    "prompt",
    "model",
    "method",
    "fusion",
    "train",
    "predict",
    "evaluate",
]


def test_the_sections_are_those_of_the_contract():
    assert list(Config.model_fields) == SECTIONS


def test_every_section_class_is_used_and_every_key_is_described():
    classes = {
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Section) and kind not in (Section, Config)
    }
    assert classes == {type(field.default) for field in Config.model_fields.values()}
    for kind in classes:
        for key, field in kind.model_fields.items():
            assert field.description and field.description.endswith("."), f"{kind.__name__}.{key}"


def test_defaults_survive_being_written_and_read(tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(Config()))
    assert load_config(tmp_path / "c.yaml") == Config()


def test_every_setting_survives_being_written_and_read(tmp_path):
    changed = load_config(
        None,
        [
            "data.modalities=[t2w, t1n]",
            "crop.size=[138, 202]",
            "crop.centre=box",
            "method.targets=[q, k, v, proj, mlp]",
            "method.blocks=[-2, -1]",
            "train.lr=3e-4",
            "train.clip_norm=null",
            "train.flip=true",
            "model.image_size=512",
        ],
    )
    (tmp_path / "c.yaml").write_text(dump_config(changed))
    assert load_config(tmp_path / "c.yaml") == changed
    assert changed.crop.size == (138, 202)
    assert changed.train.lr == 3e-4
    assert changed.train.clip_norm is None
    assert changed.method.blocks == [-2, -1]


def test_modalities_are_always_in_channel_order():
    assert load_config(None, ["data.modalities=[t2w, t1c, t1n]"]).data.modalities == ["t1n", "t1c", "t2w"]


def test_settings_win_over_the_file_and_the_last_one_wins(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {epochs: 3, batch_size: 4}\n")
    train = load_config(path, ["train.epochs=5", "train.epochs=6"]).train
    assert (train.epochs, train.batch_size) == (6, 4)


def test_overrides_leave_the_given_sections_alone():
    data = {"train": {"epochs": 3}}
    apply_overrides(data, ["train.epochs=5"])
    assert data == {"train": {"epochs": 3}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
        ("trian.epochs=3", "unknown key trian; did you mean train?"),
        ("methods.name=lora", "unknown key methods; did you mean method?"),
        ("method.rnak=4", "unknown key method.rnak; did you mean method.rank?"),
        # The very key of another section comes before a like one of this section.
        ("train.rank=4", "unknown key train.rank; did you mean method.rank?"),
        ("model.epochs=4", "unknown key model.epochs; did you mean train.epochs?"),
        ("fusion.jiter_px=4", "unknown key fusion.jiter_px; did you mean prompt.jitter_px?"),
        ("intensity.zzz=1", "unknown key intensity.zzz; known: intensity.voxels, intensity.scope"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(setting, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert caught.value.message == message


@pytest.mark.parametrize(
    "setting",
    [
        "train.epochs=three",
        "train.epochs='3'",
        "train.epochs=0",
        "train.epochs=2.5",
        "train.flip=1",
        "train.lr=-1",
        "train.dice_weight=true",
        "data.modalities=[t1n, t1n]",
        "data.modalities=[]",
        "data.modalities=t1n",
        "data.modalities=[t1]",
        "crop.size=[138]",
        "crop.size=138",
        "method.targets=[query]",
        "prompt.jitter_px=21",
        "slicing.empty_share=1",
        "method.alpha=.inf",
        "train.clip_norm=.nan",
        "train.lr=1e999",
        "model.name=vit_x",
        "train=3",
    ],
)
def test_an_ill_typed_value_is_refused_and_named(setting):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert setting.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize("given", ["sam_parser+lora", "sam_parser + lora", " sam_parser +lora "])
def test_a_method_is_called_the_same_however_it_is_spaced(given):
    assert build_config({"method": {"name": given}}).method.name == "sam_parser+lora"


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        build_config({"train": {"epoch": 1, "lr": "fast"}, "slicing": {"step": 0}, "nothing": {}})
    for part in ("train.epoch", "train.lr", "slicing.step", "nothing"):
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4"])
def test_numbers_as_people_write_them_are_numbers(text, tmp_path):
    # YAML 1.1 reads 1e-4 as a string.
    assert load_config(None, [f"train.lr={text}"]).train.lr == 1e-4
    (tmp_path / "c.yaml").write_text(f"train: {{lr: {text}}}\n")
    assert load_config(tmp_path / "c.yaml").train.lr == 1e-4


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "no such file"),
        (b"train: [1", "not valid YAML"),
        (b"- 1\n- 2\n", "sections with keys"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"train: 3\n", "train"),
        (b"!!python/object/apply:os.system [echo]\n", "not valid YAML"),
        (b"train: {epochs: 2, epoch: 2}\n", "train.epoch"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(content, fault, tmp_path):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert fault in str(caught.value)
    assert "settings.yaml" in str(caught.value)


@pytest.mark.parametrize("content", ["", "# nothing\n", "train:\n"])
def test_a_file_that_says_nothing_changes_nothing(content, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    assert load_config(path) == Config()


def test_settings_cannot_be_changed_after_the_check():
    with pytest.raises(ValidationError):
        Config().train.epochs = 3


def test_the_schema_knows_every_key_with_its_default():
    schema = Config.model_json_schema()
    assert schema["additionalProperties"] is False
    for name, field in Config.model_fields.items():
        kind = type(field.default).__name__
        properties = schema["$defs"][kind]["properties"]
        assert set(properties) == set(type(field.default).model_fields), name
    assert schema["$defs"]["TrainConfig"]["properties"]["epochs"]["default"] == 10


def test_load_yaml_gives_the_plain_mapping(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("train: {epochs: 3}\n")
    assert load_yaml(tmp_path / "a.yaml") == yaml.safe_load("train: {epochs: 3}")
