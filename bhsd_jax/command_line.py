"""The command line in the words of a user, turned into flags; and its help. Needs no JAX.

    bhsd VERB [RUN] [--config=NAME:WORDS] [--FIELD=VALUE ...]

`--FIELD` is a field of a config by its path (`--train.steps=100`), or one of the verb's own by its
name (`bhsd predict runs/cps --images=scans`).
"""

import dataclasses
import difflib
import functools
import importlib
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhsd_jax import configs, fields, overrides
from bhsd_jax.platform import files
from bhsd_jax.settings import RENAMED, Settings

VERBS = {  # in the order of the pipeline: what each does, the groups it reads, two examples
    "preprocess": (
        "checks a data set, plans, and writes shards of prepared scans",
        ("data", "preprocess"),
        (
            "bhsd preprocess runs/cps --config=cps:data=bhsd --data.root=/data/BHSD",
            "bhsd preprocess runs/check --config=supervised:data=dicom --verify_only=True",
        ),
    ),
    "train": (
        "fits a network to the shards; goes on where the run stopped",
        (
            *("split", "input", "windows", "augment", "model", "precision", "loss", "objective"),
            *("slice_loss", "optimizer", "train", "mesh", "seed"),
        ),
        (
            "bhsd train runs/cps --config=cps:data=bhsd --input.labeled=4",
            "bhsd train runs/cps",
        ),
    ),
    "predict": (
        "label maps of scans, on their own voxels",
        ("predict", "infer", "mesh"),
        (
            "bhsd predict runs/cps /data/new_scans /data/label_maps",
            "bhsd predict runs/cps --checkpoint=last --infer.mirror=False",
        ),
    ),
    "evaluate": (
        "scores label maps against masks: cases.csv and summary.json",
        ("evaluate",),
        (
            "bhsd evaluate runs/cps",
            "bhsd evaluate runs/cps --predictions=/data/label_maps --references=/data/masks",
        ),
    ),
    "report": (
        "writes one page with tables, curves and pictures",
        ("report",),
        ("bhsd report runs/cps", "bhsd report runs/cps --compare=runs/suponly,runs/ict"),
    ),
    "calibrate": (
        "fits one temperature for the probabilities to the validation scans: calibration.json",
        ("predict", "infer"),
        ("bhsd calibrate runs/cps", "bhsd calibrate runs/cps --config.infer.mirror=False"),
    ),
    "info": (
        "prints what a run is: classes, spacing, windows, license, training data, scores",
        (),
        ("bhsd info runs/cps", "bhsd info runs/cps --json"),
    ),
    "config": (
        "prints the resolved config, a field a line",
        (),
        ("bhsd config --config=cps:data=bhsd", "bhsd config runs/cps"),
    ),
}
LATER = ("predict", "evaluate", "report", "calibrate", "info")  # verbs on a run that was trained
EXIT_CODES = {
    0: "done",
    1: "the input, the config or the machine must be mended: one line says what",
    2: "the command line was not understood",
    75: "asked to stop, saved: start the same command again to go on",
    130: "interrupted",
}
_PLACES = {"predict": ("images", "out")}  # what words after the run folder stand for
_FREE = overrides.PACKAGES  # groups whose fields are those of what they name
_WORDS_ONLY = ("preset", "task")  # what a config was made with: its other fields follow from them
_OWN_FLAGS = (
    *("config", "workdir", "json", "v", "verbosity"),
    *("alsologtostderr", "logtostderr", "log_dir"),
)
_WIDTH = 100


class UsageError(Exception):
    """The command line is not understood; the text is one line."""


@dataclass(frozen=True)
class Command:
    """A verb with the flags for absl, or a text to print instead."""

    verb: str
    flags: tuple[str, ...]  # for absl, `--config=` among them unless there is none
    text: str = ""  # to print instead of doing anything


def parse(words: Sequence[str], version: str) -> Command:
    """Reads the words after the program's name.

    Raises:
        UsageError: If a word, a flag or a field is not known, or nothing says which config.
    """
    names, given = _split(words)
    if "help" in given or "h" in given or not words:
        return Command("", (), help_on(names[0] if names and names[0] in VERBS else ""))
    if "version" in given:
        return Command("", (), f"bhsd_jax {version}\n")
    verb, *folders = names or ["train"]
    if verb not in VERBS:
        raise UsageError(f"no verb {verb}{_near(verb, VERBS)}; there are {', '.join(VERBS)}")
    if "workdir" in given:
        folders.insert(0, given["workdir"])
    given |= _places(verb, folders, given)
    if "json" in given and verb != "info":
        raise UsageError("--json is for `bhsd info`")
    # The config file comes first: absl knows its fields only when it has been read.
    flags = {"config": _config_of(verb, given)}
    flags |= {
        _full_name(name, verb, value): files.keep_whole(value) if _is_list(name, (verb,)) else value
        for name, value in given.items()
        if name != "config"
    }
    return Command(verb, tuple(f"--{name}={value}" for name, value in flags.items()))


def _places(verb: str, words: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Flags that the words after the verb stand for: the run folder, then what the verb takes."""
    fields = _PLACES.get(verb, ())
    if len(words) > 1 + len(fields):
        if not fields:
            raise UsageError(f"{verb} takes one run folder; got {' and '.join(words)}")
        takes = ", ".join(fields)
        raise UsageError(f"{verb} takes a run folder, {takes}; got {' and '.join(words)}")
    found = dict(zip(("workdir", *fields), words, strict=False))
    for name in fields:
        twice = {name, f"{verb}.{name}", f"config.{verb}.{name}"} & given.keys()
        if name in found and twice:
            raise UsageError(
                f"{verb}: {found[name]} and --{min(twice, key=len)} both name {name}; leave one out"
            )
    return found


def find_config(given: str) -> str:
    """`FILE:WORDS` for a path, or for the name of an experiment file that comes with the package.

    The folder of a run, or its config.json, stands for the config of that run.

    Raises:
        UsageError: If there is neither; lists the names.
    """
    name, colon, words = given.partition(":")
    run = Path(name).parent if Path(name).name == "config.json" else Path(name)
    if (run / "config.json").is_file():
        return f"{find_config('from_run')}:{run}"
    if Path(name).is_file():
        return given
    bare = name.removeprefix("configs/").removesuffix(".py")
    for folder in configs.__path__:
        if "/" not in bare and (Path(folder) / f"{bare}.py").is_file():
            return f"{Path(folder) / bare}.py{colon}{words}"
    known = names_of_configs()
    raise UsageError(
        f"--config: no file {name}, and no experiment of this name{_near(bare, known)}; there are "
        f"{', '.join(known)}"
    )


def names_of_configs() -> list[str]:
    """Experiment files that come with the package."""
    helpers = {"__init__", "common", "backbones", "tables", "from_run"}
    found = {path.stem for folder in configs.__path__ for path in Path(folder).glob("*.py")}
    return sorted(found - helpers)


def help_on(verb: str) -> str:
    """The help of one verb, or of the program."""
    return "\n".join(_verb_help(verb) if verb else _overview()) + "\n"


def kind_of(path: str) -> str:
    """What a field holds, in words; "" of one that is not known."""
    return next((field.kind for field in _described() if field.path == path), "")


def config_lines(config: Settings) -> Iterator[str]:
    """A resolved config, a field a line: what `bhsd config` prints."""
    about = {field.path: field.about for field in _described()}
    for path, value in _leaves(dataclasses.asdict(config)):
        line = f"{path} = {value!r}"
        yield f"{line:<44}  # {about[path]}" if about.get(path) else line


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words and flags; `--flag value` is `--flag=value`, and `--flag` alone is true."""
    names: list[str] = []
    given: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            names.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not equals:
            takes = bool(rest) and not rest[0].startswith("--") and name not in ("help", "h")
            if takes and (name == "json" or _holds("True or False", name, names)):  # else a folder
                takes = rest[0].lower() in ("true", "false", "t", "f", "1", "0", "yes", "no")
            value = rest.pop(0) if takes else "True"
        if name in given and _is_list(name, names):
            raise UsageError(
                f"--{name} is given twice, {given[name]} and {value}; give all at once: "
                f"--{name}={given[name]},{value}"
            )
        given[name] = at_home(value)
    return names, given


def at_home(word: str) -> str:
    """The word with `~/` replaced by the home folder wherever a path may begin in it.

    A shell does that at the beginning of a word alone: `--workdir=~/runs` would make a folder `~`.
    """
    home = os.path.expanduser("~")
    return re.sub(r"(?<![^=,:(\['\"])~(?=/)", lambda _: home, word)


def _is_list(name: str, names: Sequence[str]) -> bool:
    """Whether a flag takes any number of words: of two such flags none may be lost."""
    return _holds("(text, ...)", name, names)


def _holds(kind: str, name: str, names: Sequence[str]) -> bool:
    """Whether a flag is of a field of that kind, by its path or by its name within the verb."""
    field = name.removeprefix("config.")
    return any(kind_of(p) == kind for p in (field, *(f"{verb}.{field}" for verb in names[:1])))


def _full_name(name: str, verb: str, value: str) -> str:
    """The flag that a user's flag stands for.

    Raises:
        UsageError: If it is none, names the nearest; or a word of a config, or a whole group.
    """
    if name in _OWN_FLAGS:
        return name
    paths = [field.path for field in _described()]
    field = name.removeprefix("config.")
    if field in _WORDS_ONLY:
        raise UsageError(
            f"--{name} changes nothing once a config is made; say it as a word of its name: "
            f"--config=NAME:{field}=VALUE"
        )
    if name == field and f"{verb}.{field}" in paths:
        return f"config.{verb}.{field}"
    group = field.partition(".")[0]
    if group == field and not value.lstrip().startswith("{"):
        _require_no_word(name, field, value)
    if field in paths or (group in _FREE and field != group):
        return f"config.{field}"
    if group in RENAMED:
        raise UsageError(f"--{name} is called --{RENAMED[group]}{field.removeprefix(group)} now")
    own = [path.removeprefix(f"{verb}.") for path in paths]
    if not any(path.endswith(f".{field}") for path in paths):
        own += (path for path in overrides.paths_in_classes() if path.endswith(f".{field}"))
    text = f"no field --{name}{_near(field, [*paths, *own])}"
    raise UsageError(f"{text}; `bhsd {verb} --help` lists them")


def _require_no_word(name: str, field: str, value: str) -> None:
    """Refuses as flags the words of a config's name, and what names a class by its group alone."""
    common: Any = importlib.import_module("bhsd_jax.configs.common")
    if field in common.WORDS:
        word = field if isinstance(common.WORDS[field], bool) else f"{field}={value}"
        raise UsageError(f"--{name} is a word of a config's name: --config=NAME:{word}")
    if field in _FREE:
        backbone = f", or a backbone with --config=NAME:backbone={value}" * (field == "model")
        raise UsageError(
            f"--{name} is a group of fields: name a class by --{name}.name=...{backbone}"
        )


def _config_of(verb: str, given: Mapping[str, str]) -> str:
    """The config that is named, or that of the run that is."""
    if "config" in given:
        return find_config(given["config"])
    folder = given.get("workdir")
    if folder and (Path(folder) / "config.json").is_file():
        return f"{find_config('from_run')}:{folder}"
    if folder and verb in LATER:
        raise UsageError(
            f"{verb}: {folder} holds no config.json; name the folder of a run that was trained or "
            "imported"
        )
    where = f"; {folder} holds no config.json" if folder else ""
    raise UsageError(f"{verb} needs --config=NAME, one of {', '.join(names_of_configs())}{where}")


def _near(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    found = [name for name in known if name.endswith(f".{word.strip('-')}")]
    found = sorted(set(found)) or difflib.get_close_matches(word, known, n=1)
    return f", did you mean {' or '.join(found)}?" if found else ""


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, where)
        else:
            yield where, value


def _overview() -> Iterator[str]:
    yield "bhsd: 3D segmentation of intracranial hemorrhage on head CT: training, evaluation, use"
    yield ""
    yield "  bhsd VERB [RUN] [--config=NAME:WORDS] [--FIELD=VALUE ...]"
    yield ""
    yield "Verbs, in the order of their use:"
    for verb, (what, _, _) in VERBS.items():
        yield f"  {verb:<11} {what}"
    yield ""
    yield "RUN is the folder of a run, by default runs/<name of the config>. A run that was trained"
    yield "knows its config: later verbs need no --config. Without a verb, bhsd --config=... trains"
    yield ""
    yield f"Experiments: {', '.join(names_of_configs())}; or the path of a file of your own."
    yield ""
    yield "First steps, on generated scans:"
    yield "  bhsd preprocess runs/first --config=cps:smoke"
    yield "  bhsd train runs/first --config=cps:smoke"
    yield "  bhsd predict runs/first && bhsd evaluate runs/first && bhsd report runs/first"
    yield ""
    yield "More: bhsd VERB --help, bhsd config --config=NAME, bhsd --version"
    yield ""
    yield "Exit codes:"
    for code, meaning in EXIT_CODES.items():
        yield f"  {code:>3}  {meaning}"


def _verb_help(verb: str) -> Iterator[str]:
    common: Any = importlib.import_module("bhsd_jax.configs.common")

    what, groups, examples = VERBS[verb]
    places = "".join(f" [{name.upper()}]" for name in _PLACES.get(verb, ()))
    yield f"bhsd {verb} [RUN]{places} [--config=NAME:WORDS] [--FIELD=VALUE ...]"
    yield f"  {what}"
    yield ""
    yield "Examples:"
    yield from (f"  {example}" for example in examples)
    yield ""
    yield "Words after the name of a config, separated by commas:"
    for word, about in common.ABOUT.items():
        yield from _entry(word, about)
    yield ""
    yield "Fields with their defaults; an experiment may change them (bhsd config shows it):"
    for field in (field for group in groups for field in _described() if _is_in(field, group)):
        name = field.path.removeprefix(f"{verb}.")
        free = field.path in _FREE
        default = "" if free or field.path in ("seed",) else f"={_short(field.default)}"
        yield from _entry(f"--{name}{'.*' if free else default}", f"{field.about} [{field.kind}]")


@functools.cache
def _described() -> tuple[fields.Field, ...]:
    return tuple(fields.describe(Settings))


def _is_in(field: fields.Field, group: str) -> bool:
    return field.path.partition(".")[0] == group


def _short(value: Any) -> str:
    text = repr(value) if value != "" else "''"
    return text if len(text) <= 30 else "..."


def _entry(name: str, about: str) -> Iterator[str]:
    lines = textwrap.wrap(about, _WIDTH - 36)
    if len(name) > 32:
        yield f"  {name}"
        name = ""
    for line in lines:
        yield f"  {name:<33} {line}"
        name = ""
