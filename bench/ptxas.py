"""What the CUDA compiler says of every kernel: registers, shared memory, stack and spills, as a table.

python bench/ptxas.py [--arch 80 90] [--out docs/ptxas.md]      needs nvcc, no GPU; names the kernels that spill
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O3", "--extra-device-vectorization", "--Werror=all-warnings", "-Xptxas", "-v"]  # as CMakeLists.txt has them
SM_REGISTERS, SM_THREADS = 65536, 2048  # of a multiprocessor, sm_80 and sm_90
BLOCK = {"append": 128, "rank": 128, "search_deep": 512, "change_leaves_by_priority": 1024}  # threads of a block, where not 256


def compile_report(source, architectures):
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, *codes, f"-I{ROOT / 'csrc'}", "-Xcompiler=-fPIC", '-DURLFAST_CUDA_ARCHITECTURES=""', "-c", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source}: nvcc failed\n{done.stderr}")
    return done.stderr


def kernels(report):
    """(name, architecture) -> (registers, stack, spilled bytes, shared bytes), of the entry functions of one report."""
    found, current = {}, None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", line):
            current, memory = (match[1], match[2]), None
        elif current and memory is None and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)):
            memory = [int(n) for n in match.groups()]
        elif current and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[current] = (int(match[1]), memory[0], memory[1] + memory[2], int(shared[1]) if shared else 0)
            current = None
    return found


def readable(names):
    """Demangled, without namespaces and arguments."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"urlfast::|\(anonymous namespace\)::|void |__nv_|\(urlfast.*", "", name) for name in plain]
    return dict(zip(names, [re.sub(r"\(.*", "", name).replace(" >", ">") for name in short], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "ptxas.md")
    options = parser.parse_args()
    version = re.search(r"release (\S+),", subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout)[1]
    lines = [
        "# The kernels, as the compiler sees them",
        "",
        f"`python bench/ptxas.py --arch {' '.join(options.arch)}`, CUDA {version}. Registers of a thread, bytes of static shared",
        "memory of a block (`first_pass` takes 65,536 more at its launch), bytes of stack and of spills, and the warps of a",
        "multiprocessor that the registers leave room for, of 64.",
    ]
    spilled = []
    for source in sorted(ROOT.glob("csrc/*/*.cu")):
        found = kernels(compile_report(source, options.arch))
        names = readable(sorted({name for name, _ in found}))
        head = " | ".join(f"sm_{a}: registers | shared | stack | spills | warps" for a in options.arch)
        lines += ["", f"## {source.relative_to(ROOT)}", "", f"| kernel | {head} |", "|" + "---|" * (1 + 5 * len(options.arch))]
        for name in sorted(names, key=names.get):
            cells = []
            for a in options.arch:
                registers, stack, spills, shared = found[name, a]
                block = BLOCK.get(re.sub(r"<.*", "", names[name]), 256)
                blocks = min(SM_REGISTERS // (-(-registers // 8) * 8 * block), SM_THREADS // block)
                cells += [registers, shared, stack, spills, blocks * block // 32]
                spilled += [f"{names[name]} on sm_{a}"] * bool(spills)
            lines.append(f"| `{names[name]}` | {' | '.join(map(str, cells))} |")
    options.out.write_text("\n".join(lines) + "\n")
    print(options.out)
    if spilled:
        print("spills: " + ", ".join(spilled))


if __name__ == "__main__":
    main()
