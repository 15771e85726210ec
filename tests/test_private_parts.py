"""The private parts of torch, torchao and transformers that the package leans on are where it expects them.

They are read off its sources. Where a release moves one, the test of that name fails, and says who uses it; a new one
has to be added to the list below, and the upper bounds of `pyproject.toml` are there because the list is not empty.
"""

import ast
import importlib
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch._guards import TracingContext
from torch.ao.nn import quantized
from torch.nn.utils import prune

PACKAGE = Path(__file__).parents[1] / "fx_sparsity"
LIBRARIES = ("torch", "torchao", "transformers")


def is_private(part):
    return part.startswith("_") and not part.endswith("__")


def dotted(node, imported):
    """`a.b.c` as its full name, where `a` was imported from one of the libraries."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in imported:
        return ".".join([imported[node.id], *reversed(parts)])
    return None


def private_parts():
    """Full name -> the files that use it."""
    found = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        tree, imported = ast.parse(path.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [(a.asname or a.name.partition(".")[0], a.name) for a in node.names]
                imported |= {k: v if "." not in v else k for k, v in names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [(a.asname or a.name, f"{node.module}.{a.name}") for a in node.names]
                imported |= dict(names)
            else:
                continue
            for _, full in names:
                if any(map(is_private, full.split("."))):
                    found[full].add(str(path.relative_to(PACKAGE)))
        ours = {k: v for k, v in imported.items() if v.partition(".")[0] in LIBRARIES}
        inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                full = dotted(node, ours)
                if full and any(map(is_private, full.split("."))):
                    found[full].add(str(path.relative_to(PACKAGE)))
    return {k: v for k, v in found.items() if k.partition(".")[0] in LIBRARIES}


PARTS = private_parts()


def look_up(full):
    parts = full.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(full)


@pytest.mark.parametrize("full", sorted(PARTS))
def test_it_is_there(full):
    try:
        look_up(full)
    except (AttributeError, ModuleNotFoundError) as error:
        pytest.fail(f"{full} has moved ({error}); used in {', '.join(sorted(PARTS[full]))}")


MODULE = (
    "_apply _buffers _forward_hooks _forward_pre_hooks _get_name _load_from_state_dict"
    " _load_state_dict_pre_hooks _modules _non_persistent_buffers_set _parameters"
    " _save_to_state_dict"
)
OF_OBJECTS = {
    "Module": (lambda: nn.Linear(1, 1), MODULE),
    "Tensor": (lambda: torch.zeros(1), "_is_view _version"),
    "UntypedStorage": (lambda: torch.zeros(1).untyped_storage(), "_cdata"),
    "Graph": (fx.Graph, "_codegen"),
    "TracingContext": (lambda: TracingContext(None), "guards_context tensor_to_context"),
    "OpOverload": (lambda: torch.ops.aten.add.Tensor, "_schema"),
    "state_dict": (nn.Linear(1, 1).state_dict, "_metadata"),
    "pruning method": (
        lambda: next(iter(prune.identity(nn.Linear(1, 1), "weight")._forward_pre_hooks.values())),
        "_tensor_name",
    ),
    "quantized embedding": (lambda: quantized.Embedding(1, 1), "_packed_params"),
}


@pytest.mark.parametrize("kind", OF_OBJECTS)
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_objects_have_it(kind):
    make, names = OF_OBJECTS[kind]
    found = make()
    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_new_ones_are_decided():
    assert_expected_inline(
        "\n".join(sorted(PARTS)),
        """\
torch._C._dispatch_has_kernel_for_dispatch_key
torch._C._functorch.is_functorch_wrapped_tensor
torch._cslt_sparse_mm
torch._dynamo
torch._dynamo.config.patch
torch._dynamo.eval_frame
torch._dynamo.eval_frame.__file__
torch._dynamo.guards.GuardBuilder
torch._dynamo.guards.GuardBuilder.ID_MATCH
torch._dynamo.lookup_backend
torch._dynamo.source.ConstantSource
torch._dynamo.source.LocalSource
torch._dynamo.source.NNModuleSource
torch._guards.TracingContext
torch._guards.TracingContext.try_get
torch._inductor.config
torch._inductor.custom_graph_pass.CustomGraphPass
torch._inductor.list_mode_options
torch._make_per_channel_quantized_tensor
torch._make_per_tensor_quantized_tensor
torch._ops.HigherOrderOperator
torch._ops.OpOverload
torch._ops.OpOverloadPacket
torch._sparse_semi_structured_mm
torch._subclasses.fake_tensor.FakeTensor
torch._subclasses.fake_tensor.unset_fake_temporarily
torch._weight_int8pack_mm
torch.ao.nn.intrinsic.modules.fused._FusedModule
torch.ao.quantization.fx._decomposed
torch.cpu._is_avx512_bf16_supported
torch.fx.graph._PyTreeCodeGen
torch.nn.modules.batchnorm._BatchNorm
torch.nn.modules.conv._ConvNd
torch.nn.modules.conv._ConvTransposeNd
torch.ops.mkl._mkl_linear
torch.ops.mkl._mkl_reorder_linear_weight
torch.ops.mkldnn._is_mkldnn_bf16_supported
torch.ops.mkldnn._linear_pointwise
torch.ops.mkldnn._reorder_linear_weight
torch.sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass
torch.sparse._semi_structured_conversions.sparse_semi_structured_to_dense_cutlass
torch.utils._python_dispatch.TorchDispatchMode
torch.utils._python_dispatch._get_current_dispatch_mode
torch.utils._python_dispatch.is_traceable_wrapper_subclass
torch.utils._pytree
torch.utils._pytree.TreeSpec
torch.utils._pytree.tree_flatten
torch.utils._pytree.tree_leaves
torch.utils._pytree.tree_map
torch.utils._pytree.tree_map_only
torch.utils._pytree.tree_unflatten""",
    )
