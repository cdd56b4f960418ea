#!/usr/bin/env bash
# Everything that only a GPU can show, in less than ten minutes: tests, speeds, and a training of 500
# iterations with physics on the GPU, its curve beside the CPU's.
#
#   experiments/gpu_check.sh [OUT] [PART ...]
#
# OUT is where results are put, experiments/results/gpu by default; PART is tests, speed or train, by
# default all. Needs Python with a CUDA build of torch, and this package with its extra: pip install
# -e '.[gpu,plot]' pytest. With the variable WHEELS, a folder of wheels, it installs them from there.
# MAML_RL_GPU_TESTS=cpu rehearses the script itself on a machine without a GPU, cut short.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-experiments/results/gpu}
shift $(($# > 0))
parts=${*:-tests speed train}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --find-links "$WHEELS" mujoco mujoco-warp gymnasium \
        tyro imageio etils absl-py || exit 1
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi

device=${MAML_RL_GPU_TESTS:-cuda}
cut=()
speed=(--device "$device" --seconds 110)
if [ "$device" = cpu ]; then
    cut=(--iterations 2 --sampling.tasks 2 --sampling.episodes 3 --evaluation.tasks 2 --evaluation.episodes 3)
    speed=(--physics cpu --scale .03 --seconds 1)
fi

{
    date -u +%Y-%m-%d
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    "$python" -c 'import os, platform, torch, mujoco, mujoco_warp, warp
print("python", platform.python_version(), "torch", torch.__version__, "mujoco", mujoco.__version__,
      "warp-lang", warp.__version__, "cores", len(os.sched_getaffinity(0)))'
    git describe --always --dirty 2>/dev/null
} 2>&1 | tee "$out/hardware.txt"

# Each part has its own time, so that a slow one takes nothing from the next.
failed=()
run() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    # Ctrl-C, so that a training saves what it has.
    timeout -s INT -k 20 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || failed+=("$name (exit $code)")
}
wanted() { [[ " $parts " == *" $1 "* ]]; }

if wanted tests; then
    export MAML_RL_WARP_DEVICE=$device
    run tests 150 "$python" -m pytest -q -m gpu tests/test_gpu.py
    run physics 60 "$python" -m pytest -q -m slow tests/test_warp.py tests/test_physics.py
fi
if wanted speed; then
    run speed 150 env COLUMNS=160 "$python" -m maml_rl speed "${speed[@]}"
fi
if wanted train; then
    folder=$out/half_cheetah_dir_warp-seed0
    train=(train half_cheetah_dir --family.balanced True --device "$device" --physics warp
        --iterations 500 --out "$folder")
    [ -e "$folder/checkpoints" ] && train=(resume "$folder")
    run train 240 "$python" -m maml_rl "${train[@]}" ${cut[@]+"${cut[@]}"}
    run curves 20 "$python" experiments/results/compare_curves.py "$folder" \
        experiments/results/benchmark_half_cheetah_dir/maml-seed0
fi
if [ "${#failed[@]}" != 0 ]; then
    printf 'not passed: %s\n' "${failed[@]}"
    exit 1
fi
