#!/usr/bin/env python3
"""Builds an emulated GPU into a folder: libcuda.so.1, which is the driver and has every launcher of cuda/ that is not Hopper's own.

    tests/emulator/build.py FOLDER

Needs g++ on x86-64. The kernels' sources are C++ but for what is replaced here; headers of CUDA are those beside this file.
"""

import concurrent.futures
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
CUDA = HERE.parent.parent / "cuda"
HOPPERS_OWN = {"attention_sm90", "attention_mla"}
FLAGS = "-std=c++20 -O2 -w -fPIC -fno-strict-aliasing -ffp-contract=off -fvisibility=hidden".split()

# kernel<<<grid, threads, bytes, stream>>>(arguments);
LAUNCH = re.compile(r"(\w+(?:<[^<>;\n]*>)?)<<<(.*), ([^,\n]*), ([^,\n]*), (.*)>>>\((.*)\);")
DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")
PREFETCH = re.compile(r'asm volatile\("prefetch.*?;\n')
STATIC_SHARED = re.compile(r"^( +)__shared__ ([^;]+);", re.MULTILINE)
POWER = re.compile(r"__device__ inline float power\(float x\) \{.*?\n\}\n", re.DOTALL)


def as_cpp(name: str, text: str) -> str:
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

    if name == "mma.cuh":
        return (HERE / name).read_text()
    if name == "softmax.cuh":
        text, found = POWER.subn("inline float power(float x) { return x < -126.0f ? 0.0f : exp2f(x); }\n", text)
        assert found == 1, "power(x) of softmax.cuh"
    text = PREFETCH.sub(";\n", text)
    text = DYNAMIC_SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(emulated::block->shared);", text)
    text = STATIC_SHARED.sub(static_shared, text)
    text = text.replace("defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900", "true")
    return LAUNCH.sub(launch, text)


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).resolve()
    sources = folder / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    compiled = [HERE / "machine.cpp", HERE / "grid.cpp", HERE / "driver.cpp"]
    for path in sorted(CUDA.iterdir()):
        to = sources / (path.stem + ".cpp" if path.suffix == ".cu" else path.name)
        to.write_text(as_cpp(path.name, path.read_text()))
        if path.suffix == ".cu" and path.stem not in HOPPERS_OWN:
            compiled.append(to)

    def compile_one(source: pathlib.Path) -> str:
        to = folder / (source.stem + ".o")
        subprocess.run(["g++", *FLAGS, f"-I{HERE}", f"-I{sources}", "-c", source, "-o", to], check=True)
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
