#!/usr/bin/env bash
# Makes the environment of `make test` and `make demo`:  environment.sh PYTHON VENV
# A torch >= 2.10 that PYTHON already has is used through --system-site-packages and never replaced; nothing is written
# outside VENV. On a machine without one, pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf) decide
# whether the CPU or the CUDA build of the pinned torch is fetched; either passes.
set -euo pipefail

python=$1
venv=$2
torch_pin=torch==2.13.0
torchvision_pin=torchvision==0.28.0
triton_pin=triton==3.6.0

say() { echo "environment: $*"; }

has_torch() {
  "$1" - 2>/dev/null <<'PYTHON'
import torch
version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split("+")[0].split(".")[:2])
raise SystemExit(version < (2, 10))
PYTHON
}

has() { "$1" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$2') is None)"; }

version_of() { "$1" -c "import importlib.metadata as m; print(m.version('$2'))"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { say "Python 3.10 or later is needed" >&2; exit 1; }

site=()
if has_torch "$python"; then
  site=(--system-site-packages)
  say "using torch $(version_of "$python" torch) of $(command -v "$python")"
fi
rm -rf "$venv"
"$python" -m venv ${site[@]+"${site[@]}"} "$venv"
py=$venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() { "$py" -m pip install --quiet --progress-bar off "$@"; }

# The PYTHON of an active venv hands on its own base's packages, not its own: show the new one where they lie.
if [ ${#site[@]} -gt 0 ] && ! has_torch "$py"; then
  "$python" -c 'import sysconfig; paths = sysconfig.get_paths(); print("\n".join({paths["purelib"], paths["platlib"]}))' \
    >"$("$py" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/active_environment.pth"
fi

if [ ${#site[@]} -eq 0 ]; then
  say "installing $torch_pin"
  install "$torch_pin"
fi
# Pinned to what is there, so that no dependency below can replace it.
constraints=$venv/constraints.txt
echo "torch==$(version_of "$py" torch)" >"$constraints"

say "installing what the tests and the demo need"
install -c "$constraints" -r "$(dirname "$0")/requirements.txt"
if [ "$(uname -s)" = Linux ] && ! has "$py" triton; then
  say "installing $triton_pin"
  install -c "$constraints" "$triton_pin"
fi
if ! has "$py" torchvision; then
  # Image and video processors of transformers import it; its own torch pin would replace the build chosen above.
  say "installing $torchvision_pin without its dependencies"
  install --no-deps "$torchvision_pin"
fi
# Beside a CPU build of torch, a torchvision that was built for CUDA does not import without help.
if ! "$py" -c "import torchvision" 2>/dev/null; then
  packages=$("$py" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  cp "$(dirname "$0")/torchvision_on_cpu.py" "$packages/"
  echo "import torchvision_on_cpu" >"$packages/torchvision_on_cpu.pth"
  "$py" -c "import torchvision"
fi
say "installing twn_kernels"
install --no-build-isolation --no-deps -e "$(dirname "$0")/.."
"$py" -c "from twn_kernels.impl.cuda.loader import build_info as of; info = of()
print('environment: CUDA extension', info, f'(in {info.seconds} s)' * info.built)"
