"""`urlfast info`: what this installation has, and what it can use. The first thing to send with a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from urlfast import _core
from urlfast.envs import rendering
from urlfast.run import human_bytes, versions


def hardware() -> str:
    """The processor, its cores and its memory, and the GPU that torch can use."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    text = f"{model}, {len(os.sched_getaffinity(0))} cores, {human_bytes(memory())} memory"
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        text += f", {sys.modules['torch'].cuda.get_device_name()}"
    return text


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def collect(render: bool = True) -> dict:
    """All of it, as JSON would have it. Renderers are tried in processes of their own: one that fails may take its process with it."""
    import torch

    found = {"versions": versions(), "hardware": hardware(), "core": _core.build_info(), "environment": urlfast_variables()}
    usable = torch.cuda.is_available()
    found["torch"] = {"cuda": torch.version.cuda, "usable": usable, "threads": torch.get_num_threads()}
    found["atari_roms"] = count_roms()
    if render:
        found["renderers"] = {name: rendering.probe(name) for name in rendering.NEEDS}
        try:
            found["renderer"] = rendering.choose()
        except rendering.NoRenderer as error:
            found["renderer"] = str(error)
    return found


def urlfast_variables() -> dict[str, str]:
    """Of the process: those that change what urlfast does."""
    names = ("URLFAST_ISA", "URLFAST_NUM_THREADS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MUJOCO_GL", "ALE_ROMS_DIR")
    return {name: os.environ[name] for name in names if name in os.environ}


def count_roms() -> int:
    """Games that ale-py ships a ROM of; 0 where ale-py is not installed."""
    spec = find_spec("ale_py")
    return len(list(Path(spec.origin).parent.glob("roms/*.bin"))) if spec and spec.origin else 0


def text(found: dict) -> str:
    core, torch = found["core"], found["torch"]
    lines = [
        ("urlfast", f"{found['versions']['urlfast']}, built by {core['compiler']}"),
        ("machine", found["hardware"]),
        ("instruction sets", f"{core['isa']} chosen of {', '.join(core['isa_available'])} (compiled: {', '.join(core['isa_compiled'])})"),
        ("threads", f"{core['num_threads']} in the core, {torch['threads']} in torch"),
        ("CUDA, core", cuda_line(core)),
        ("CUDA, torch", f"{'usable' if torch['usable'] else 'not usable'}, built with {torch['cuda'] or 'none'}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "urlfast")),
        ("Atari", f"{found['atari_roms']} ROMs"),
    ]
    if "renderer" in found:
        lines.append(
            ("pixels, DMControl", f"drawn by {found['renderer']}" if found["renderer"] in found["renderers"] else found["renderer"])
        )
    for name, says in found.get("renderers", {}).items():
        lines.append((f"renderer {name}", says))
    if found["environment"]:
        lines.append(("environment", " ".join(f"{name}={value}" for name, value in found["environment"].items())))
    return "\n".join(f"{name:17} {says}" for name, says in lines)


def cuda_line(core: dict) -> str:
    if not core["cuda_compiled"]:
        return "not compiled in: build with -Ccmake.define.URLFAST_CUDA=ON"
    architectures = f"compiled for {core['cuda_architectures']}"
    return f"{architectures}, usable" if core["cuda_usable"] else f"{architectures}, not usable: {core['cuda_reason']}"


def main(argv: Sequence[str] | None = None) -> None:
    """`urlfast info`."""
    parser = argparse.ArgumentParser(prog="urlfast info", description=__doc__.partition(". ")[0].partition(": ")[2] + ".")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    found = collect()
    print(json.dumps(found, indent=1) if options.json else text(found))


if __name__ == "__main__":
    main()
