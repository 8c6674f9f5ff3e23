"""``--config`` and ``--dump_config``: the same run as the flags, and one line for what is wrong in a file."""

import pytest
import yaml

from blockskip_hooks.cli.arguments import build_parser, parse_args
from blockskip_hooks.cli.config_files import NOT_IN_FILES, dump_config
from blockskip_hooks.cli.preparation import known_defaults
from tests import script
from tests.bad_input.config_cases import CONFIG_CASES
from tests.tiny import TINY_FAMILIES


TINY = TINY_FAMILIES[0]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a file of settings and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def make(text="", name="run.yaml", **settings):
        (tmp_path / name).write_text(text or yaml.safe_dump(settings), encoding="utf-8")
        return name

    return make


def plain(args):
    """The flags without those that say where they came from."""
    return {name: value for name, value in args.flags().items() if name != "config"}


def some_value(action):
    """A value of the flag's type that is not its default, as a file has it and as a shell has it."""
    if action.nargs == 0:
        return True, [action.option_strings[0]]
    if action.nargs == "+":
        items = [1, 2] if action.type is int else ["nf4"]
        return items, [action.option_strings[0], *map(str, items)]
    if getattr(action.type, "__name__", "") == "parse_bool":
        return False, [action.option_strings[0], "False"]
    if action.choices:
        value = next(choice for choice in action.choices if choice != action.default)
    else:
        value = SPECIAL.get(action.dest) or {int: 7, float: 0.25}.get(action.type, "some text: with # signs")
    return value, [action.option_strings[0], str(value)]


SPECIAL = {"skip_blocks": "2,3", "aspect_ratio_buckets": "64,64;96,64"} | dict.fromkeys(
    ("skip_budget", "memory_budget", "residual_budget", "stream_cache"), "8GB"
)
ACTIONS = [action for action in build_parser()._actions if action.dest not in NOT_IN_FILES]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.dest)
def test_every_flag_is_a_key_and_counts_as_given(action, write):
    value, words = some_value(action)
    from_file = parse_args(["--config", write(**{action.dest: value})])
    typed = parse_args(words)
    assert plain(from_file) == plain(typed)
    assert from_file.given == typed.given | {"config"}


def test_what_is_typed_wins_over_the_file_and_the_file_over_the_family(write):
    file = write(rank=16, learning_rate=0.5, max_sequence_length=77, prodigy_decouple=False)
    args = parse_args(["--rank", "8", "--config", file, "--learning_rate=0.25"])
    assert (args.rank, args.learning_rate, args.max_sequence_length) == (8, 0.25, 77)
    assert args.prodigy_decouple is False
    assert {"rank", "learning_rate", "max_sequence_length"} <= args.given and "resolution" not in args.given


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("skip_blocks: 10", "skip_blocks", "10"),
        ("skip_blocks: 19,9", "skip_blocks", "19,9"),
        ("skip_blocks: none", "skip_blocks", "none"),
        ("memory_options: nf4", "memory_options", ["nf4"]),
        ("instance_prompt: ''", "instance_prompt", ""),
    ],
)
def test_words_that_yaml_reads_otherwise_mean_what_the_flag_means(text, name, value, write):
    found = getattr(parse_args(["--config", write(text)]), name)
    assert found == value and type(found) is type(value)


def test_null_is_as_if_the_key_was_not_there(write):
    assert plain(parse_args(["--config", write("rank: null\nmax_train_steps: ~")])) == plain(parse_args([]))


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_a_wrong_file_ends_in_one_line_that_names_it(case, write, tmp_path, capsys):
    make, words = CONFIG_CASES[case]
    path = tmp_path / "run.yaml"
    make(path)
    with pytest.raises(SystemExit) as ended:
        script.load_script().main(["--config", str(path)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    for word in ("error: --config", str(path), *words):
        assert word in error


# The dump


def test_a_dump_is_read_as_the_same_run(write):
    typed = parse_args(
        [
            *("--skip_blocks", "10", "--instance_prompt", "a: 'dog' # \"x\"\n\u00fc", "--learning_rate", "1e-4"),
            *("--memory_options", "nf4", "8bit_adam", "--mixed_precision", "no", "--center_crop"),
            *("--prodigy_decouple", "no", "--lora_alpha", "3"),
        ]
    )
    read = parse_args(["--config", write(dump_config(typed, build_parser(), {}))])
    assert plain(read) == plain(typed)
    assert read.given == typed.given | {"config"}


def test_a_dump_of_nothing_but_defaults_is_read_as_such(write):
    untouched = parse_args([])
    text = dump_config(untouched, build_parser(), {})
    assert all(line.startswith("#") or not line for line in text.splitlines())
    assert plain(parse_args(["--config", write(text)])) == plain(untouched)


def test_a_dump_is_complete_and_keeps_the_token_to_itself(write):
    typed = parse_args(["--rank", "8", "--hub_token", "Sesame0pen7"])
    text = dump_config(typed, build_parser(), {"resolution": 64})
    assert "Sesame0pen7" not in text
    assert "\nrank: 8\n" in text and "\n# resolution: 64\n" in text and "\n# learning_rate: 0.0001\n" in text
    everything = yaml.safe_load("\n".join(line.removeprefix("# ") for line in text.splitlines() if ": " in line))
    assert everything.keys() == {action.dest for action in ACTIONS}


def test_the_script_prints_settings_with_the_defaults_of_the_model_and_loads_nothing(write, tmp_path, capsys):
    file = write(pretrained_model_name_or_path=str(TINY.folder), output_dir="out", rank=8)
    assert script.load_script().main(["--config", file, "--dump_config"]) == 0
    text = capsys.readouterr().out
    args = parse_args(["--config", write(text, "again.yaml")])
    assert (args.rank, args.pretrained_model_name_or_path) == (8, str(TINY.folder))
    assert args.given == {"config", "rank", "output_dir", "pretrained_model_name_or_path"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_settings_of_a_model_on_the_hub_are_printed_without_asking_it(capsys):
    assert script.load_script().main(["--pretrained_model_name_or_path", "some/model", "--dump_config"]) == 0
    assert "pretrained_model_name_or_path: some/model\n" in capsys.readouterr().out
    assert known_defaults(parse_args(["--pretrained_model_name_or_path", "some/model"])) == {}


def test_a_folder_that_is_no_model_is_said_in_one_line(tmp_path, capsys):
    assert script.load_script().main(["--pretrained_model_name_or_path", str(tmp_path), "--dump_config"]) == 2
    assert "is not a diffusers pipeline" in capsys.readouterr().err


def test_a_run_from_a_file_is_the_run_of_the_flags(write, tmp_path):
    photos = script.save_photos(tmp_path / "photos", [(64, 64), (80, 64)])
    flags = {"skip_blocks": "1,1", "rank": 3, "learning_rate": 1e-2, "max_train_steps": 2, "seed": 1}
    words = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    typed = script.train(TINY.folder, photos, tmp_path / "typed", *words)
    common = script.settings(TINY.folder, photos, tmp_path / "file")
    settings = dict(zip((word.removeprefix("--") for word in common[::2]), map(yaml.safe_load, common[1::2])))
    script.AcceleratorState._reset_state(reset_partial_state=True)
    assert script.load_script().main(["--config", write(**{**settings, **flags})]) == 0
    script.assert_same_weights(tmp_path / "file", typed)


def test_recipes_are_found_from_every_folder(write, tmp_path, capsys):
    assert parse_args(["--config", "configs/flux-12gb.yaml"]).skip_blocks == "17,0"
    with pytest.raises(SystemExit):
        parse_args(["--config", "configs/flux-13gb.yaml"])
    said = capsys.readouterr().err
    assert said.startswith(
        "error: --config configs/flux-13gb.yaml cannot be read: No such file or directory; recipes "
    )
    assert all(f"configs/flux-{size}gb.yaml" in said for size in (12, 16)) and said.count("\n") == 1
    # A file of one's own is the one that is meant.
    (tmp_path / "configs").mkdir()
    write(name="configs/flux-12gb.yaml", skip_blocks="3,0")
    assert parse_args(["--config", "configs/flux-12gb.yaml"]).skip_blocks == "3,0"
