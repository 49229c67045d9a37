"""Drawing without a display: which of MuJoCo's renderers works here.

EGL draws with a GPU or, by Mesa, without one; OSMesa never needs a GPU. Whether one works is only seen by trying, and trying may end the
process and cannot be taken back: so each is tried in a process of its own, and the choice is given to other processes in their environment.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from importlib.util import find_spec

NEEDS = {  # what each needs, on Debian
    "egl": "apt install libegl1 libegl-mesa0 libgl1-mesa-dri, or a GPU's driver",
    "osmesa": "apt install libosmesa6",
    "glfw": "needs a display",
}
_TRIED = ("egl", "osmesa")  # in this order, where MUJOCO_GL does not say which
_NONE = ("off", "disable", "disabled", "false", "0")  # dm_control's words for no renderer
_PROBE = """
from dm_control import mujoco
physics = mujoco.Physics.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>")
print("works" if physics.render(16, 16).any() else "black")
physics.free()
"""


class NoRenderer(ValueError):
    """Nothing here can draw; the message says what is missing."""


def choose() -> str:
    """The renderer that MUJOCO_GL names, else EGL, else OSMesa, if it works.

    Raises NoRenderer where none does. The first call takes about a second.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted in _NONE:
        raise NoRenderer(f"no renderer: MUJOCO_GL={wanted} forbids drawing; unset it. States need none.")
    said = []
    for renderer in (wanted,) if wanted else _TRIED:
        if (says := probe(renderer)) == "works":
            return renderer
        said.append(f"{renderer} {says}")
    unset = f" MUJOCO_GL={wanted} is set: without it, {' and '.join(_TRIED)} are tried." if wanted else ""
    raise NoRenderer(f"no renderer works here: {'; '.join(said)}.{unset} States need none.")


@functools.cache
def probe(renderer: str) -> str:
    """'works', or why dm_control cannot draw with it. Tried once."""
    if find_spec("dm_control") is None:
        return "fails (dm_control is not installed)"
    environment = {**os.environ, **variables(renderer)}
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0 and "works" in done.stdout:
        return "works"
    errors = re.findall(r"^[\w.]*(?:Error|Exception): .*$", done.stderr, re.MULTILINE)
    reason = "its picture is black" if "black" in done.stdout else errors[-1] if errors else f"exit status {done.returncode}"
    return f"fails ({NEEDS.get(renderer, 'no renderer of dm_control')}): {reason}"


def variables(renderer: str | None) -> dict[str, str]:
    """The environment of a process in which MuJoCo draws with `renderer`, or (None) loads no OpenGL at all."""
    platform = renderer if renderer in _TRIED else ""
    return {"MUJOCO_GL": renderer or "disabled", "PYOPENGL_PLATFORM": platform}
