#!/usr/bin/env python3
"""Builds an emulated GPU into a folder: libcuda.so.1, which is the driver and has every launcher of cuda/ and cutlass-sys.

    tests/emulator/build.py FOLDER [--watched]

--watched: kernels tell of every access to memory, so that races and accesses beside it are seen (accesses.h), and take several times as long.

Needs g++ on x86-64. The kernels' sources are C++ but for what is replaced here; headers of CUDA and CUTLASS are those beside this file.
"""

import concurrent.futures
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
CUDA = HERE.parent.parent / "cuda"
CUTLASS = HERE.parent.parent / "cutlass-sys/src"
FLAGS = "-std=c++20 -O2 -w -fPIC -fno-strict-aliasing -ffp-contract=off -fvisibility=hidden".split()
FLAGS += ["-Wno-psabi", "-D__CUDA_ARCH_FEAT_SM90_ALL"]
# Hooks before every access, which accesses.cpp has, and lines of the sources for what it prints.
HOOKS = "-fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -g1".split()

# kernel<<<grid, threads, bytes, stream>>>(arguments);
LAUNCH = re.compile(r"(\w+(?:<[^<>;\n]*>)?)<<<(.*), ([^,\n]*), ([^,\n]*), (.*)>>>\((.*)\);")
DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")
# What must be in common.cuh, or kernels would neither start early nor count multiprocessors here, and nobody would notice.
INSTEAD = {
    "defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900": "true",
    "constexpr int MULTIPROCESSORS = 132;": "#define MULTIPROCESSORS emulated::multiprocessors()",
}
ASM = re.compile(r"\basm(?: volatile)?\(\s*")
STATIC_SHARED = re.compile(r"^( +)__shared__ ([^;]+);", re.MULTILINE)
STRING = re.compile(r'"([^"]*)"\s*')


def end_of(text: str, at: int) -> int:
    """Where the parenthesis closes that opens before `at`."""
    depth = 1
    while depth:
        if text[at] == '"':
            at = text.index('"', at + 1)
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at - 1


def without_asm(text: str) -> str:
    """asm("text" : "=r"(x) : "r"(y) : "memory") becomes ptx<"text">(x, y)."""
    done, at = [], 0
    while statement := ASM.search(text, at):
        end = end_of(text, statement.end())
        done.append(text[at : statement.start()])
        at = statement.end()
        words, operands = "", []
        while string := STRING.match(text, at, end):
            words += string[1].replace("\\n", " ")
            at = string.end()
        while string := STRING.search(text, at, end):
            at = string.end()
            if text[at] == "(":  # an operand, not what is clobbered
                operands.append(text[at + 1 : (close := end_of(text, at + 1))])
                at = close
        done.append(f'emulated::ptx<"{" ".join(words.split())}">({", ".join(operands)})')
        at = end + 1
    done.append(text[at:])
    return ('#include "ptx.h"\n' if len(done) > 1 else "") + "".join(done)


def as_cpp(text: str) -> str:
    """A kernel's source without what only nvcc understands."""

    def launch(match: re.Match) -> str:
        kernel, grid, threads, size, stream, arguments = match.groups()
        more = f", {arguments}" if arguments else ""
        return f"emulated_launch({grid}, {threads}, {size}, {stream}, {kernel}{more});"

    def static_shared(match: re.Match) -> str:
        indent, declaration = match.groups()
        names = re.findall(r"(\w+)(?:\[[^\]]*\])*(?=,|$)", declaration)
        kind = f"InShared_{'_'.join(names)}"
        return f"{indent}struct {kind} {{ {declaration}; }};\n{indent}auto& [{', '.join(names)}] = emulated::in_shared<{kind}>();"

    text = text.replace('"../../cuda/', '"')
    text = DYNAMIC_SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(emulated::block->shared);", text)
    text = STATIC_SHARED.sub(static_shared, text)
    for before, after in INSTEAD.items():
        text = text.replace(before, after)
    if "__cluster_dims__(BLOCKS, 1, 1)" in text:  # g++ has no attribute for it
        text = text.replace("config.numAttrs = 1;\n", "config.numAttrs = 1;\n  config.cluster = BLOCKS;\n")
        assert "config.cluster" in text
    return without_asm(LAUNCH.sub(launch, text))


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).resolve()
    sources = folder / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    watched = "--watched" in sys.argv[2:]
    compiled = sorted(HERE.glob("*.cpp"))
    common = (CUDA / "common.cuh").read_text()
    assert all(before in common for before in INSTEAD), "common.cuh"
    for path in sorted([*CUDA.iterdir(), *CUTLASS.glob("*.cu")]):
        to = sources / (path.stem + ".cpp" if path.suffix == ".cu" else path.name)
        to.write_text(as_cpp(path.read_text()))
        if path.suffix == ".cu":
            compiled.append(to)

    def compile_one(source: pathlib.Path) -> str:
        to = folder / (source.stem + ".o")
        flags = FLAGS + (HOOKS if watched and source.parent == sources else [f"-DWATCHED={int(watched)}", "-g1"])
        subprocess.run(["g++", *flags, f"-I{HERE}", f"-I{sources}", "-c", source, "-o", to], check=True)
        return str(to)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, compiled))
    library = folder / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-o", library, *objects], check=True)
    # The name under which a program is linked with it.
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)


if __name__ == "__main__":
    main()
