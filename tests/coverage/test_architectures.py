from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from fx_sparsity import find_weights
from tests.coverage.architectures import NAMES, TEXT, tokens
from tests.coverage.proof import Proof, Wrong
from tests.coverage.table import PATH, measure, render

FAST = [
    "gpt2",
    "gpt_oss",
    "swin",
    "wav2vec2",
    "LSTM",
    "MultiheadAttention",
    "convolutions",
    "tables",
]


@pytest.fixture(scope="module")
def committed():
    header, _, *rows = PATH.read_text().splitlines()
    return {row.split()[0]: row for row in rows}


def test_the_committed_table_has_every_architecture_and_misses_nothing(committed):
    assert list(committed) == list(NAMES)
    assert len(set(NAMES) - {n for n, family in NAMES.items() if family == "torch.nn"}) >= 80
    for row in committed.values():
        *_, unexplained, wrong, share = row.split()
        assert (unexplained, wrong) == ("0", "0"), row
        assert float(share.rstrip("%")) > 98, row


@pytest.mark.parametrize("name", FAST)
def test_the_committed_row_is_what_the_script_measures(name, committed):
    row = measure(name)
    assert row.unexplained == ()
    assert row.wrong == ()
    assert committed[name].split() == render([row]).splitlines()[-1].split()


@pytest.mark.parametrize("swapped", [("in", "out"), ("out", "out"), ("in", "in")])
def test_the_proof_refutes_wrong_roles(swapped):
    torch.manual_seed(0)
    model, args = nn.Linear(8, 8), (torch.randn(4, 8),)
    program = torch.export.export(model, args)
    (site,) = find_weights(program).sites
    proof = Proof(program.module(), args)
    proof.check(site)
    wrong = replace(site, uses=tuple(replace(use, roles=swapped) for use in site.uses))
    with pytest.raises(Wrong, match="weight dim . as"):
        proof.check(wrong)


@pytest.mark.exhaustive
def test_weights_of_integer_arithmetic_are_found():
    """torch.export refuses I-BERT in `quant_mode`; the same model in float is the oracle."""
    settings = {**TEXT, "pad_token_id": 1}
    found = []
    for quant_mode in (False, True):
        config = transformers.IBertConfig(**settings, quant_mode=quant_mode)
        torch.manual_seed(0)
        model = transformers.IBertForMaskedLM(config).eval()
        found.append(find_weights(model, tokens()))
    exact, integer = ({site.fqn: (site.kind, site.roles) for site in w.sites} for w in found)
    assert exact == integer
    assert all(dense.reason.explained for dense in found[1].dense)
