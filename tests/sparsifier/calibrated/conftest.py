from fx_sparsity.sparsifier.calibrated.native import LIBRARY
from tests.native.paths import each_path

path = each_path(LIBRARY)
