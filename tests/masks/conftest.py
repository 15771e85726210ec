from fx_sparsity._native import MASKS
from tests.native.paths import each_path

path = each_path(MASKS)
