#!/usr/bin/env bash
# Most would guess: a weight matrix times a mask of zeros and ones, made sparse, holds as many entries as the mask
# has ones. In pydata's sparse it does not: a negative weight times 0 is -0.0, and COO and GCXS keep every -0.0 as
# an entry, because they compare bits with the fill value. SciPy keeps none on the same matrix. It matters for
# everybody who prunes by multiplication with a mask: about half of the zeros are negative, so that a matrix of 90
# % zeros is stored as one of 44 %.
#
# Seen with sparse 0.19.3, scipy 1.17.1 and numpy 2.4.6: half of the pruned entries stay; none after adding 0.0.
# Output: entries in each library; exit code 1 if they are others.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sparse==0.19.3 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import scipy.sparse
import sparse

print("sparse", sparse.__version__, "scipy", scipy.__version__, "numpy", np.__version__)
source = np.random.default_rng(0)
weights = source.standard_normal((64, 64), dtype=np.float32)
mask = source.random((64, 64)) < 0.1
pruned = weights * mask
kept, negative = int(mask.sum()), int((~mask & (weights < 0)).sum())
found = {
    "numpy.count_nonzero": int(np.count_nonzero(pruned)),
    "scipy csr": scipy.sparse.csr_matrix(pruned).nnz,
    "sparse COO": sparse.COO.from_numpy(pruned).nnz,
    "sparse GCXS": sparse.GCXS.from_numpy(pruned).nnz,
    "sparse COO of the matrix + 0.0": sparse.COO.from_numpy(pruned + 0.0).nnz,
}
print(f"{kept} weights kept of {pruned.size}, {negative} of the zeros are negative")
for name, entries in found.items():
    print(f"{name:32} {entries}")
is_as_found = list(found.values()) == [kept, kept, kept + negative, kept + negative, kept]
print("as found: each -0.0 is an entry" if is_as_found else "the behaviour has changed")
sys.exit(not is_as_found)
PYTHON
