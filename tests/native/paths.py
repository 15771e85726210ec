"""Every path of a room's operators in turn, for its conftest."""

import pytest


def each_path(library):
    """A fixture of "native" and "plain": with the library, and with plain torch."""

    @pytest.fixture(params=["native", "plain"])
    def path(request, monkeypatch):
        if request.param == "plain":
            monkeypatch.setenv("FX_SPARSITY_KERNELS", "0")
            assert not library.ready()
        else:
            monkeypatch.delenv("FX_SPARSITY_KERNELS", raising=False)
            assert library.ready(), library.state()
        return request.param

    return path
