"""Build of the compiled modules; everything else about the package is in pyproject.toml.

Switches, all from the environment:

    TORSION_BUILD         auto (default) | cpu | cuda | none;  FORCE_CUDA=1 means cuda
    TORSION_SANITIZE      e.g. address,undefined: host code instrumented, for tests and audits only
    TORCH_CUDA_ARCH_LIST  default "8.0;9.0+PTX" where no GPU is visible, else torch's choice for the GPUs that are
    CXXFLAGS              come last; -O0 compiles in a third of the time
    MAX_JOBS, CXX, CUDA_HOME   as in torch.utils.cpp_extension

auto builds the CUDA module where a CUDA torch and a matching toolkit are installed; no mode asks for a GPU.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
DEFAULT_ARCHS = "8.0;9.0+PTX"

ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
# Without these three the SIMD levels, the thread counts and the CUDA build would no longer agree bit for bit.
NUMERICS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
COMMON = ["-std=c++20", "-g0", "-fvisibility=hidden", *NUMERICS]
NVCC = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-fmad=false", "-DUSE_CUDA", ABI[0]]
NVCC += ["-Xcompiler=-ffp-contract=off,-fvisibility=hidden"]


def stop(message: str) -> NoReturn:
    raise SystemExit(f"torsion: {message}")


def build_mode() -> str:
    if os.environ.get("FORCE_CUDA") == "1":
        return "cuda"
    mode = os.environ.get("TORSION_BUILD", "auto").strip().lower() or "auto"
    if mode not in MODES:
        stop(f"TORSION_BUILD={mode!r} is not a build mode; use one of {', '.join(MODES)}")
    return mode


def macros_of(cxx: str) -> dict[str, str]:
    probe = subprocess.run([*cxx.split(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    return dict(re.findall(r"#define (__\w+__) (.*)", probe.stdout))


def check_compiler() -> str:
    """Choose the compiler; return one line that names it, or stop with the remedy."""
    without = "or set TORSION_BUILD=none for pure Python and Triton without compiled modules"
    wanted = os.environ.get("CXX")
    candidates = [c for c in ([wanted] if wanted else ["c++", "g++"]) if shutil.which(c.split()[0])]
    if not candidates:
        named = f" (CXX={wanted})" if wanted else ""
        stop(f"no C++ compiler found{named}; install one (Debian: g++, Fedora: gcc-c++), {without}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop(f"Python.h not found; install the headers (Debian: python3-dev, Fedora: python3-devel), {without}")
    # gcc alone: the kernels' target attributes are its own, and clang's OpenMP calls are not in torch's libgomp.
    known = {cxx: macros_of(cxx) for cxx in candidates}
    cxx = next((c for c, m in known.items() if "__GNUC__" in m and "__clang__" not in m), None)
    if cxx is None:
        stop(f"{' and '.join(candidates)} is not gcc; install gcc >= 11 and set CXX=g++, {without}")
    major, version = int(known[cxx]["__GNUC__"]), known[cxx]["__VERSION__"].strip('"')
    if major < 11:
        stop(f"{cxx} is gcc {version} and C++20 needs gcc >= 11; set CXX= to a newer one, {without}")
    if major == 11:
        print("torsion: gcc 11 builds correct but slower CPU kernels; gcc >= 12 gives full speed", file=sys.stderr)
    # setuptools would link with the compiler Python was built with, which may not be installed.
    os.environ["CXX"] = cxx
    return f"gcc {version}"


def why_no_cuda(torch, cuda_home: str | None) -> str:
    """Return why the CUDA module cannot be built here, or an empty string."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    if cuda_home is None or not nvcc.exists():
        return f"torch is built for CUDA {torch.version.cuda}, but no CUDA toolkit was found (set CUDA_HOME)"
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", text)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        release = found[1] if found else "of unknown version"
        return f"torch is built for CUDA {torch.version.cuda} and the toolkit in {cuda_home} is {release}"
    return ""


def commit() -> str:
    """Return the commit this tree was built from, or an empty string outside a checkout."""

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    # An unpacked sdist inside somebody else's checkout must not claim their commit.
    top = git("rev-parse", "--show-toplevel")
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if top and Path(top) == ROOT else ""


def stop_for(package: str) -> NoReturn:
    stop(
        f"{package} is needed to build and is not installed. Type:\n"
        "  pip install torch==2.13.0 setuptools ninja pybind11\n"
        "  pip install --no-build-isolation .\n"
        "(or TORSION_BUILD=none pip install . for pure Python and Triton)"
    )


def find_ninja() -> None:
    """Put ninja on PATH, where alone torch looks; a virtual environment need not be activated."""
    try:
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    except ImportError:
        if shutil.which("ninja") is None:
            stop_for("ninja")


def pybind11_include(torch_include: Path) -> str:
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        # torch ships a copy, which is all there is on a machine that has torch and no network.
        if (torch_include / "pybind11/pybind11.h").exists():
            return str(torch_include)
        stop_for("pybind11")


def native(mode: str) -> dict:
    if mode == "none":
        return {}
    try:
        import torch
        from setuptools import Extension
        from torch.utils import cpp_extension
    except ImportError as error:
        stop_for(error.name or "torch")
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 11):
        stop(f"torch {torch.__version__} is too old; install torch >= 2.11")
    compiler = check_compiler()
    find_ninja()

    cuda_missing = "TORSION_BUILD=cpu" if mode == "cpu" else why_no_cuda(torch, cpp_extension.CUDA_HOME)
    if mode == "cuda" and cuda_missing:
        stop(f"TORSION_BUILD=cuda cannot be done: {cuda_missing}")
    with_cuda = not cuda_missing
    if with_cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)

    opt, link = ["-O3"], ["-Wl,--as-needed"]
    sanitize = os.environ.get("TORSION_SANITIZE", "")
    if sanitize:
        opt = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"]
        link.append(f"-fsanitize={sanitize}")
    # Not at the link: the GOMP symbols then resolve to the OpenMP runtime torch has loaded, under whatever name
    # its wheel gave it, so that torch.set_num_threads governs ours and the process holds one pool of threads.
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() else []

    def sources(*patterns: str) -> list[str]:
        return sorted(os.path.relpath(f, ROOT) for p in patterns for f in glob(str(ROOT / p)))

    cxx = [*COMMON, *opt, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    include = [str(ROOT / "csrc")]
    torch_include = Path(torch.__file__).parent / "include"
    headers = sources("csrc/**/*.h", "csrc/**/*.cuh")
    stable = dict(include_dirs=include, depends=headers, py_limited_api=True, extra_link_args=link)
    extensions = [
        cpp_extension.CppExtension(
            "torsion._C",
            ["csrc/ops.cpp", *sources("csrc/cpu/*.cpp")],
            extra_compile_args={"cxx": [*cxx, *openmp, *ABI]},
            **stable,
        ),
        # Not a CppExtension: this module links nothing of torch; of its headers it takes DLPack's, which is plain C.
        Extension(
            "torsion._plan",
            sources("csrc/pybind/*.cpp"),
            include_dirs=[pybind11_include(torch_include), str(torch_include), *include],
            depends=headers,
            language="c++",
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
        ),
    ]
    if with_cuda:
        extensions.append(
            cpp_extension.CUDAExtension(
                "torsion._C_cuda",
                sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
                extra_compile_args={"cxx": [*cxx, *ABI, "-DUSE_CUDA"], "nvcc": NVCC},
                **stable,
            )
        )

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "those of the visible GPUs" if with_cuda else ""
            facts = {
                "VERSION": self.distribution.get_version(),
                "BUILD_MODE": mode,
                "BUILD_TORCH": torch.__version__,
                "BUILD_COMPILER": compiler,
                "BUILD_FLAGS": " ".join([*cxx, *openmp]),
                "BUILD_NVCC_FLAGS": " ".join(NVCC) if with_cuda else "",
                "BUILD_CUDA": torch.version.cuda or "" if with_cuda else "",
                "BUILD_CUDA_MISSING": cuda_missing,
                "BUILD_COMMIT": commit(),
                "BUILD_SANITIZE": sanitize,
                "CUDA_ARCHS": archs,
            }
            # On this module alone: a new commit then recompiles one file and no kernel.
            plan = next(e for e in self.extensions if e.name == "torsion._plan")
            plan.extra_compile_args["cxx"] += [f'-DTORSION_{key}="{value}"' for key, value in facts.items()]
            if not with_cuda and mode == "auto":
                print(f"torsion: no CUDA module: {cuda_missing}", file=sys.stderr)
            super().build_extensions()

        def build_extension(self, ext) -> None:
            # torch writes one build.ninja per folder; one folder per module keeps their dependency logs apart.
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

    return dict(ext_modules=extensions, cmdclass={"build_ext": Build})


arguments = native(build_mode())
try:
    from setuptools import find_packages, setup
except ImportError:
    stop_for("setuptools")

os.chdir(ROOT)
setup(
    packages=[*find_packages("python", include=["torsion", "torsion.*"]), "torsion.triton_kernels"],
    package_dir={"torsion": "python/torsion", "torsion.triton_kernels": "triton_kernels"},
    package_data={"": ["py.typed", "*.json"]},
    license="Apache-2.0",
    **arguments,
)
