"""What a GPU would be asked to run, checked without one (`make audit`).

    python scripts/audit.py [cuda] [triton] [shim] [--each] [--record]

cuda    nvcc compiles csrc/**/*.cu with the flags of setup.py for sm_80, sm_90 and sm_100: every kernel for all three
triton  the kernels of triton_kernels/ (their audit_cases()) are compiled ahead of time for sm_90
shim    tests/test_cuda_engine.py runs the CUDA engine on the CPU: under AddressSanitizer and UBSan; its checks with
        real threads, for those of a block, also under ThreadSanitizer, which sees a missing barrier; Lookbehind's
        cycles with every base without a sanitizer (with one, the compiler alone would take five minutes), while the
        others take the simplest and the widest

For each family of kernels (--each: each kernel) the table shows registers and 128-bit loads and stores. A family are
kernels that differ in a base optimizer with as many states, in ASAM, or between the 16-bit types; audit_limits.json
holds the most registers and the fewest accesses of each. Spills and stack must be 0. --record loosens the limits to
what was found (delete the file first to tighten them too): read its diff.
MAX_JOBS (default 2) compilers run at a time.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = ROOT / "scripts/audit_limits.json"
ARCHS = (80, 90, 100)
TRITON_ARCH = 90
MEMORY = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
RACES = "-O0 -g1 -fsanitize=thread"
STATES = dict.fromkeys(("Sgd<false>", "sgd"), "0 states")
STATES |= dict.fromkeys(("Sgd<true>", "sgd_momentum", "Tam", "tam"), "1 state")
STATES |= dict.fromkeys(("Adam", "adam", "AdaTam", "adatam"), "2 states")
"""How many arrays a base optimizer's update moves beside the weights, under its names in C++ and in Triton."""
SUMS = {name: "damped" if "tam" in name.lower() else "norm" for name in STATES}
"""What its reduce sums: the gradient's norm alone, or the products that damping takes too."""
SHORT = {
    "Types<float, float, float, float>": "F32",
    "Types<double, double, double, double>": "F64",
    "Types<bf16, bf16, float, float>": "BF16",
    "Types<f16, f16, float, float>": "F16",
}


@dataclass
class Found:
    """Resources of one kernel on one architecture; ``loads`` and ``stores`` are those of 128 bits."""

    part: str
    name: str
    arch: int
    registers: int
    loads: int
    stores: int
    stack: int
    spills: int


class AuditError(Exception):
    """A part could not be carried out; the message is for the user."""


@functools.cache
def tool(name: str) -> str:
    """Path of a CUDA disassembler: from PATH, else the copy that Triton brings."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton

            copy = Path(triton.__file__).parent / "backends/nvidia/bin" / name
            found = str(copy) if copy.exists() else None
        except ImportError:
            pass
    if found is None:
        raise AuditError(f"{name} is neither on PATH nor in triton; pip install triton")
    return found


def text_of(*command: str, **options: object) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if ran.returncode:
        raise AuditError(f"{' '.join(command[:3])} ...: exit {ran.returncode}\n{(ran.stdout + ran.stderr)[-4000:]}")
    return str(ran.stdout)


def readable(mangled: str) -> str:
    name = text_of("c++filt", mangled).strip() if shutil.which("c++filt") else mangled
    name = re.sub(r"\(.*", "", name).replace("torsion::", "").replace("cuda::", "").removeprefix("void ")
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def family(name: str) -> str:
    """The kernels that share a limit with this one."""
    name = name.replace(" >", ">").replace(", 256>", ">").replace("<256>", "")
    if name.startswith(("finalize_kernel", "resolve_kernel")):
        return name.partition("<")[0] + "<*>"
    for scalars in (" finalize ", " add up"):  # of Triton's
        if scalars in name:
            return f"*{scalars}".rstrip()
    names = SUMS if name.startswith("reduce_kernel") or " reduce " in name else STATES
    bases = "|".join(re.escape(base) for base in sorted(names, key=len, reverse=True))
    name = re.sub(rf"\b({bases})(?!\w)", lambda found: names[found[1]], name)
    if names is STATES:
        name = re.sub(r"\bAscent<(?:true|false), ", "Ascent<*, ", name)
        name = re.sub(r"\bBlend<(?:true|false)>", "Blend<*>", name)
        name = re.sub(r"\b(DescentAscent<\d states?), (?:true|false)>", r"\1>", name).replace("/asam ", " ")
    return re.sub(r"\bB?F16\b", "16 bit", name)


def examine(cubin: Path, part: str, arch: int, name: str | None = None) -> list[Found]:
    """Read the resources of every kernel in a cubin; ``name`` overrides the mangled one."""
    usage = text_of(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    code = text_of(tool("nvdisasm"), str(cubin))
    found = []
    for symbol, line in re.findall(r"Function (\S+):\n\s+(.*)", usage):
        body = re.search(rf"\.text\.{re.escape(symbol)}:(.*?)(?=\n\t\.section|\n//-+ \.|\Z)", code, re.DOTALL)
        if body is None:
            raise AuditError(f"no code for {symbol} in the disassembly: the audit no longer understands nvdisasm")
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        count = functools.partial(lambda pattern, text: len(re.findall(pattern, text)), text=body[1])
        found.append(
            Found(
                part=part,
                name=name or readable(symbol),
                arch=arch,
                registers=used["REG"],
                loads=count(r"\bLDG\.[\w.]*\b128\b"),
                stores=count(r"\bSTG\.[\w.]*\b128\b"),
                stack=used["STACK"] + used["LOCAL"],
                spills=count(r"\b(?:LDL|STL)\b"),
            )
        )
    return found


# ------------------------------------------------------------------------------------------------------------- CUDA


def flags_of_setup() -> list[str]:
    """NVCC as setup.py has it: the audit compiles what the build compiles."""
    names: dict[str, object] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("ABI", "NVCC"):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), names)
    return list(names["NVCC"])  # type: ignore[call-overload]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = Path(home, "bin/nvcc") if home else Path()
    return str(inside) if inside.is_file() else shutil.which("nvcc")


def compile_cuda(nvcc: str, source: Path, archs: list[int]) -> list[Found]:
    """Compile one source to an object, host code too, as no build without a CUDA torch does."""
    from torch.utils import cpp_extension

    flags = [*cpp_extension.COMMON_NVCC_FLAGS, *flags_of_setup(), "-Xcompiler=-fPIC"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    include = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    found, begin = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        text_of(nvcc, *flags, *include, "-c", "-o", f"{folder}/kernels.o", str(source))
        text_of(tool("cuobjdump"), "-xelf", "all", "kernels.o", cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_(\d+)", cubin.name)
            if arch is None:
                raise AuditError(f"no architecture in the name {cubin.name}: the audit no longer understands cuobjdump")
            found += examine(cubin, "cuda", int(arch[1]))
    if found and {row.arch for row in found} != set(archs):
        raise AuditError(f"{source.name}: compiled for {archs}, found {sorted({row.arch for row in found})}")
    print(f"{source.name}: {len(found) // len(archs)} kernels, {time.monotonic() - begin:.0f} s", flush=True)
    return found


def cuda_jobs(pool: ThreadPoolExecutor) -> list[Future[list[Found]]]:
    nvcc = find_nvcc()
    if nvcc is None:
        print("audit: no nvcc, CUDA kernels not checked; install the CUDA toolkit >= 12.8, or set CUDA_HOME to it")
        return []
    known = text_of(nvcc, "--list-gpu-arch")
    archs = [arch for arch in ARCHS if f"compute_{arch}\n" in known + "\n"]
    if len(archs) < len(ARCHS):
        print(f"audit: this nvcc knows only {archs} of {ARCHS}; the CUDA toolkit >= 12.8 knows all")
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    return [pool.submit(compile_cuda, nvcc, source, archs) for source in sources]


# ----------------------------------------------------------------------------------------------------------- Triton


def compile_triton() -> Iterator[Found]:
    """Compile every case of every module; in a process of its own, without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    for module in sorted(path.stem for path in (ROOT / "triton_kernels").glob("*.py")):
        cases = getattr(importlib.import_module(f"triton_kernels.{module}"), "audit_cases", None)
        if cases is None or inspect.signature(cases).parameters:  # engine.py's takes the rule
            continue
        for case in cases():
            kernel, constexprs = case["kernel"], case["constexprs"]
            signature = {a: "constexpr" if a in constexprs else case["signature"][a] for a in kernel.arg_names}
            aligned = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in case["aligned"]}
            built = triton.compile(
                ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned),
                target=GPUTarget("cuda", TRITON_ARCH, 32),
                options={"num_warps": case["num_warps"], "enable_fp_fusion": case["enable_fp_fusion"]},
            )
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "kernel.cubin")
                cubin.write_bytes(built.asm["cubin"])
                yield from examine(cubin, "triton", TRITON_ARCH, case["name"])


def triton_job() -> list[Found]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    printed = text_of(sys.executable, __file__, "--triton-worker", env=environment)
    return [Found(**row) for row in json.loads(printed.splitlines()[-1])]


# ----------------------------------------------------------------------------------------------------------- shim


def shim_job(title: str, flags: str, *options: str) -> list[Found]:
    environment = {**os.environ, "TORSION_SHIM_FLAGS": flags}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *options]
    try:
        printed = text_of(*command, "tests/test_cuda_engine.py", env=environment, cwd=str(ROOT))
    except AuditError as error:
        if "unexpected memory mapping" not in str(error):
            raise
        print(f"audit: shim not run, {title}: this gcc's runtime does not fit the kernel's address layout")
    else:
        print(f"shim, {title}: {printed.strip().splitlines()[-1].strip('= ')}")
    return []


# ---------------------------------------------------------------------------------------------------------- verdict


Table = dict[str, dict[str, list[Found]]]
"""Part -> name -> rows."""
Limits = dict[str, dict[str, list[int]]]
"""Part -> family -> most registers, fewest 128-bit loads and stores."""


def table_of(found: list[Found], key: Callable[[str], str]) -> Table:
    """The rows by part and ``key`` of the kernel's name."""
    table: Table = {}
    seen = set()
    for row in sorted(found, key=lambda row: (row.part, row.name, row.arch)):
        if (row.part, row.name, row.arch) not in seen:  # a kernel of no rule is in every object file
            seen.add((row.part, row.name, row.arch))
            table.setdefault(row.part, {}).setdefault(key(row.name), []).append(row)
    return table


def violations(table: Table, limits: Limits) -> Iterator[str]:
    for part, families in table.items():
        for name, rows in families.items():
            registers, loads, stores = limits.get(part, {}).get(name, (0, 0, 0))
            if registers == 0:
                yield f"{name}: no limit in {LIMITS.name}; add one with --record"
                continue
            for row in rows:
                where = f"{row.name} sm_{row.arch}"
                if row.registers > registers:
                    yield f"{where}: {row.registers} registers, at most {registers}"
                if row.loads < loads or row.stores < stores:
                    yield f"{where}: 128-bit loads/stores {row.loads}/{row.stores}, at least {loads}/{stores}"
                if row.stack or row.spills:
                    yield f"{where}: {row.stack} bytes of stack, {row.spills} spill instructions, must be 0"
        for name in limits.get(part, {}).keys() - families.keys():
            yield f"{name}: in {LIMITS.name} but not compiled; remove it or find out why"


def record(table: Table, limits: Limits) -> None:
    """Loosen the limits to what was found, registers rounded up to the eights in which a GPU hands them out."""
    for part, families in table.items():
        old = limits.get(part, {})
        limits[part] = {}
        for name, rows in families.items():
            registers, loads, stores = old.get(name, (0, sys.maxsize, sys.maxsize))
            limits[part][name] = [
                max(registers, -(-max(row.registers for row in rows) // 8) * 8),
                min(loads, *(row.loads for row in rows)),
                min(stores, *(row.stores for row in rows)),
            ]
    lines = [
        f"  {json.dumps(part)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(limit)}" for name, limit in sorted(limits[part].items()))
        + "\n  }"
        for part in sorted(limits)
    ]
    LIMITS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def print_table(table: Table) -> None:
    for part, names in table.items():
        archs = sorted({row.arch for rows in names.values() for row in rows})
        width = max(map(len, names))
        print(f"\n{part:{width}}  kernels  registers sm_{'/'.join(map(str, archs)):14} 128-bit loads / stores")
        for name, rows in sorted(names.items()):
            most = [max((row.registers for row in rows if row.arch == arch), default=0) for arch in archs]
            each = [{getattr(row, key) for row in rows} for key in ("loads", "stores")]
            accesses = " / ".join("-".join(map(str, sorted(values))) for values in each)
            count = len({row.name for row in rows})
            print(f"{name:{width}}  {count:7}  {'/'.join(map(str, most)):27} {accesses}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="cuda|triton|shim", help="default: all")
    parser.add_argument("--each", action="store_true", help="a line for each kernel instead of each family")
    parser.add_argument("--record", action="store_true", help=f"loosen {LIMITS.name} to what is found")
    parser.add_argument("--triton-worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.triton_worker:
        print(json.dumps([vars(row) for row in compile_triton()]))
        return 0
    unknown = set(options.parts) - {"cuda", "triton", "shim"}
    if unknown:
        parser.error(f"no part {sorted(unknown)[0]!r}; choose from cuda, triton, shim")
    parts = options.parts or ["cuda", "triton", "shim"]

    found: list[Found] = []
    problems: list[str] = []
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        jobs: list[Future[list[Found]]] = []
        if "shim" in parts:
            jobs.append(pool.submit(shim_job, "AddressSanitizer and UBSan", MEMORY))
            every_base = "cycle_test and not test_every_check_is_found"
            jobs.append(pool.submit(shim_job, "no sanitizer, every base", "-DTORSION_EVERY_BASE", "-k", every_base))
            jobs.append(pool.submit(shim_job, "ThreadSanitizer", RACES, "-k", "real_threads or ranges"))
        if "triton" in parts and importlib.util.find_spec("triton") is None:
            print("audit: no triton, its kernels not checked; pip install triton")
        elif "triton" in parts:
            jobs.append(pool.submit(triton_job))
        if "cuda" in parts:
            jobs += cuda_jobs(pool)
        for job in jobs:
            try:
                found += job.result()
            except AuditError as error:
                problems.append(str(error))
    table = table_of(found, family)
    print_table(table_of(found, str) if options.each else table)
    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    if options.record and not problems:
        record(table, limits)
    problems += violations(table, limits)
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    verdict = "within limits, no stack, no spills" if found else "no problem, and no kernel compiled"
    print(f"\naudit: {len(problems)} problem(s)" if problems else f"\naudit: {verdict}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
