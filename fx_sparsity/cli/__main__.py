"""`python -m fx_sparsity.cli`, the same as `fx-sparsity`."""

from fx_sparsity.cli import main

main()
