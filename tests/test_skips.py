import pytest

from tests import conftest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(("marker", "outcome"), [("gpu", "skipped"), ("exhaustive", "failed")])
def test_only_gpu_tests_may_be_skipped(pytester, marker, outcome):
    pytester.makepyfile(f"import pytest\n@pytest.mark.{marker}\ndef test(): pytest.skip('why')")
    result = pytester.inline_run("-p", "no:cacheprovider", plugins=[conftest])
    result.assertoutcome(**{outcome: 1})
