"""Names, signatures and what a user's own subclasses rely on, against the installed `torch.ao.pruning`."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torch.ao.pruning as reference
from torch import nn
from torch.ao.pruning._experimental.data_scheduler import BaseDataScheduler as TorchDataScheduler
from torch.ao.pruning._experimental.data_sparsifier import quantization_utils
from torch.ao.pruning._experimental.data_sparsifier.base_data_sparsifier import (
    BaseDataSparsifier as TorchDataSparsifier,
)
from torch.ao.pruning._experimental.data_sparsifier.data_norm_sparsifier import (
    DataNormSparsifier as TorchDataNorm,
)
from torch.ao.pruning.sparsifier import utils

from fx_sparsity.compat import torch_ao
from fx_sparsity.compat.torch_ao import (
    BaseDataScheduler,
    BaseScheduler,
    BaseSparsifier,
    CubicSL,
    DataNormSparsifier,
    FakeSparsity,
    LambdaSL,
    NearlyDiagonalSparsifier,
    WeightNormSparsifier,
    module_contains_param,
    swap_module,
)

THEIRS = {
    **{name: getattr(utils, name) for name in utils.__all__},
    **{name: value for name, value in vars(reference).items() if callable(value)},
    "BaseDataScheduler": TorchDataScheduler,
    "BaseDataSparsifier": TorchDataSparsifier,
    "DataNormSparsifier": TorchDataNorm,
    "post_training_sparse_quantize": quantization_utils.post_training_sparse_quantize,
}

DIFFERENT = {
    "BaseDataSparsifier.prepare": "raises in torch; here data sparsifiers have none",
    "DataNormSparsifier.prepare": "raises in torch; here data sparsifiers have none",
    "BaseDataSparsifier.convert": "of models; here data sparsifiers have none",
    "DataNormSparsifier.convert": "of models; here data sparsifiers have none",
    "BaseDataSparsifier.make_config_from_model": "of models; here data sparsifiers have none",
    "DataNormSparsifier.make_config_from_model": "of models; here data sparsifiers have none",
}


def public_names():
    """What the files of torch.ao.pruning declare: names in `__all__`, of classes, re-exported ones."""
    names = {"post_training_sparse_quantize"}
    for file in Path(reference.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= set(ast.literal_eval(node.value))
            elif isinstance(node, ast.ImportFrom) and node.level and file.name == "__init__.py":
                names |= {alias.name for alias in node.names}
    return {name for name in names if not name.startswith("_")}


def parameters(function):
    """Names of the parameters that a caller may use, but for catch-alls."""
    catch_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        p.name for p in inspect.signature(function).parameters.values() if p.kind not in catch_all
    ]


def methods(name):
    """`Class` and `Class.method` -> torch's and ours."""
    theirs, ours = THEIRS[name], getattr(torch_ao, name)
    yield name, theirs, ours
    if not inspect.isclass(theirs) or theirs is utils.FakeSparsity:
        return
    for method, function in inspect.getmembers(theirs, inspect.isfunction):
        path = f"{name}.{method}"
        if not method.startswith("_") and path not in DIFFERENT:
            yield path, function, getattr(ours, method)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_no_name_is_missing_silently():
    assert public_names() == {*torch_ao.__all__, *torch_ao.ABSENT, *torch_ao.LIGHTNING}
    assert set(THEIRS) == set(torch_ao.__all__)
    assert torch_ao.__all__ == sorted(torch_ao.__all__)


@pytest.mark.parametrize("name", torch_ao.__all__)
def test_a_name_is_the_object_that_the_package_has(name):
    ours = getattr(torch_ao, name)
    for module in ("fx_sparsity", "fx_sparsity.sparsifier", "fx_sparsity.quantization"):
        assert getattr(importlib.import_module(module), name, ours) is ours


@pytest.mark.parametrize("name", torch_ao.ABSENT)
def test_an_absent_name_says_what_to_use(name):
    with pytest.raises(ImportError, match=rf"^fx_sparsity.compat.torch_ao has no {name}: \w"):
        exec(f"from fx_sparsity.compat.torch_ao import {name}")


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(torch_ao, "WeightNorm")


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_every_parameter_is_taken_and_in_the_same_order(name):
    for path, theirs, ours in methods(name):
        wanted, has = parameters(theirs), parameters(ours)
        if path.endswith("squash_mask") and "Data" in path:
            assert set(wanted) == set(has)  # by keyword alone, in torch
        else:
            assert has[: len(wanted)] == wanted, path


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_defaults_are_those_of_torch(name):
    for path, theirs, ours in methods(name):
        mine = inspect.signature(ours).parameters
        for parameter in inspect.signature(theirs).parameters.values():
            if parameter.default is parameter.empty or parameter.name == "SUPPORTED_MODULES":
                continue
            default = mine[parameter.name].default
            if parameter.default is utils.FakeSparsity:
                assert default is FakeSparsity
            else:
                assert default == parameter.default, path


def test_unknown_keywords_raise():
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model())
    scheduler = LambdaSL(sparsifier, lambda epoch: 1.0)
    for call in (
        lambda: sparsifier.step(usepath=True),
        lambda: sparsifier.squash_mask(params_to_kep=()),
        lambda: scheduler.step(epochs=1),
        lambda: WeightNormSparsifier(sparsity=0.5),
        lambda: DataNormSparsifier(zeros=1),
        lambda: DataNormSparsifier([("w", torch.randn(4, 4))]).add_data(
            "v", torch.randn(2), sparse=1
        ),
        lambda: WeightNormSparsifier().prepare(
            model(), [{"tensor_fqn": "0.weight", "sparsity": 1}]
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=r"keyword|unknown key"):
            call()


def test_schedules_print_what_torch_prints(capsys):
    printed = []
    for library in (reference, torch_ao):
        sparsifier = library.WeightNormSparsifier(0.8)
        sparsifier.prepare(model(), None)
        scheduler = library.CubicSL(sparsifier, delta_t=1, total_t=4, verbose=True)
        sparsifier.step(use_path=False)
        scheduler.step()
        scheduler.step(epoch=7)
        scheduler.print_sl(True, 3, 0.25)
        scheduler.print_sl(False, 3, 0.25, 1)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_a_data_schedule_prints_any_value(capsys):
    class Shape(BaseDataScheduler):
        def get_schedule_param(self):
            return dict.fromkeys(self.data_sparsifier.data_groups, (1, 2))

    Shape(DataNormSparsifier([("w", torch.randn(4, 4))]), "sparse_block_shape", verbose=True)
    assert capsys.readouterr().out == "Adjusting sparse_block_shape for group w to (1, 2)\n"


def test_an_overridden_print_sl_is_called():
    said = []

    class Loud(BaseScheduler):
        def get_sl(self):
            return [0.25 * (self.last_epoch + 1)] * len(self.sparsifier.groups)

        def print_sl(self, is_verbose, group, sl, epoch=None):
            said.append((is_verbose, group, sl, epoch))

    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model())
    scheduler = Loud(sparsifier)
    sparsifier.step()
    scheduler.step(5)
    assert said == [
        (False, 0, 0.25, None),
        (False, 1, 0.25, None),
        (False, 0, 0.5, 5),
        (False, 1, 0.5, 5),
    ]


@pytest.mark.parametrize("positional", [True, False])
def test_a_data_subclass_that_spells_out_the_configuration_works(positional):
    seen = {}

    class Flipped(DataNormSparsifier):
        """Prunes what is large: hands the base class other data."""

        def update_mask(
            self, name, data, sparsity_level, sparse_block_shape, zeros_per_block, **kw
        ):
            seen[name] = (sparsity_level, sparse_block_shape, zeros_per_block, kw)
            if positional:
                args = (sparsity_level, sparse_block_shape, zeros_per_block)
                super().update_mask(name, 1 / data, *args, **kw)
            else:
                super().update_mask(
                    name=name,
                    data=1 / data,
                    sparsity_level=sparsity_level,
                    sparse_block_shape=sparse_block_shape,
                    zeros_per_block=zeros_per_block,
                )

    sparsifier = Flipped([("w", torch.tensor([[1.0, 2.0, 3.0, 4.0]]))], 0.5, (1, 1))
    sparsifier.step()
    assert seen == {"w": (0.5, (1, 1), 1, {})}
    assert sparsifier.get_mask("w").tolist() == [[1, 1, 0, 0]]


def test_a_model_subclass_that_spells_out_the_configuration_works():
    class Half(WeightNormSparsifier):
        def update_mask(
            self, module, tensor_name, sparsity_level, sparse_block_shape, zeros_per_block, **kw
        ):
            super().update_mask(
                module, tensor_name, sparsity_level / 2, sparse_block_shape, zeros_per_block
            )

    class Wider(NearlyDiagonalSparsifier):
        def update_mask(self, module, tensor_name, nearliness, **kw):
            super().update_mask(module, tensor_name, nearliness + 2)

    half, wider = Half(1.0), Wider(1)
    half.prepare(model(), [{"tensor_fqn": "1.weight"}])
    wider.prepare(model(), [{"tensor_fqn": "1.weight"}])
    half.step()
    wider.step()
    assert half.get_mask("1.weight").mean() == 0.5
    assert wider.get_mask("1.weight").sum() == 8 + 7 + 7
    with pytest.raises(ValueError, match="no mask of this sparsifier is on bias of Linear"):
        half.name_of(nn.Linear(2, 2), "bias")


def test_what_is_masked_by_default_can_be_chosen_by_class():
    class Convolutions(WeightNormSparsifier):
        def make_config_from_model(self, model, SUPPORTED_MODULES=(nn.Conv1d,)):
            super().make_config_from_model(model, SUPPORTED_MODULES)

    mixed = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.PReLU(4))
    chosen = Convolutions()
    chosen.prepare(mixed)
    assert chosen.names == ["1.weight"]
    sparsifier = WeightNormSparsifier()
    sparsifier.make_config_from_model(mixed, {nn.PReLU})
    assert sparsifier.config == [{"tensor_fqn": "2.weight"}]
    for each in (reference.WeightNormSparsifier(), sparsifier):
        each.make_config_from_model(mixed, SUPPORTED_MODULES={nn.Linear})
        assert each.config == [{"tensor_fqn": "0.weight"}]


class Sparse(nn.Module):
    @classmethod
    def from_dense(cls, module):
        made = cls()
        made.weight = nn.Parameter(module.weight.detach().clone())
        return made

    def forward(self, x):
        return x @ self.weight.t()


def test_a_swapped_module_keeps_its_hooks_and_device():
    calls = []
    dense = nn.Linear(4, 4, bias=False)
    dense.register_forward_pre_hook(lambda module, args: calls.append("before"))
    dense.register_forward_hook(lambda module, args, output: calls.append("after"))
    for swap in (utils.swap_module, swap_module):
        assert swap(dense, {nn.Conv1d: Sparse}) is dense
        made = swap(dense, {nn.Linear: Sparse})
        torch.testing.assert_close(made(torch.eye(4)), dense.weight.t())
        assert calls == ["before", "after"]
        calls.clear()
        assert next(swap(dense.to("meta"), {nn.Linear: Sparse}).parameters()).is_meta
        dense.to_empty(device="cpu")
        nn.init.normal_(dense.weight)
    dense.register_buffer("elsewhere", torch.empty(1, device="meta"))
    with pytest.raises(
        ValueError, match="Linear: expected a module on one device, found cpu, meta"
    ):
        swap_module(dense, {nn.Linear: Sparse})


def test_convert_swaps_what_is_masked():
    dense = model()
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(dense, [{"tensor_fqn": "1.weight"}])
    called = []
    dense[1].register_forward_hook(lambda *args: called.append(1))
    assert [module_contains_param(module, FakeSparsity) for module in dense] == [False, True]
    converted = sparsifier.convert(dense, {nn.Linear: Sparse})
    assert [type(module) for module in converted] == [nn.Linear, Sparse]
    converted(torch.randn(2, 8))
    assert called == [1]


def test_sparse_quantized_mappings_are_those_of_torch():
    for name in ("get_static_sparse_quantized_mapping", "get_dynamic_sparse_quantized_mapping"):
        assert getattr(torch_ao, name)() == getattr(reference, name)()


def test_a_whole_script_runs_with_its_imports_changed():
    sparsifier = WeightNormSparsifier(
        sparsity_level=0.8, sparse_block_shape=(1, 4), zeros_per_block=4
    )
    dense = model()
    sparsifier.prepare(dense, config=[{"tensor_fqn": "0.weight"}])
    scheduler = CubicSL(sparsifier, delta_t=1, total_t=3)
    for epoch in range(3):
        sparsifier.step()
        scheduler.step(epoch)
    assert isinstance(sparsifier, BaseSparsifier)
    sparsifier.squash_mask(params_to_keep=("sparse_block_shape",))
    assert dense[0].sparse_params == {"sparse_block_shape": (1, 4)}
