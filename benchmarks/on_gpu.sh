#!/usr/bin/env bash
# Measure on a machine with a GPU that has torch, pandas and scikit-learn, and perhaps no network.
#
#   benchmarks/on_gpu.sh wheels [PYTHON]     # before, where there is a network: the other packages, into wheels/ (for 3.12)
#   benchmarks/on_gpu.sh OUT [OPTION ...]    # there: parts that OUT holds already are left out (see on_gpu.py --help)
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = wheels ]; then
    python3 -m pip download -q -c constraints.txt -d wheels --no-deps --only-binary=:all: --python-version "${2:-3.12}" \
        optuna alembic sqlalchemy colorlog mako markupsafe greenlet pydantic pydantic-core annotated-types typing-inspection \
        typing-extensions filelock
    exit
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -d wheels ]; then
    python3 -m pip install -q --no-index --no-deps --target "$work/packages" wheels/*.whl
fi
.ci/as-installed "$work/checkout"
PYTHONUNBUFFERED=1 PYTHONPATH="$work/checkout:$work/packages" timeout 560 python3 benchmarks/on_gpu.py --out "$1" "${@:2}"
