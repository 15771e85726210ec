"""Every path of the calibrated methods in turn."""

import pytest

from fx_sparsity.sparsifier.calibrated.native import LIBRARY


@pytest.fixture(params=["native", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setenv("FX_SPARSITY_KERNELS", "0")
        assert not LIBRARY.ready()
    else:
        monkeypatch.delenv("FX_SPARSITY_KERNELS", raising=False)
        assert LIBRARY.ready(), LIBRARY.state()
    return request.param
