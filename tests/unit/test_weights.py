from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peaknet_predict.models import load_weights
from peaknet_predict.models.weights import METADATA, stored_threshold

State = dict[str, Tensor]


class Net(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))


@pytest.fixture
def state() -> State:
    torch.manual_seed(1)
    return Net().state_dict()


def assert_loaded(net: nn.Module, state: State) -> None:
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_safetensors(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    net = Net()
    assert load_weights(net, path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_loaded(net, state)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "module", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_pickles_wrappers_and_prefixes(
    state: State,
    tmp_path: Path,
    suffix: str,
    key: str | None,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / f"w{suffix}"
    content: Any = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(content if key is None else {key: content, "epoch": 3}, path)
    net = Net()
    with caplog.at_level(logging.INFO):
        load_weights(net, str(path))
    assert_loaded(net, state)
    assert (f"removed the prefix '{prefix}'" in caplog.text) == bool(prefix)
    assert (f"under the key '{key}'" in caplog.text) == (key is not None)


def test_a_wrapped_network_keeps_its_prefix(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    wrapped = nn.ModuleDict({"module": Net()})
    load_weights(wrapped, path)
    assert_loaded(wrapped["module"], state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_cast_to_the_network(state: State, tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "w.safetensors"
    narrow = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_file(narrow, path)
    net = Net()
    load_weights(net, path)
    assert_loaded(net, {k: v.float() if v.is_floating_point() else v for k, v in narrow.items()})
    assert net.state_dict()["layers.0.weight"].dtype == torch.float32


def test_other_programs_names_are_understood(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    theirs = {name.replace("layers.3.", "layers.3.conv."): t for name, t in state.items()}
    save_file(theirs, path)
    net = Net()
    with pytest.raises(ValueError, match=r"unknown to the network: 2: layers\.3\.conv\.bias"):
        load_weights(net, path)
    net.weight_aliases = {"layers.3.conv.": "layers.3."}  # type: ignore[assignment]
    load_weights(net, path)
    assert_loaded(net, state)
    # Where a file has both names, one of them is not understood.
    save_file({**state, **{name: t.clone() for name, t in theirs.items()}}, path)
    with pytest.raises(ValueError, match=r"unknown to the network: 2: layers\.3\.conv\.bias"):
        load_weights(Net(), path)


def test_a_file_may_ask_for_an_operating_point(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for metadata, expected in (
        (None, None),
        ({"format": "pt"}, None),
        ({METADATA: '{"version": "0.1.0"}'}, None),
        ({METADATA: '{"threshold": 1.25}'}, 1.25),
    ):
        save_file(state, path, metadata)
        assert stored_threshold(path) == expected
    for damaged in ('{"threshold": "high"}', "no JSON", "[1]", '{"threshold": NaN}'):
        save_file(state, path, {METADATA: damaged})
        with pytest.raises(ValueError, match=r"w\.safetensors: its (metadata|threshold)"):
            stored_threshold(path)
    torch.save(state, tmp_path / "w.pt")
    assert stored_threshold(tmp_path / "w.pt") is None


def damaged(state: State, how: str) -> State:
    if how == "missing":
        del state["layers.0.weight"]
    elif how == "missing many":
        return {"mask": state["mask"]}
    elif how == "unexpected":
        state["head.weight"] = torch.zeros(1)
    elif how == "shape":
        state["layers.1.weight"] = torch.zeros(3, 4)
    elif how == "nan":
        state["layers.2.bias"][1] = torch.nan
    elif how == "overflow":
        state["layers.3.bias"] = torch.full((3,), 1e300, dtype=torch.float64)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing from the file: 1: layers\.0\.weight"),
        ("missing many", r"missing from the file: 12: layers\.0\.weight, .*, and 2 more"),
        ("unexpected", r"unknown to the network: 1: head\.weight"),
        ("shape", r"wrong shape: 1: layers\.1\.weight \(3, 4\) instead of \(3, 3\)"),
        ("nan", r"NaN or infinite values in 1: layers\.2\.bias"),
        ("overflow", r"NaN or infinite values in 1: layers\.3\.bias"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(
    state: State, tmp_path: Path, how: str, message: str
) -> None:
    path = tmp_path / "w.safetensors"
    save_file(damaged(state, how), path)
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(net, path)
    assert_loaded(net, before)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weight file .*nowhere\.pt: check the path"):
        load_weights(Net(), tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="no weight file"):
        load_weights(Net(), tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return open, ("was_run",)


def test_a_pickle_of_objects_is_refused(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    torch.save({**state, "extra": Malicious()}, path)
    with pytest.raises(ValueError, match=r"refused for safety.*safetensors\.torch\.save_file"):
        load_weights(Net(), path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"not a weight file at all"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.(pt|safetensors) is"):
        load_weights(Net(), path)


def test_a_truncated_file(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match="damaged"):
        load_weights(Net(), path)


def test_other_contents(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_weights(Net(), path)
    torch.save({**state, "epoch": 3}, path)
    with pytest.raises(ValueError, match="not tensors: 1: epoch"):
        load_weights(Net(), path)
    onnx = tmp_path / "w.onnx"
    onnx.touch()
    with pytest.raises(ValueError, match=r"\.onnx"):
        load_weights(Net(), onnx)


def test_a_shipped_file_is_found_by_its_name_from_anywhere(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped").mkdir()
    save_file(state, tmp_path / "shipped" / "small.safetensors")
    monkeypatch.setattr("peaknet_predict.models.weights.SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    net = Net()
    load_weights(net, "small")
    assert_loaded(net, state)
    # A file of that name in the working directory is meant literally.
    (tmp_path / "small").write_text("not weights")
    with pytest.raises(ValueError, match="read from .safetensors"):
        load_weights(net, "small")
    for gone in ("other", "small.pt", "sub/small"):
        with pytest.raises(FileNotFoundError, match=r"one that is shipped \(small\)"):
            load_weights(net, gone)


def test_half_precision_files_load_into_float32(state: State, tmp_path: Path) -> None:
    halves = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    save_file(halves, tmp_path / "w.safetensors")
    net = Net()
    load_weights(net, tmp_path / "w.safetensors")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert_loaded(
        net, {name: t.float() if t.is_floating_point() else t for name, t in halves.items()}
    )
