#!/usr/bin/env bash
# Everything a machine with a GPU can tell about this tree, in one command under nine minutes, without network:
#   tests, compute-sanitizer on a small subset, benchmarks, DRAM bytes. `make gpu` builds first, for the card at hand.
# Records go to $OUT (default benchmarks/results/<device>): environment.json, bench.json, bench_layers.json, traffic.json,
# gpu_check.log.
# A stage that fails or runs out of time does not stop the others; the exit status is 1 then, 2 without a GPU.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
BUDGET=${BUDGET:-440} # seconds for all stages; the build before them takes the rest of nine minutes
START=$SECONDS

export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"

if ! nvidia-smi --query-gpu=name --format=csv,noheader >/dev/null 2>&1; then
  echo "torsion: no NVIDIA GPU on this machine (nvidia-smi finds none); make gpu needs one, make audit and make test do not" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "torsion: there is a GPU, but $PYTHON has no torch that can use it; install a CUDA build of torch >= 2.11" >&2
  exit 2
fi

device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9.-')
OUT=${OUT:-benchmarks/results/$device}
mkdir -p "$OUT"
log=$OUT/gpu_check.log
: >"$log"
names=() results=() times=()

# stage NAME LIMIT COMMAND...: into the log and onto the screen, within its own limit and what is left of the budget.
# Time is up with SIGINT, on which the benchmark still writes what it has. OPTIONAL=1: no failure when time is short.
stage() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS + START)) begin=$SECONDS status result
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  printf '\n== %s\n' "$name" | tee -a "$log"
  if [ "$limit" -lt 5 ]; then
    result="${OPTIONAL:+skipped: }no time left"
  else
    timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
      0) result=ok ;;
      124 | 137) result="${OPTIONAL:+skipped: }over ${limit} s" ;;
      *) result="FAILED ($status)" ;;
    esac
  fi
  names+=("$name") results+=("$result") times+=($((SECONDS - begin)))
}

skip() {
  printf '\n== %s: skipped, %s\n' "$1" "$2" | tee -a "$log"
  names+=("$1") results+=("skipped: $2") times+=(0)
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory --format=csv
  "$PYTHON" - "$OUT/environment.json" <<'PY'
import datetime, json, platform, subprocess, sys
import torch, torsion

def line(*command):
    try:
        ran = subprocess.run(command, capture_output=True, text=True)
        return ran.stdout.strip().splitlines()[-1] if ran.returncode == 0 and ran.stdout.strip() else None
    except OSError:
        return None

try:
    import triton
    triton_version = triton.__version__
except ImportError:
    triton_version = None
card = torch.cuda.get_device_properties(0)
facts = {
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "device": card.name, "multiprocessors": card.multi_processor_count, "memory": card.total_memory,
    "l2": card.L2_cache_size, "capability": f"{card.major}.{card.minor}",
    "driver": line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": triton_version, "nvcc": line("nvcc", "--version"),
    "commit": line("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
    "torsion": torsion.build_info(), "backends": torsion.backends(),
}
text = json.dumps(facts, indent=1, default=str)
open(sys.argv[1], "w").write(text + "\n")
print(text)
optimizers = ("tam_", "adatam_", "ascent_", "descent_", "blend_")
chosen = {facts["backends"][op]["chosen"] for op in optimizers}
sys.exit(0 if chosen == {"cuda"} else "the compiled CUDA back end is not the one chosen")
PY
}

traffic() {
  local list status=0
  for list in gpt2 one; do
    # The clocks stay as they are; counters of one pass only, so that nothing is replayed.
    ncu --clock-control none --profile-from-start off --print-units base --csv \
      --metrics dram__bytes_read.sum,dram__bytes_write.sum --log-file "$OUT/ncu_$list.csv" \
      "$PYTHON" scripts/gpu_subset.py traffic "$list" || return 1
    printf '{"list": "%s", "dram": %s}\n' "$list" \
      "$("$PYTHON" scripts/gpu_subset.py ratio "$OUT/ncu_$list.csv" || true)" | tee -a "$OUT/traffic.json"
    "$PYTHON" scripts/gpu_subset.py ratio "$OUT/ncu_$list.csv" >/dev/null || status=1
    rm -f "$OUT/ncu_$list.csv"
  done
  return $status
}
rm -f "$OUT/traffic.json"
export -f environment traffic
export PYTHON OUT

sanitizer=(compute-sanitizer --kernel-name kernel_substring=torsion --error-exitcode 1 --print-limit 20)

stage "environment" 60 bash -c environment
stage "CUDA against CPU, a subset" 75 "$PYTHON" scripts/gpu_subset.py check
stage "GPU tests" 160 "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  # Each tensor in an allocation of its own, so that a byte beyond it is seen.
  stage "memcheck" 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" --tool memcheck "$PYTHON" scripts/gpu_subset.py check
else
  skip "memcheck" "no compute-sanitizer on PATH"
fi
stage "benchmarks" 180 "$PYTHON" -m torsion bench tam adatam lookbehind --device cuda --json "$OUT/bench.json"
OPTIONAL=1 stage "benchmarks of layers" 60 "$PYTHON" -m torsion bench masked demp --device cuda --json "$OUT/bench_layers.json"
if command -v ncu >/dev/null; then
  stage "DRAM bytes" 60 bash -c traffic
else
  skip "DRAM bytes" "no ncu on PATH"
fi
if command -v compute-sanitizer >/dev/null; then
  OPTIONAL=1 stage "racecheck" 90 "${sanitizer[@]}" --tool racecheck "$PYTHON" scripts/gpu_subset.py check
fi

{
  printf '\n%-28s %-28s %s\n' "stage" "result" "seconds"
  for i in "${!names[@]}"; do printf '%-28s %-28s %7d\n' "${names[$i]}" "${results[$i]}" "${times[$i]}"; done
  printf 'records in %s, %d s in all\n' "$OUT" $((SECONDS - START))
} | tee -a "$log"

for result in "${results[@]}"; do
  case $result in ok | skipped*) ;; *) exit 1 ;; esac
done
