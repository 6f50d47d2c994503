#!/bin/sh
# Builds llama.cpp's server and quantiser for `outdraft bench MODEL --peer llama.cpp`, from the
# sources that llama-cpp-python 0.3.36 carries, into ~/.cache/outdraft/llama.cpp.
# Needs cmake and a C++ compiler. JOBS=n compiles n files at once (default: all cores).
set -eu
version=0.3.36
home="$HOME/.cache/outdraft/llama.cpp"
mkdir -p "$home"
if [ ! -d "$home/source/vendor/llama.cpp" ]; then
  fetched=$(mktemp -d)
  trap 'rm -rf "$fetched"' EXIT
  python3 -m pip download -q --no-binary :all: --no-deps --no-build-isolation \
    --dest "$fetched" "llama-cpp-python==$version"
  tar -xzf "$fetched"/llama_cpp_python-$version.tar.gz -C "$fetched"
  mv "$fetched/llama_cpp_python-$version" "$home/source"
fi
# GCC 12 leaves out the stores of AMX's tile configuration, because its intrinsic does not say
# that it reads them; the server then ends with a signal at its first 8-bit product. This keeps them.
amx="$home/source/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
if ! grep -q 'volatile("" : : "r"(&tc)' "$amx"; then
  sed -i 's|^    _tile_loadconfig(&tc);|    __asm__ volatile("" : : "r"(\&tc) : "memory");\n&|' "$amx"
fi
# Compiled for this very processor, as ours chooses its instructions for it; nothing is fetched.
cmake -S "$home/source/vendor/llama.cpp" -B "$home/build" -DCMAKE_BUILD_TYPE=Release \
  -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
  -DLLAMA_USE_PREBUILT_UI=OFF
cmake --build "$home/build" --target llama-server llama-quantize -j "${JOBS:-$(nproc)}"
echo "built: $home/build/bin/llama-server"
