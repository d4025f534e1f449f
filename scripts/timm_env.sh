#!/usr/bin/env bash
# Make the environment of `make test-timm`: timm beside a CPU build of torch.
#
# timm and torchvision go in without their dependencies. torchvision's compiled operators do not load there; the tests
# declare the schemas it needs (tests/timm/conftest.py). Packages are shared with the environment named first, so that
# torch is not installed twice.
#
#   scripts/timm_env.sh .venv .venv-timm
set -euo pipefail
base="$1" made="$2"
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
"$base/bin/python" -m venv "$made"
# site.addsitedir, unlike a plain path, also follows the .pth files in there: that of an editable install.
echo "import site; site.addsitedir('$(packages "$base")')" > "$(packages "$made")/base.pth"
"$made/bin/pip" install -q --no-deps timm==1.0.31 torchvision==0.28.0
