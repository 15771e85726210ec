"""Masks under torch.compile: edits are seen without recompiling; then squash, in a pass manager.

python examples/compile_pipeline.py
"""

import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager

import fx_sparsity as fxs
from fx_sparsity import passes


def main() -> None:
    torch.manual_seed(0)
    last = nn.Linear(256, 64)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), last)
    inputs = (torch.randn(32, 64),)
    target = torch.randn(32, 64)

    sparsifier = fxs.WeightNormSparsifier()
    mapping = fxs.SparsityMapping().set_global("unstructured 50%")
    fxs.prepare(model, sparsifier, inputs, mapping)

    # One graph, no breaks; the stance proves that nothing below compiles again.
    compiled = torch.compile(model, fullgraph=True)
    compiled(*inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(20):
            if step % 5 == 0:
                sparsifier.step()
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(compiled(*inputs), target)
            loss.backward()
            optimizer.step()
            if step % 5 == 0:
                print(f"step {step:2}: loss {loss.item():.4f}")

        before = compiled(*inputs)
        sparsifier.get_mask("2.weight").zero_()
        assert not torch.equal(compiled(*inputs), before)
        assert torch.allclose(compiled(*inputs), last.bias.expand(32, 64))
        print("a mask edited in place was seen by the compiled model, without recompiling")

    # The rest as passes, which may go between yours: compute, bake in, put on sparse kernels.
    graph = torch.export.export(fxs.unprepare(model, sparsifier).eval(), inputs).module()
    sparsifier = fxs.WeightNormSparsifier()
    squash = passes.Squash(sparsifier)
    lower = passes.Lower("always", inputs)
    manager = PassManager(
        [passes.Prepare(sparsifier, mapping), passes.Step(sparsifier), squash, lower]
    )
    graph = manager(graph).graph_module
    assert squash.record is not None
    assert lower.report is not None
    fxs.verify(graph, squash.record).raise_if_lost()
    print(f"{lower.report.summary}; every masked value is zero")

    with torch.inference_mode():
        for_inference = torch.compile(graph, fullgraph=True)
        torch.testing.assert_close(for_inference(*inputs), graph(*inputs), rtol=1e-4, atol=1e-5)
    print("squashed, lowered and compiled for inference")


if __name__ == "__main__":
    main()
