#!/usr/bin/env bash
# Everything that only a GPU can show: tests, speeds, and a training of 500 iterations with physics on
# the GPU, its first 100 iterations' returns beside the CPU's. Ends by itself before ten minutes are
# over; what has not been begun by then is told.
#
#   experiments/gpu_check.sh [OUT] [PART ...]
#
# OUT is where results are put, experiments/results/gpu by default; PART is tests, speed or train, by
# default all. Needs Python with a CUDA build of torch, and: pip install -e '.[gpu,plot]' pytest. Where
# nothing can be downloaded, the variable WHEELS names a folder made elsewhere by
#   pip download -d WHEELS 'mujoco-warp==RELEASE' 'mujoco==RELEASE' gymnasium tyro tensorboard PyYAML \
#       safetensors rich pillow jinja2 matplotlib pytest numpy setuptools
# with the same version of Python, without torch; they are installed from there.
# MAML_RL_GPU_TESTS=cpu rehearses the script on a machine without a GPU, cut short.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-experiments/results/gpu}
shift $(($# > 0))
parts=("$@")
[ "${#parts[@]}" = 0 ] && parts=(tests speed train)
for part in "${parts[@]}"; do
    case $part in tests | speed | train) ;; *)
        echo "a part is tests, speed or train, got $part" >&2
        exit 2
        ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
most=570

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --find-links "$WHEELS" --no-build-isolation \
        -e '.[gpu,plot]' pytest || exit 1
fi

device=${MAML_RL_GPU_TESTS:-cuda}
cut=()
speed=(--device "$device" --seconds 100)
if [ "$device" = cpu ]; then
    cut=(--iterations 2 --sampling.tasks 2 --sampling.episodes 3 --evaluation.tasks 2 --evaluation.episodes 3)
    speed=(--physics cpu --scale .03 --seconds 1)
fi

"$python" - "$device" <<'CHECK' >"$out/hardware.txt" || { cat "$out/hardware.txt"; exit 1; }
import os, platform, sys
try:
    import mujoco, pytest, torch
    import maml_rl
    from maml_rl.devices import check_place
    check_place(sys.argv[1], "warp")
    import warp
except Exception as error:
    sys.exit(f"the check cannot be done here: {error}")
print("python", platform.python_version(), "torch", torch.__version__, "mujoco", mujoco.__version__,
      "warp-lang", warp.__version__, "cores", len(os.sched_getaffinity(0)))
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    print(torch.cuda.get_device_name(), f"{total / 1e9:.0f} GB,", f"{free / 1e9:.0f} GB free")
CHECK
{
    date -u +%Y-%m-%d
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    git describe --always --dirty 2>/dev/null
} >>"$out/hardware.txt"
cat "$out/hardware.txt"

# Each part has its own time, and no more than is left, so that a slow one takes little from the next.
failed=()
run() {
    local name=$1 seconds=$2 left=$((most - SECONDS))
    shift 2
    [ "$seconds" -gt "$left" ] && seconds=$left
    if [ "$seconds" -lt 10 ]; then
        failed+=("$name (no time left)")
        return
    fi
    echo "== $name, at most $seconds s: $*"
    # Ctrl-C, so that a training saves what it has.
    timeout -s INT -k 10 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || failed+=("$name (exit $code)")
}
wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }

export MAML_RL_WARP_DEVICE=$device
if wanted tests; then
    # The first steps compile the kernels, once on a machine.
    run warm_up 120 "$python" -m maml_rl train ant_dir --device "$device" --physics warp --iterations 1 \
        --sampling.tasks 2 --sampling.episodes 2 --family.horizon 3 --evaluation.tasks 1 \
        --evaluation.episodes 2 --out "$(mktemp -d)/run" --quiet
    run tests 100 "$python" -m pytest -q -m gpu tests/test_gpu.py
fi
if wanted train; then
    folder=$out/half_cheetah_dir_warp-seed0
    train=(train half_cheetah_dir --device "$device" --physics warp
        --iterations 500 --out "$folder" "${cut[@]}")
    [ -e "$folder/checkpoints/latest" ] && train=(resume "$folder")
    run train 270 "$python" -m maml_rl "${train[@]}"
    run curves 20 "$python" experiments/results/compare_curves.py "$folder" \
        experiments/results/benchmark_half_cheetah_dir/maml-seed0
fi
if wanted speed; then
    run speed 130 env COLUMNS=160 "$python" -m maml_rl speed "${speed[@]}"
fi
if wanted tests; then
    run physics 120 "$python" -m pytest -q -m slow tests/test_warp.py tests/test_physics.py
fi
if [ "${#failed[@]}" != 0 ]; then
    printf 'not passed: %s\n' "${failed[@]}"
    exit 1
fi
