#!/usr/bin/env bash
# A day with a GPU in pieces of at most nine minutes. Each can be run again: it goes on where it was stopped.
#
#   benchmarks/gpu.sh [PIECE…]      pieces: tests, bench, cifar; all of them without one
#
#   tests  the tests marked `cuda`: equality with the CPU, bf16, compilation, resuming, export
#   bench  speed, memory and share of the peak of MIM and CL at 32×32 and at ViT-B/16; the ten slowest operations
#   cifar  CIFAR-10 at width 192: mim, graft, cl with the same compute, evaluations and a report
#
# Results are small files in $OUT. Nothing needs a network, MLflow or DVC. Variables:
#   OUT            results (benchmarks/gpu-results)
#   WORK           data and models of `cifar` (.lgp/gpu)
#   CIFAR          folder with CIFAR-10 as Parquet or as train/CLASS/*.png (.cifar, else data/cifar10)
#   PYTHON         Python with the packages of pyproject.toml (.venv/bin/python, else python3)
#   LIMIT          seconds of a piece (540)
#   TESTS_OPTIONS  more options of pytest, e.g. "-n 4" with pytest-xdist
#   BENCH_S        seconds after which `bench` begins no other row (90), BENCH_OPTIONS: more options of gpu_speed.py
#   CIFAR_OPTIONS  options of gpu_cifar.py, e.g. "--train-seconds 200 --limit 400" or "--epochs 50 40 25"
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-$here/benchmarks/gpu-results}
WORK=${WORK:-$here/.lgp/gpu}
LIMIT=${LIMIT:-540}
mkdir -p "$OUT" "$WORK"
OUT=$(cd "$OUT" && pwd) WORK=$(cd "$WORK" && pwd)
if [ -z "${CIFAR:-}" ]; then
    CIFAR=$here/.cifar
    [ -d "$CIFAR" ] || CIFAR=$here/data/cifar10
fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$here/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONUTF8=1
# what one process compiles, the next one finds
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$WORK/compiled}
cd "$here"
if ! "$PYTHON" -c 'from importlib.metadata import version; version("lgp")' 2>/dev/null; then
    echo "lgp is not installed for $PYTHON: $PYTHON -m pip install --no-deps --no-build-isolation -e $here"
    exit 2
fi

# A warning is an error in the project's own tests. Here the versions are those of the machine, and packages that the
# project's filters name may be missing.
piece_tests() {
    # shellcheck disable=SC2086
    timeout -k 20 "$LIMIT" "$PYTHON" -m pytest tests/cuda -m cuda -o filterwarnings=default -p no:cacheprovider --tb=short \
        --durations=10 -rA --junitxml="$OUT/tests.xml" ${TESTS_OPTIONS:-}
}

piece_bench() {
    # shellcheck disable=SC2086
    timeout -k 20 "$LIMIT" "$PYTHON" benchmarks/gpu_speed.py "$OUT" --seconds "${BENCH_S:-90}" ${BENCH_OPTIONS:-}
    local code=$?
    [ ! -e "$OUT/speeds.json" ] || cp "$OUT/speeds.json" "$WORK/" # for `cifar`, whatever becomes of $OUT
    return "$code"
}

piece_cifar() {
    # shellcheck disable=SC2086
    timeout -k 20 "$LIMIT" "$PYTHON" benchmarks/gpu_cifar.py "$CIFAR" "$WORK/cifar10" \
        --speeds "$WORK/speeds.json" --packed "$OUT/cifar10.tar.xz" --limit $((LIMIT - 60)) ${CIFAR_OPTIONS:-}
}

worst=0
for piece in "${@:-tests bench cifar}"; do
    for one in $piece; do
        case $one in
            tests | bench | cifar) ;;
            *)
                echo "$one is no piece: choose of tests, bench, cifar"
                exit 2
                ;;
        esac
        echo "== $one"
        began=$SECONDS
        "piece_$one" 2>&1 | tee "$OUT/$one.log"
        code=${PIPESTATUS[0]}
        echo "== $one: $((SECONDS - began)) s, exit $code" | tee -a "$OUT/$one.log"
        [ "$code" -eq 0 ] || worst=$code
    done
done
exit "$worst"
