from fx_sparsity.masks.native import LIBRARY
from tests.native.paths import each_path

path = each_path(LIBRARY)
