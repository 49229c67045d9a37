"""The commands as a person meets them: in processes of their own, `urlfast X` and `python -m urlfast.X`."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import toy_run

from urlfast import info
from urlfast.run import flat
from urlfast.train import PRESETS, parse


def urlfast(*arguments, module="urlfast", **variables):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=toy_run.environment(**variables), capture_output=True, text=True)


def test_help_names_every_command():
    done = urlfast("--help")
    assert done.returncode == 0
    for command in ("train", "transfer", "sweep", "evaluate", "report", "info"):
        assert f"\n  {command} " in done.stdout


def test_a_reader_that_has_seen_enough_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "urlfast"], env=toy_run.environment(), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and not done.stderr


def test_an_interrupt_while_a_command_loads_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")  # in place of seconds of loading
    environment = toy_run.environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "urlfast", "train"],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it runs in the background
    )
    assert done.returncode == 130 and not done.stderr


def test_an_unknown_command_is_answered_with_the_nearest():
    done = urlfast("trian")
    assert done.returncode == 2 and done.stderr.startswith("urlfast: unknown command 'trian', did you mean 'train'?")


def test_version():
    assert urlfast("--version").stdout == f"urlfast {info.versions()['urlfast']}\n"


def test_train_says_what_is_wrong():
    done = urlfast("train", "aptt", "atari")
    assert done.returncode == 2 and done.stderr.startswith("urlfast train: unknown method 'aptt', did you mean 'apt'?")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize("command, arguments, status, says", [
    ("train", [], 0, "apt"),
    ("train", ["apt", "gym", "--help"], 0, "(default: '')"),
    ("train", ["apt", "atari", "--lerner.lr", "1"], 2, "--learner.lr"),
    ("train", ["apt", "atari", "--steps", "0"], 2, "steps: must be at least 1, got 0"),
    ("train", ["apt", "atari", "--env.game", "mspackman"], 2, "ms_pacman"),
    ("train", ["apt", "dmc", "--env.task", "walker_wlak"], 2, "walker_walk"),
    ("train", ["apt", "gym", "--env.id", "CartPol-v1"], 2, "CartPole"),
    ("train", ["ddpg", "gym", "--env.id", "CartPole-v1"], 2, "takes no discrete actions"),
    ("train", ["--resume", "absent"], 2, "no run 'absent'"),
    ("train", ["--resume", "strange"], 2, "is not a run of urlfast"),
    ("train", ["--resume", "run"], 1, "has no checkpoint that can be read"),
    ("train", ["toy", "corridor", "--runs", "file/x"], 1, "--runs: cannot write to"),
    ("transfer", [], 2, "which run?"),
    ("transfer", ["absent"], 2, "no run 'absent'"),
    ("transfer", ["strange"], 2, "is not a run of urlfast"),
    ("transfer", ["run", "--rule", "hole"], 2, "did you mean 'whole'"),
    ("transfer", ["run", "--task", "pnog"], 2, "pong"),
    ("transfer", ["run", "--lerner.lr", "1"], 2, "--learner.lr"),
    ("transfer", ["run", "--checkpoint", "41"], 2, "has none of step 41"),
    ("transfer", ["run"], 1, "has no checkpoint that can be read"),
    ("evaluate", [], 2, "RUN: name at least one"),
    ("evaluate", ["run", "absent"], 2, "no run 'absent'"),
    ("evaluate", ["strange"], 2, "is not a run of urlfast"),
    ("evaluate", ["run", "--episods", "1"], 2, "--episodes"),
    ("evaluate", ["run", "--episodes", "0"], 2, "episodes: must be at least 1, got 0"),
    ("evaluate", ["run", "--checkpoint", "41"], 2, "has none of step 41"),
    ("evaluate", ["run"], 1, "has no checkpoint that can be read"),
    ("report", [], 2, "RUN: name at least one"),
    ("report", ["absent"], 2, "no run 'absent'"),
    ("report", ["strange"], 2, "is not a run of urlfast"),
    ("report", ["run", "--out", "absent/x.html"], 2, "--out: absent is no folder"),
    ("report", ["begun"], 1, "no run of this sweep has begun"),
    ("sweep", [], 2, "FILE|NAME"),
    ("sweep", ["absent.json"], 2, "No such file"),
    ("sweep", ["absent"], 2, "no file 'absent'"),
    ("sweep", ["list.json", "--jobs", "0"], 2, "jobs: must lie in 1..4096, got 0"),
    ("sweep", ["list.json", "--rows", "c"], 2, "no row 'c'"),
    ("sweep", ["list.json"], 2, "did you mean 'apt'"),
    ("info", ["--jsno"], 2, "--jsno"),
])  # fmt: skip
def test_what_was_typed_wrong_ends_in_2_and_what_else_fails_in_1(command, arguments, status, says, capsys, monkeypatch, tmp_path):
    """In the folder: `run` has no checkpoint, `strange` is somebody else's, the sweep `begun` has no run, list.json a misspelt method."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "run/config.json": {"method": "apt", "domain": "atari", "config": asdict(PRESETS["apt", "atari"]["paper"])},
        "strange/config.json": {"name": "someone else"},
        "begun/sweep.json": {"rows": []},
        "list.json": {"rows": [{"name": "a", "train": "aptt atari"}]},
        "file": {},
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(f"urlfast.{command}").main(arguments)
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).replace("│", " ").split())
    assert (exit.value.code or 0) == status and says in text


@pytest.mark.parametrize("pair", PRESETS)
def test_help_explains_every_option(pair, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")  # one column
    for preset in PRESETS[pair].values():
        with pytest.raises(SystemExit):
            parse(preset, ["--help"], "urlfast train")
        text = re.sub(r"[│─╭╰╮╯\s]+", " ", capsys.readouterr().out)
        for group in {option.split(".")[0] for option in flat(preset) if "." in option}:
            assert re.search(rf" {group} options [- ]*[A-Z]\w*,? ", text), f"{group}: not explained"
        for option in flat(preset):
            says = re.search(rf" --{re.escape(option)},? (.*?)\(default: ", text)
            words = re.sub(r"\{.*?\}|\[.*?\]|--\S+|[A-Z]+", "", says[1])  # the source of a value explains nothing
            assert re.search(r"[a-z]{2}", words), f"--{option}: {says[0]}"


def test_help_names_presets_and_resume_and_says_what_brackets_mean():
    text = " ".join(urlfast("train", "apt", "atari", "--help").stdout.split())
    for words in ("--preset NAME (paper, mini_apt)", "--resume RUN", "[In brackets]: the paper"):
        assert words in text


def test_info(tmp_path):
    """With a dm_control that draws with EGL alone, in a process that has that instead of the real one."""
    (tmp_path / "dm_control.py").write_text(
        "import os\n"
        "class mujoco:\n"
        "    class Physics:\n"
        "        @classmethod\n"
        "        def from_xml_string(cls, text):\n"
        "            if os.environ['MUJOCO_GL'] != 'egl': raise ImportError('no ' + os.environ['MUJOCO_GL'])\n"
        "            return cls()\n"
        "        def render(self, height, width): return self\n"
        "        def any(self): return True\n"
        "        def free(self): pass\n"
    )
    path = f"{tmp_path}{os.pathsep}{toy_run.environment()['PYTHONPATH']}"
    done = urlfast("--json", module="urlfast.info", URLFAST_ISA="baseline", MUJOCO_GL="osmesa", PYTHONPATH=path)
    found = json.loads(done.stdout)
    assert found["core"]["isa"] == "baseline" and "baseline" in found["core"]["isa_compiled"]
    assert found["environment"]["URLFAST_ISA"] == "baseline"
    assert found["atari_roms"] > 50 and found["versions"]["torch"]
    assert found["renderers"] == {
        "egl": "works",
        "osmesa": "fails (apt install libosmesa6): ImportError: no osmesa",
        "glfw": "fails (needs a display): ImportError: no glfw",
    }
    assert found["renderer"].startswith("no renderer works here: osmesa fails (apt install ")
    text = info.text(found)
    assert "instruction sets  baseline chosen" in text and "CUDA, core" in text and "ROMs" in text and "pixels, DMControl " in text
