from fx_sparsity._native import PRUNING
from tests.native.paths import each_path

path = each_path(PRUNING)
